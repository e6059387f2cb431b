# SPDX-License-Identifier: Apache-2.0
"""The kernels of threshold_sum, run by the PTX interpreter, against loops over Python floats."""

import numpy as np
import pytest
import torch

from flashmetric.ops.distance import DISTANCES
from flashmetric.ops.labels import KINDS, RULES
from pair_kernels import DTYPES, decode
from row_oracle import LoopPairs, loop_threshold_sum
from select_kernels import DistanceSlabs, as_torch, make_slabs
from slab_kernels import Operand

FORMULAS = ("hinge", "squared_hinge", "softplus", "squared_sigmoid")


def make_thresholds(
    rng: np.random.Generator, slabs: DistanceSlabs, count: int, rows: int | None = None
) -> np.ndarray:
    """Ascending thresholds among the distances, away from each of them; one of padding."""
    d = np.array(LoopPairs(*as_torch(slabs)).d)
    low, high = d.min(initial=0) - 0.1, d.max(initial=1) + 0.1
    n = len(d) if rows is None else rows
    thresholds = np.sort(rng.uniform(low, high, (n, count)), axis=1)
    # Counts are compared exactly: no threshold where rounding decides.
    gaps = np.abs(thresholds[:, :, None] - d.ravel()).min(2, initial=np.inf)
    thresholds[gaps < 1e-4 * (high - low)] += 3e-4 * (high - low)
    thresholds.sort(axis=1)
    if count > 2:
        thresholds[::2, 0] = -np.inf
    return thresholds


def close(ours: np.ndarray, expected: np.ndarray, dtype: str, *, rounded: bool = False) -> None:
    """Up to the rounding of distances, and (``rounded``) of the result to the rows' dtype."""
    tolerance = 1e-11 if dtype == "float64" else 2e-5
    if rounded:
        tolerance = max(tolerance, 2 * DTYPES[dtype][2])
    scale = np.abs(expected).max(initial=1e-3)
    np.testing.assert_allclose(ours, expected, rtol=tolerance, atol=tolerance * scale)


def check(slabs: DistanceSlabs, formula: str, thresholds: np.ndarray) -> None:
    """Sums, counts, slopes and gradients."""
    dtype = slabs.x.dtype
    rng = np.random.default_rng(99)
    grad = rng.standard_normal((len(slabs.x.rows), thresholds.shape[1]))
    sums, counts, slopes, of_x, of_r = loop_threshold_sum(
        LoopPairs(*as_torch(slabs)),
        KINDS.index(slabs.kind),
        formula,
        torch.from_numpy(thresholds),
        torch.from_numpy(grad),
    )
    ours = slabs.threshold_sum(formula, thresholds)
    np.testing.assert_array_equal(ours[1], counts.numpy())
    close(ours[0], sums.numpy(), dtype)
    close(ours[2], slopes.numpy(), dtype)
    grad_x, grad_r = slabs.threshold_sum_backward(grad, formula, thresholds)
    close(decode(grad_x, dtype), of_x.numpy(), dtype, rounded=True)
    if grad_r is not None:
        close(decode(grad_r, dtype), of_r.numpy(), dtype, rounded=True)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("m", [None, 11])
def test_distances(distance: str, m: int | None) -> None:
    rng = np.random.default_rng(1)
    for dtype in ("float32", "float64"):
        slabs = make_slabs(rng, distance, 9, m, 5, 5, dtype=dtype)
        check(slabs, "hinge", make_thresholds(rng, slabs, 4))
        check(slabs, "softplus", make_thresholds(rng, slabs, 3, rows=1))


@pytest.mark.parametrize("formula", FORMULAS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_dtypes_and_formulas(dtype: str, formula: str) -> None:
    rng = np.random.default_rng(2)
    slabs = make_slabs(rng, "euclidean", 8, None, 6, 8, dtype=dtype, kind="positive")
    check(slabs, formula, make_thresholds(rng, slabs, 3))


@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str) -> None:
    rng = np.random.default_rng(3)
    for kind in KINDS:
        slabs = make_slabs(rng, "sqeuclidean", 9, 8, 3, 9, rule=rule, kind=kind)
        check(slabs, "hinge", make_thresholds(rng, slabs, 2))


