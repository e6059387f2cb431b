# SPDX-License-Identifier: Apache-2.0
"""The kernels of the slab engine, run by the PTX interpreter, against float64."""

from typing import Any

import numpy as np
import pytest

from pair_kernels import DISTANCES, DTYPES, decode, number, plan, result, run, unwritten
from ptx_interpreter import Struct
from slab_kernels import FORMULAS, Operand, Slabs, multiply, symbol

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


def pair_sums(
    batch: Slabs, formula: str, margins: tuple[float, float], weight: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Sums, counts, and gradients [2, ...] of the sums weighted by query row, float64."""
    x, r = batch.x.values, batch.r.values
    u = all_u(batch)
    d = value(u, batch.distance)
    sums, counts = np.zeros((2, len(x))), np.zeros((4, len(x)), np.int64)
    of_x, of_r = np.zeros((2, *x.shape)), np.zeros((2, *r.shape))
    slope = {"euclidean": 0.5 / np.where(d == 0, np.inf, d), "sqeuclidean": np.ones_like(d)}.get(
        batch.distance, np.full_like(d, 0.5)
    )
    if batch.distance == "cosine":
        slope[~x.any(1)[:, None] | ~r.any(1)] = 0
    for kind, mask in enumerate(kinds(batch)):
        z = np.where(mask, d - margins[0] if kind == 0 else margins[1] - d, 0)
        loss = np.maximum(z, 0)
        outer = np.where(z > 0, 1 if kind == 0 else -1, 0) * slope * weight[kind][:, None]
        if formula == "squared_hinge":
            outer, loss = outer * 2 * loss, loss**2
        sums[kind] = loss.sum(1)
        counts[kind], counts[2 + kind] = mask.sum(1), (z > 0).sum(1)
        h = 2 * outer
        if batch.distance == "dot":
            of_x[kind], of_r[kind] = -h @ r, -h.T @ x
        else:
            of_x[kind] = h.sum(1)[:, None] * x - h @ r
            of_r[kind] = h.sum(0)[:, None] * r - h.T @ x
    return sums, counts, of_x, of_r


def near(ours: np.ndarray, exact: np.ndarray, dtype: str) -> None:
    """Equal but for rounding."""
    assert ours.shape == exact.shape
    error = (2e-5 if dtype != "float64" else 1e-11) + 2 * (DTYPES[dtype][2])
    np.testing.assert_allclose(ours, exact, rtol=error, atol=error * max(1, np.abs(exact).max()))


def margins_for(batch: Slabs) -> tuple[float, float]:
    """Margins that make part of the pairs active and are far from every pair's distance."""
    d = np.unique(value(all_u(batch), batch.distance)[sum(kinds(batch)) > 0])
    gaps = np.diff(d)

    def widest(low: float, high: float) -> float:
        first = int(d.size * low)
        at = first + int(gaps[first : max(first + 1, int(d.size * high))].argmax())
        return float(d[at] + d[at + 1]) / 2

    return (0.5, 0.5) if d.size < 2 else (widest(0.2, 0.5), widest(0.5, 0.8))


def check_pair_sum(batch: Slabs, formula: str) -> None:
    """Sums, counts and gradients of both passes are those of float64."""
    margins = margins_for(batch)
    ones = np.ones((2, len(batch.x.rows)))
    sums, counts, of_x, of_r = pair_sums(batch, formula, margins, ones)
    wide = batch.wide
    ours = batch.pair_sum(formula, margins)
    near(ours[0], sums, wide)
    np.testing.assert_array_equal(ours[1], counts)
    if batch.alone:
        near(ours[2], of_x + of_r, wide)
    else:
        near(ours[2], of_x, wide)
        near(batch.pair_sum(formula, margins, swapped=True)[2], of_r, wide)
    without = batch.pair_sum(formula, margins, with_grad=False)
    np.testing.assert_array_equal(without[0], ours[0])
    np.testing.assert_array_equal(without[1], ours[1])
    assert without[2] is None


def check_backward(batch: Slabs, formula: str, rng: np.random.Generator) -> None:
    """The gradient of weighted sums is that of float64."""
    margins = margins_for(batch)
    weight = rng.standard_normal((2, len(batch.x.rows)))
    _, _, of_x, of_r = pair_sums(batch, formula, margins, weight)
    dtype = batch.x.dtype
    options: dict[str, Any] = {"weight": weight, "merged": True}
    ours = decode(batch.pair_sum(formula, margins, **options)[2], dtype)
    if batch.alone:
        near(ours, (of_x + of_r).sum(0), dtype)
    else:
        near(ours, of_x.sum(0), dtype)
        ours = decode(batch.pair_sum(formula, margins, swapped=True, **options)[2], dtype)
        near(ours, of_r.sum(0), dtype)


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", WIDE)
def test_pair_sum(dtype: str, distance: str, formula: str) -> None:
    rng = np.random.default_rng(9)
    check_pair_sum(slabs(rng, dtype, distance, 37, None, 11, 16), formula)
    check_pair_sum(slabs(rng, dtype, distance, 11, 33, 11, 8), formula)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_pair_sum_backward(dtype: str, distance: str) -> None:
    rng = np.random.default_rng(10)
    check_backward(slabs(rng, dtype, distance, 35, None, 11, 16), "hinge", rng)
    check_backward(slabs(rng, dtype, distance, 9, 34, 11, 8), "squared_hinge", rng)


@pytest.mark.parametrize("classes", [1, 10**6])
@pytest.mark.parametrize(("n", "d"), [(1, 3), (2, 1), (5, 257)])
def test_pair_sum_sizes(n: int, d: int, classes: int) -> None:
    rng = np.random.default_rng(11)
    batch = slabs(rng, "float32", "sqeuclidean", n, None, d, 128, classes)
    if n > 1:
        check_pair_sum(batch, "hinge")
        return
    sums, counts, grad = batch.pair_sum("hinge", (0.0, 1.0))
    assert not sums.any() and not counts.any() and not grad.any()


def test_pair_sum_of_many_references() -> None:
    rng = np.random.default_rng(16)
    # As many as the marks of a row take several rounds; whole numbers make the sums exact.
    x = Operand(np.array([[4096.0], [1.0]]), np.array([0, 1]), "float32")
    m = 8300
    r = np.where(rng.random((m, 1)) < 0.01, 4096, 0) + rng.integers(-3, 4, (m, 1))
    batch = Slabs(x, Operand(r, rng.integers(0, 2, m), "float32"), "sqeuclidean", 2)
    margins = (4.5, 20.5)
    sums, counts, of_x, _ = pair_sums(batch, "hinge", margins, np.ones((2, 2)))
    ours = batch.pair_sum("hinge", margins)
    np.testing.assert_allclose(ours[0], sums, rtol=1e-6)
    np.testing.assert_array_equal(ours[1], counts)
    np.testing.assert_allclose(ours[2], of_x, rtol=1e-5)


@pytest.mark.parametrize("dtype", WIDE)
def test_near_pairs_by_exact_differences(dtype: str) -> None:
    rng = np.random.default_rng(12)
    # Far from the origin all pairs are near ones; whole numbers make their sums exact.
    x = Operand(4096 + rng.integers(-4, 5, (35, 3)), rng.integers(0, 3, 35), dtype)
    batch = Slabs(x, x, "sqeuclidean", 16)
    margins = (10.5, 60.5)
    sums, counts, of_x, of_r = pair_sums(batch, "hinge", margins, np.ones((2, 35)))
    ours = batch.pair_sum("hinge", margins)
    for a, b in zip(ours, (sums, counts, of_x + of_r), strict=True):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("distance", DISTANCES)
def test_pair_sums_of_rows_that_are_not_finite_are_nan(distance: str) -> None:
    rng = np.random.default_rng(13)
    x = rows_of(rng, 20, 5, distance)
    x[3, 1] = np.nan
    batch = Slabs(*[Operand(x, np.arange(20) // 19, "float32")] * 2, distance, 20)
    sums, counts, grad = batch.pair_sum("hinge", (0.1, 0.5))
    np.testing.assert_array_equal(np.isnan(sums), counts[:2] > 0)
    assert np.isnan(grad).all()
    merged = batch.pair_sum("hinge", (0.1, 0.5), weight=np.ones((2, 20)), merged=True)[2]
    assert np.isnan(merged).all()


def test_order_of_threads_does_not_matter() -> None:
    rng = np.random.default_rng(14)
    batch = slabs(rng, "float32", "euclidean", 40, None, 9, 40)
    for first, second in zip(
        batch.hardest() + batch.pair_sum("hinge", (0.5, 4.0)),
        batch.hardest(seed=1) + batch.pair_sum("hinge", (0.5, 4.0), seed=1),
        strict=True,
    ):
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
    assert plan("slab_finish_plan", 257, True, False)[:2] == [2, 2]
    assert plan("slab_finish_plan", 0, False, True)[:2] == [1, 1]
