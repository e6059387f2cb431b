# SPDX-License-Identifier: Apache-2.0
"""The kernels of nearest_beyond and row_top_k, run by the PTX interpreter."""

import numpy as np
import pytest

from flashmetric.ops.distance import DISTANCES
from flashmetric.ops.labels import KINDS
from pair_kernels import DTYPES
from row_oracle import LoopPairs
from select_kernels import DistanceSlabs, as_torch, make_slabs
from slab_kernels import Operand


def expected_order(d: np.ndarray, farthest: bool) -> list[list[int]]:
    """Candidates of each row from the nearest (farthest) on; NaN is none."""
    keys = -d if farthest else d
    return [
        [int(j) for j in np.argsort(row, kind="stable") if not np.isnan(row[j])] for row in keys
    ]


def check_top_k(slabs: DistanceSlabs, farthest: bool, k: int) -> None:
    """By the distances that the kernels found."""
    d = slabs.all_distances()
    wanted = [(order + [-1] * k)[:k] for order in expected_order(d, farthest)]
    np.testing.assert_array_equal(slabs.row_top_k(farthest, k), np.reshape(wanted, (len(d), k)))


def check_nearest(slabs: DistanceSlabs, farthest: bool, thresholds: np.ndarray) -> None:
    """By the distances that the kernels found."""
    d = slabs.all_distances()
    wanted = np.full(thresholds.shape, -1)
    for i, order in enumerate(expected_order(d, farthest)):
        for k, t in enumerate(thresholds[i]):
            beyond = [j for j in order if (d[i, j] < t if farthest else d[i, j] > t)]
            wanted[i, k] = beyond[0] if beyond else -1
    np.testing.assert_array_equal(slabs.nearest_beyond(farthest, thresholds), wanted)


def thresholds_of(rng: np.random.Generator, slabs: DistanceSlabs, count: int) -> np.ndarray:
    """Distances themselves, numbers between them, infinities and NaN, in no order."""
    d = slabs.all_distances()
    low, high = np.nanmin(d, initial=0), np.nanmax(d, initial=1)
    t = rng.uniform(low, high, (len(d), count)).astype(d.dtype)
    t[:, ::3] = np.nan_to_num(d[:, : (count + 2) // 3], nan=float(high))
    if count > 4:
        t[:, 1], t[:, 2], t[:, 4] = -np.inf, np.inf, np.nan
    return np.ascontiguousarray(t)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("m", [None, 300])
def test_distances_of_slabs(distance: str, m: int | None) -> None:
    rng = np.random.default_rng(1)
    for dtype in DTYPES:
        for kind, name in enumerate(KINDS):
            slabs = make_slabs(rng, distance, 7, m, 5, 4, dtype=dtype, kind=name)
            pairs = LoopPairs(*as_torch(slabs))
            mask = np.array([[k == kind for k in row] for row in pairs.kind])
            d, ours = np.array(pairs.d), slabs.all_distances()
            np.testing.assert_array_equal(np.isnan(ours), ~mask)
            tolerance = 1e-12 if dtype == "float64" else 2e-5
            np.testing.assert_allclose(ours[mask], d[mask], rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("farthest", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_selection(dtype: str, farthest: bool) -> None:
    rng = np.random.default_rng(2)
    for m, kind in ((None, "positive"), (270, "negative")):
        slabs = make_slabs(rng, "euclidean", 5, m, 3, 3, dtype=dtype, kind=kind)
        for k in (1, 3, 9):
            check_top_k(slabs, farthest, k)
        for count in (1, 5, 34):
            check_nearest(slabs, farthest, thresholds_of(rng, slabs, min(count, 3 * (m or 5))))


@pytest.mark.parametrize("farthest", [False, True])
def test_ties_go_to_the_lowest_index(farthest: bool) -> None:
    rng = np.random.default_rng(3)
    x = Operand(rng.integers(-1, 2, (4, 2)), np.arange(4) % 2, "float32")
    r = Operand(rng.integers(-1, 2, (280, 2)), rng.integers(0, 2, 280), "float32")
    slabs = DistanceSlabs(x, r, "equal", "sqeuclidean", "negative", 4)
    check_top_k(slabs, farthest, 290)
    check_nearest(slabs, farthest, np.tile(np.array([[0, 1, 2, 5]], np.float32), (4, 1)))


@pytest.mark.parametrize("farthest", [False, True])
def test_rows_that_are_not_finite_make_all_distances_equal(farthest: bool) -> None:
    rng = np.random.default_rng(4)
    values, labels = rng.standard_normal((9, 3)), np.arange(9) % 3
    values[5, 0] = np.inf
    x = Operand(values, labels, "float32")
    slabs = DistanceSlabs(x, x, "equal", "euclidean", "positive", 9)
    same = (labels[:, None] == labels) & ~np.eye(9, dtype=bool)
    wanted = [[*np.flatnonzero(row), -1] for row in same]
    np.testing.assert_array_equal(slabs.row_top_k(farthest, 3), wanted)
    limits = np.tile(np.array([[np.inf, -np.inf, np.nan]], np.float32), (9, 1))
    first = np.array(wanted)[:, :1].repeat(3, axis=1)
    np.testing.assert_array_equal(slabs.nearest_beyond(farthest, limits), first)


def test_nothing_to_find() -> None:
    rng = np.random.default_rng(5)
    x = Operand(rng.standard_normal((2, 3)), np.array([1, -(2**63)]), "float32")
    r = Operand(np.zeros((1, 3)), np.ones(1), "float32")
    slabs = DistanceSlabs(x, r, "equal", "euclidean", "negative", 2)
    assert (slabs.row_top_k(False, 2) == -1).all()
    assert (slabs.nearest_beyond(True, np.zeros((2, 1), np.float32)) == -1).all()