@pytest.mark.parametrize(("count", "m"), [(0, 7), (1, 7), (33, 300), (70, 7), (300, 300)])
def test_numbers_of_thresholds(count: int, m: int) -> None:
    rng = np.random.default_rng(4)
    slabs = make_slabs(rng, "euclidean", 3, m, 2, 3)
    thresholds = make_thresholds(rng, slabs, count)
    thresholds[:, : count // 3] = -np.inf
    check(slabs, "hinge", thresholds)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_more_distances_than_are_sorted_at_a_time(dtype: str) -> None:
    rng = np.random.default_rng(5)
    slabs = make_slabs(rng, "sqeuclidean", 2, 2300, 1, 2, dtype=dtype)
    d = slabs.all_distances()
    thresholds = np.sort(rng.uniform(0, 9, (1, 66)), axis=1)
    sums, counts, slopes = slabs.threshold_sum("hinge", thresholds)
    z = np.where(np.isnan(d), -1, thresholds[0][:, None, None] - d.astype(np.float64))
    np.testing.assert_array_equal(counts, (z > 0).sum(2).T)
    np.testing.assert_array_equal(slopes, counts)
    np.testing.assert_allclose(sums, np.maximum(z, 0).sum(2).T, rtol=1e-12)


def test_more_features_than_a_block_has_threads() -> None:
    rng = np.random.default_rng(6)
    for distance in ("euclidean", "cityblock"):
        slabs = make_slabs(rng, distance, 5, 6, 270, 5)
        check(slabs, "hinge", make_thresholds(rng, slabs, 2))


@pytest.mark.parametrize("count", [3, 70])
def test_thresholds_at_distances_are_not_above_them(count: int) -> None:
    x = np.arange(6.0)[:, None]
    operand = Operand(x, np.arange(6), "float32")
    slabs = DistanceSlabs(operand, operand, "equal", "cityblock", "negative", 6)
    thresholds = np.arange(1, count + 1, dtype=np.float64)[None]
    d = np.abs(x - x.T)[:, :, None] + np.where(np.eye(6, dtype=bool), np.inf, 0)[:, :, None]
    _, counts, _ = slabs.threshold_sum("hinge", thresholds)
    np.testing.assert_array_equal(counts, (thresholds > d).sum(1))
    # A float64 threshold between two numbers of float32.
    _, counts, _ = slabs.threshold_sum("hinge", thresholds + 1e-9)
    np.testing.assert_array_equal(counts, (thresholds + 1e-9 > d).sum(1))


def test_collapsed_rows_are_measured_by_exact_differences() -> None:
    rng = np.random.default_rng(10)
    rows = 100 + rng.integers(-8, 9, (7, 40)) / 1024
    operand = Operand(rows, np.arange(7) % 2, "float32")
    slabs = DistanceSlabs(operand, operand, "equal", "euclidean", "negative", 7)
    check(slabs, "softplus", make_thresholds(rng, slabs, 2))
    d, all_d = slabs.all_distances(), np.array(LoopPairs(*as_torch(slabs)).d)
    np.testing.assert_allclose(d[~np.isnan(d)], all_d[~np.isnan(d)], rtol=1e-6)


@pytest.mark.parametrize("count", [3, 70])
def test_rows_that_are_not_finite_poison_all(count: int) -> None:
    rng = np.random.default_rng(8)
    for m in (None, 7):
        slabs = make_slabs(rng, "euclidean", 7, m, 3, 4)
        slabs.r.values[3, 1] = np.nan
        slabs.r.labels[1] = 77  # positives of none
        r = Operand(slabs.r.values, slabs.r.labels, "float32")
        slabs = DistanceSlabs(r if m is None else slabs.x, r, "equal", "euclidean", "positive", 4)
        thresholds = np.sort(rng.uniform(0, 3, (7, count)), axis=1)
        thresholds[:, 0] = -np.inf
        sums, _, slopes = slabs.threshold_sum("hinge", thresholds)
        seen = ~np.isnan(slabs.all_distances()).all(1)
        assert seen.any() and not seen.all()
        expected = seen[:, None] & (thresholds > -np.inf)
        np.testing.assert_array_equal(np.isnan(sums), expected)
        np.testing.assert_array_equal(np.isnan(slopes), expected)
        np.testing.assert_array_equal(sums[~expected], 0)
        grad = np.ones((7, count))
        for gradient in slabs.threshold_sum_backward(grad, "hinge", thresholds):
            assert gradient is None or np.isnan(gradient).all()


@pytest.mark.parametrize("formula", ["hinge", "softplus"])
@pytest.mark.parametrize("count", [3, 70])
def test_thresholds_that_are_nan(count: int, formula: str) -> None:
    rng = np.random.default_rng(11)
    slabs = make_slabs(rng, "euclidean", 6, 7, 3, 4)
    thresholds = make_thresholds(rng, slabs, count)
    expected = slabs.threshold_sum(formula, thresholds)
    seen = ~np.isnan(slabs.all_distances()).all(1)
    assert seen.sum() > 3
    nan = thresholds.copy()
    nan[1:, -1] = np.nan
    for place, (ours, theirs) in enumerate(
        zip(slabs.threshold_sum(formula, nan), expected, strict=True)
    ):
        np.testing.assert_array_equal(ours[0], theirs[0])
        np.testing.assert_array_equal(ours[1:, :-1], theirs[1:, :-1])
        if place == 1:
            assert not ours[1:, -1].any()
        else:
            np.testing.assert_array_equal(np.isnan(ours[1:, -1]), seen[1:])
    grad = np.ones(nan.shape)
    of_x, _ = slabs.threshold_sum_backward(grad, formula, nan)
    np.testing.assert_array_equal(np.isnan(of_x).all(1)[1:], seen[1:])
    grad[:, -1] = 0
    of_x, _ = slabs.threshold_sum_backward(grad, formula, nan)
    assert np.isfinite(of_x).all()


def test_order_of_blocks_does_not_matter() -> None:
    rng = np.random.default_rng(9)
    slabs = make_slabs(rng, "euclidean", 4, 200, 3, 4)
    thresholds = make_thresholds(rng, slabs, 70)
    first = slabs.threshold_sum("hinge", thresholds)
    slabs.seed = 5
    for a, b in zip(first, slabs.threshold_sum("hinge", thresholds), strict=True):
        assert a.tobytes() == b.tobytes()
