# SPDX-License-Identifier: Apache-2.0
"""The kernels of the slab engine, run by the PTX interpreter, against float64."""

from typing import Any

import numpy as np
import pytest

from pair_kernels import DISTANCES, DTYPES, number, result, run, unwritten
from ptx_interpreter import Struct
from slab_kernels import Operand, Slabs, multiply, symbol

WIDE = ("float32", "float64")


def rows_of(rng: np.random.Generator, n: int, d: int, distance: str) -> np.ndarray:
    """Rows with a duplicate, a near-duplicate and a zero row; of unit length where that is due."""
    x = rng.standard_normal((n, d))
    if n > 4:
        x[n // 2] = x[0]
        x[n // 3] = x[1] * (1 + 1e-3)
        x[n - 1] = 0
    if distance == "cosine":
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    return x


def slabs(
    rng: np.random.Generator,
    dtype: str,
    distance: str,
    n: int,
    m: int | None,
    d: int,
    step: int,
    classes: int = 3,
) -> Slabs:
    """A batch with some labels that occur on one side only."""
    x = Operand(rows_of(rng, n, d, distance), rng.integers(0, classes, n), dtype)
    if m is None:
        return Slabs(x, x, distance, step)
    r = Operand(rows_of(rng, m, d, distance), rng.integers(1, classes + 1, m), dtype)
    return Slabs(x, r, distance, step)


def all_u(batch: Slabs) -> np.ndarray:
    """U of all pairs, float64."""
    x, r = batch.x.values, batch.r.values
    if batch.distance == "dot":
        return -2 * x @ r.T
    u = ((x[:, None] - r) ** 2).sum(2)
    if batch.distance == "cosine":
        zero = ~x.any(1)[:, None] | ~r.any(1)
        u[zero] = 2
    return u


def value(u: np.ndarray, distance: str) -> np.ndarray:
    """Distances."""
    return {"euclidean": np.sqrt(np.maximum(u, 0)), "sqeuclidean": u}.get(distance, u / 2)


def kinds(batch: Slabs) -> list[np.ndarray]:
    """Which pairs are positives, and which negatives."""
    same = batch.x.labels[:, None] == batch.r.labels
    positive = same.copy()
    if batch.alone:
        np.fill_diagonal(positive, False)
    return [positive, ~same]


def check_hardest(batch: Slabs, **options: Any) -> None:
    """The winners are as hard as the hardest in float64, and measured exactly."""
    index, distance = batch.hardest(**options)
    d = value(all_u(batch), batch.distance)
    scale = np.abs(d).max(initial=1)
    for kind, mask in enumerate(kinds(batch)):
        masked = np.where(mask, d, -np.inf if kind == 0 else np.inf)
        best = masked.max(1) if kind == 0 else masked.min(1)
        found = index[kind] >= 0
        np.testing.assert_array_equal(found, mask.any(1))
        at = np.arange(len(d))[found]
        assert mask[at, index[kind][found]].all()
        chosen = d[at, index[kind][found]]
        np.testing.assert_allclose(chosen, best[found], rtol=1e-5, atol=1e-5 * scale)
        np.testing.assert_allclose(distance[kind][found], chosen, rtol=2e-6, atol=1e-6 * scale)
        np.testing.assert_array_equal(distance[kind][~found], 0)


@pytest.mark.parametrize("transposed", [True, False], ids=["nt", "nn"])
@pytest.mark.parametrize("dtype", WIDE)
@pytest.mark.parametrize("sizes", [(1, 1, 1), (65, 70, 37), (3, 130, 600), (5, 7, 0)])
def test_product(dtype: str, transposed: bool, sizes: tuple[int, int, int]) -> None:
    m, n, k = sizes
    rng = np.random.default_rng(1)
    # Whole numbers: every order of adding up is exact.
    a = rng.integers(-8, 9, (m, k)).astype(dtype)
    b = rng.integers(-8, 9, (n, k) if transposed else (k, n)).astype(dtype)
    out = result(multiply(a, b, transposed=transposed))
    np.testing.assert_array_equal(out, a @ (b.T if transposed else b))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_hardest(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(2)
    check_hardest(slabs(rng, dtype, distance, 41, None, 19, 16))
    check_hardest(slabs(rng, dtype, distance, 11, 37, 19, 8))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", WIDE)
def test_hardest_exact(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(3)
    check_hardest(slabs(rng, dtype, distance, 37, None, 5, 37), exact=True)


@pytest.mark.parametrize("n", [1, 2, 33])
@pytest.mark.parametrize("d", [1, 300])
def test_hardest_sizes(n: int, d: int) -> None:
    rng = np.random.default_rng(4)
    check_hardest(slabs(rng, "float32", "euclidean", n, None, d, 7))
    check_hardest(slabs(rng, "float32", "euclidean", n, None, d, 7, classes=1))
    check_hardest(slabs(rng, "float32", "euclidean", n, None, d, 7, classes=10**6))
    check_hardest(slabs(rng, "float32", "dot", 3, n, d, 7))


def first_best(batch: Slabs) -> np.ndarray:
    """Indices of the hardest pairs, the lowest of equals."""
    d = value(all_u(batch), batch.distance)
    out = np.full((2, len(d)), -1)
    for kind, mask in enumerate(kinds(batch)):
        masked = np.where(mask, d, -np.inf if kind == 0 else np.inf)
        best = masked.argmax(1) if kind == 0 else masked.argmin(1)
        out[kind] = np.where(mask.any(1), best, -1)
    return out


@pytest.mark.parametrize("exact", [False, True], ids=["keys", "exact"])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "dot"])
@pytest.mark.parametrize("dtype", WIDE)
def test_ties_go_to_the_lowest_index(dtype: str, distance: str, exact: bool) -> None:
    rng = np.random.default_rng(5)
    n, m = 6, 280  # more references than a block has threads
    x = Operand(rng.integers(-1, 2, (n, 3)), rng.integers(0, 4, n), dtype)
    r = Operand(rng.integers(-1, 2, (m, 3)), rng.integers(0, 4, m), dtype)
    batch = Slabs(x, r, distance, n)
    index, _ = batch.hardest(exact=exact)
    np.testing.assert_array_equal(index, first_best(batch))


def test_collapsed_rows_are_searched_by_exact_differences() -> None:
    rng = np.random.default_rng(6)
    x = 100 + rng.integers(-8, 9, (50, 4)) / 1024
    operand = Operand(x, rng.integers(0, 3, 50), "float32")
    batch = Slabs(operand, operand, "sqeuclidean", 50)
    np.testing.assert_array_equal(batch.hardest()[0], first_best(batch))


def test_zero_query_is_equally_far_from_all() -> None:
    rng = np.random.default_rng(7)
    x = rows_of(rng, 20, 6, "cosine")
    operand = Operand(x, np.arange(20) % 2, "float32")
    index, distance = Slabs(operand, operand, "cosine", 20).hardest()
    assert index[:, 19].tolist() == [1, 0]
    assert distance[:, 19].tolist() == [1, 1]


@pytest.mark.parametrize("exact", [False, True], ids=["keys", "exact"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_that_are_not_finite_poison_all_distances(dtype: str, exact: bool) -> None:
    rng = np.random.default_rng(8)
    for bad in (np.nan, np.inf, 1e200 if dtype == "float64" else 3e19):
        if dtype == "float16" and bad == 3e19:
            continue  # is infinity there
        x = rng.standard_normal((20, 5))
        x[7, 2] = bad
        operand = Operand(x, np.arange(20) // 19, dtype)
        batch = Slabs(operand, operand, "euclidean", 9)
        index, distance = batch.hardest(exact=exact)
        for kind, mask in enumerate(kinds(batch)):
            found = index[kind] >= 0
            np.testing.assert_array_equal(found, mask.any(1))
            assert mask[np.arange(20)[found], index[kind][found]].all()
            assert np.isnan(distance[kind][found]).all()
            np.testing.assert_array_equal(distance[kind][~found], 0)


def test_order_of_threads_does_not_matter() -> None:
    rng = np.random.default_rng(14)
    batch = slabs(rng, "float32", "euclidean", 40, None, 9, 40)
    for first, second in zip(batch.hardest(), batch.hardest(seed=1), strict=True):
        np.testing.assert_array_equal(first, second)


REDUCTIONS = ("mean", "mean_nonzero", "sum")


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("smooth", [False, True], ids=["hinge", "softplus"])
@pytest.mark.parametrize("keep", [False, True], ids=["skip", "keep"])
@pytest.mark.parametrize("dtype", WIDE)
def test_triplet_finish(dtype: str, keep: bool, smooth: bool, reduction: str) -> None:
    for n in (0, 1, 1500):
        check_triplet_finish(dtype, n, keep, smooth, reduction)


def check_triplet_finish(dtype: str, n: int, keep: bool, smooth: bool, reduction: str) -> None:
    """Loss, slope and scale are those of float64."""
    rng = np.random.default_rng(15)
    index = rng.integers(-1, 3, (2, n))
    distance = np.where(index >= 0, rng.random((2, n)), 0).astype(dtype)
    loss, slope, scale = finish(index, distance, (0.2, smooth, keep, reduction))
    has = index >= 0
    moving = has[1] & (has[0] | keep)
    d = distance.astype(np.float64)
    v = np.where(moving, d[0] - d[1], 0) + 0.2
    terms = np.log1p(np.exp(v)) if smooth else np.maximum(v, 0)
    slopes = 1 / (1 + np.exp(-v)) if smooth else v > 0
    counted = moving | keep
    terms = np.where(counted, terms, 0)
    divisor = max(1, int((terms != 0).sum() if reduction == "mean_nonzero" else counted.sum()))
    divisor = 1 if reduction == "sum" else divisor
    np.testing.assert_allclose(loss, terms.sum() / divisor, rtol=1e-5)
    np.testing.assert_allclose(scale, 1 / divisor, rtol=1e-6)
    slopes = np.where(moving, slopes, 0)
    np.testing.assert_allclose(slope, np.stack((slopes, -slopes)), rtol=1e-5)


def finish(index: np.ndarray, distance: np.ndarray, rule: tuple[float, bool, bool, str]) -> Any:
    """Loss, slope and scale by the kernel."""
    t, n = distance.dtype, index.shape[1]
    margin, smooth, keep, reduction = rule
    members = [t.type(margin), np.bool_(smooth), np.bool_(keep)]
    loss, slope, scale = unwritten((), t), unwritten((2, n), t), unwritten((), t)
    numbers = [np.int64(n), [*members, np.int32(REDUCTIONS.index(reduction))]]
    arguments = Struct([index, distance, *numbers, loss, slope, scale])
    run("slab.cu", symbol("triplet_finish", t.name), 1, number("triplet_threads"), arguments)
    return result(loss), result(slope), result(scale)


def test_triplet_finish_of_nan() -> None:
    index = np.array([[-1, 0, 1], [1, 2, 0]])
    distance = np.array([[0, 1, 1], [np.nan, 2, 1]], np.float32)
    loss, slope, scale = finish(index, distance, (0.5, False, False, "mean"))
    assert np.isnan(loss) and np.isnan(slope).all() and scale == 0.5


def test_plans() -> None:
    assert number("slab_rows_of", 1000, 1000, 128) == 1000
    assert number("slab_rows_of", 1 << 16, 1 << 16, 128) == 64
    assert number("slab_rows_of", 100, 1 << 23, 128) == 1
    assert number("slab_rows_of", 1 << 20, 1, 1) == 65536
    assert [number("gradient_parts", d) for d in (0, 256, 257)] == [1, 1, 2]
