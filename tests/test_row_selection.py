# SPDX-License-Identifier: Apache-2.0
"""Sums below thresholds, and selection by distance, against loops over plain Python floats."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmetric.ops import ThresholdSum
from helpers import DTYPES
from row_batches import (
    KINDS,
    ROW_DISTANCES,
    RULES,
    THRESHOLD_FORMULAS,
    Pairs,
    assert_matches,
    make_batch,
    make_thresholds,
)
from row_oracle import LoopPairs, loop_nearest_beyond, loop_row_top_k, loop_threshold_sum

OPS = torch.ops.flashmetric
SIDES = [None, 11]

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check_threshold_sum(batch: Pairs, kind: str, formula: str, thresholds: Tensor) -> None:
    """All outputs of ``threshold_sum`` and of its backward op."""
    x, what = batch[0], (kind, formula)
    grad = torch.randn(len(x), thresholds.shape[1], dtype=torch.float64, device=x.device)
    sums, counts, slopes, grad_x, grad_r = loop_threshold_sum(
        LoopPairs(*batch), KINDS.index(kind), formula, thresholds, grad
    )
    ours = OPS.threshold_sum(*batch, *what, thresholds)
    assert [out.dtype for out in ours] == [torch.float64, torch.int64, torch.float64]
    assert_matches(ours[0], sums, x.dtype, ("sums", *what))
    assert ours[1].tolist() == counts.tolist(), what
    assert_matches(ours[2], slopes, x.dtype, ("slopes", *what))
    ours = OPS.threshold_sum_backward(grad, *batch, *what, thresholds, True)
    assert_matches(ours[0], grad_x, x.dtype, ("grad_query", *what), rounded=True)
    assert_matches(ours[1], grad_r, x.dtype, ("grad_ref", *what), rounded=True)


def check_selection(loops: LoopPairs, kind: int, ours: Tensor, expected: Tensor) -> None:
    """Pairs of that kind, at the distances of the expected ones up to rounding."""
    assert ours.dtype == torch.int64 and ours.shape == expected.shape
    largest = max((abs(d) for row in loops.d for d in row), default=0.0)
    for i, (got, wanted) in enumerate(zip(ours.tolist(), expected.tolist(), strict=True)):
        for a, b in zip(got, wanted, strict=True):
            if a == b:
                continue
            assert a >= 0 and b >= 0, (i, got, wanted)
            assert loops.kind[i][a] == kind
            assert loops.d[i][a] == pytest.approx(loops.d[i][b], abs=1e-5 * largest), (i, a, b)


def check_all_selections(batch: Pairs) -> None:
    """Both selecting ops, for both kinds and from both ends."""
    loops, n = LoopPairs(*batch), len(batch[0])
    m = len(loops.r)
    for at, kind in enumerate(KINDS):
        for farthest in (False, True):
            limits = make_thresholds(batch, 5, padding=1)[:, torch.randperm(5)]
            limits[::3, 2] = torch.inf
            index = OPS.nearest_beyond(*batch, kind, farthest, limits)
            expected = loop_nearest_beyond(loops, at, farthest, limits)
            check_selection(loops, at, index, expected)
            for k in (0, 1, 3, m + 2):
                index = OPS.row_top_k(*batch, kind, k, farthest)
                check_selection(loops, at, index, loop_row_top_k(loops, at, k, farthest))
                for row in index.tolist():
                    found = [j for j in row if j >= 0]
                    assert len(set(found)) == len(found)
    assert OPS.nearest_beyond(*batch, kind, False, limits[:, :0]).shape == (n, 0)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_threshold_sum(distance: str, m: int | None, kind: str, device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32):
        batch = make_batch(13, m, 5, distance, dtype=dtype, device=device)
        for formula in THRESHOLD_FORMULAS:
            check_threshold_sum(batch, kind, formula, make_thresholds(batch, 4, padding=4))
            check_threshold_sum(batch, kind, formula, make_thresholds(batch, 3, rows=1))


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("rule", RULES)
def test_rules(rule: str, m: int | None, device: torch.device) -> None:
    batch = make_batch(14, m, 3, rule=rule, device=device)
    for kind in KINDS:
        check_threshold_sum(batch, kind, "hinge", make_thresholds(batch, 3))
    check_all_selections(batch)


@pytest.mark.parametrize("formula", THRESHOLD_FORMULAS)
@pytest.mark.parametrize("k", [0, 1, 2, 17, 150])
def test_numbers_of_thresholds(k: int, formula: str, device: torch.device) -> None:
    for m in (None, 12):
        batch = make_batch(10, m, 4, device=device, dtype=torch.float32)
        check_threshold_sum(batch, "negative", formula, make_thresholds(batch, k, padding=k // 2))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "columns", "slice"])
@pytest.mark.parametrize("m", SIDES)
def test_dtypes_and_strides(
    m: int | None, strides: str, dtype: torch.dtype, device: torch.device
) -> None:
    for distance in ("euclidean", "angular", "dot", "chi2"):
        batch = make_batch(13, m, 6, distance, dtype=dtype, device=device, strides=strides)
        for formula in ("hinge", "softplus"):
            check_threshold_sum(batch, "negative", formula, make_thresholds(batch, 6, padding=1))
        check_all_selections(batch)


@pytest.mark.parametrize("m", [None, 131])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_more_rows_than_a_tile(distance: str, m: int | None, device: torch.device) -> None:
    batch = make_batch(67, m, 18, distance, dtype=torch.float32, classes=7, device=device)
    top = {"euclidean": 9.0, "sqeuclidean": 60.0, "cityblock": 30.0, "chi2": 14.0}.get(distance)
    for kind in KINDS:
        thresholds = make_thresholds(batch, 12, padding=3, top=top)
        check_threshold_sum(batch, kind, "hinge", thresholds)
        check_threshold_sum(batch, kind, "squared_sigmoid", thresholds[:, -2:].contiguous())
    check_all_selections(batch)


def grid_batch(m: int | None, dtype: torch.dtype, distance: str, device: torch.device) -> Pairs:
    """Rows of small whole numbers, with mean 0: all arithmetic is exact, and many pairs tie."""
    rows = torch.randint(-2, 3, (20 if m is None else m, 3))
    rows = torch.cat((rows, -rows)).to(dtype).to(device)
    labels = torch.randint(2, (len(rows),), device=device)
    if m is None:
        return rows, labels, None, None, "equal", distance
    x = torch.randint(-2, 3, (9, 3)).to(dtype).to(device)
    return x, torch.randint(2, (9,), device=device), rows, labels, "equal", distance


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("m", [None, 25])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "dot", "cityblock"])
def test_ties_and_exact_thresholds(
    distance: str, m: int | None, dtype: torch.dtype, device: torch.device
) -> None:
    batch = grid_batch(m, dtype, distance, device)
    loops, n = LoopPairs(*batch), len(batch[0])
    limits = [-math.inf, 0.0, 1.0, 2.0, 3.0, 4.0, 6.0, math.inf]
    if distance == "dot":
        limits = [-math.inf, -4.0, -1.0, 0.0, 1.0, 3.0, 4.0, math.inf]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    t = torch.tensor(limits, dtype=wide, device=device).repeat(n, 1)
    for at, kind in enumerate(KINDS):
        for farthest in (False, True):
            index = OPS.nearest_beyond(*batch, kind, farthest, t)
            assert index.tolist() == loop_nearest_beyond(loops, at, farthest, t).tolist()
            index = OPS.row_top_k(*batch, kind, 9, farthest)
            assert index.tolist() == loop_row_top_k(loops, at, 9, farthest).tolist()
        check_threshold_sum(batch, kind, "hinge", t[:, :-1].contiguous())
        check_threshold_sum(batch, kind, "squared_hinge", t[:1, :-1].contiguous())


@pytest.mark.parametrize("distance", ["cosine", "angular", "sqrt_cosine"])
def test_zero_rows_are_at_one_distance_from_all(distance: str, device: torch.device) -> None:
    x = torch.nn.functional.normalize(torch.randn(9, 4, device=device))
    x[::2] = 0
    labels = torch.zeros(9, dtype=torch.int64, device=device)
    index = OPS.row_top_k(x, labels, None, None, "equal", distance, "positive", 8, False)
    assert index[::2].tolist() == [[j for j in range(9) if j != i] for i in range(0, 9, 2)]


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("formula", THRESHOLD_FORMULAS)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_gradcheck(distance: str, formula: str, m: int | None, device: torch.device) -> None:
    x, labels, r, ref_labels, *names = make_batch(6, m, 3, distance, device=device, classes=2)
    rows = [leaf.requires_grad_() for leaf in (x, r) if leaf is not None]
    for shared in (False, True):
        thresholds = make_thresholds(
            (x, labels, r, ref_labels, *names), 3, rows=1 if shared else None
        ).requires_grad_()

        def values(*leaves: Tensor) -> Tensor:
            x, *refs, t = leaves
            padded = torch.cat((t.new_full((t.shape[0], 1), -torch.inf), t), 1)
            pairs = (x, labels, *(refs or [None]), ref_labels, *names)
            sums, counts = ThresholdSum.apply(*pairs, "negative", formula, padded)
            assert not counts.requires_grad
            return sums

        assert torch.autograd.gradcheck(values, (*rows, thresholds))


def test_only_wanted_gradients(device: torch.device) -> None:
    batch = make_batch(9, 10, 3, device=device)
    x, labels, r, ref_labels, *names = batch
    leaves: tuple[Any, ...] = (x, r, make_thresholds(batch, 2, rows=1))
    grads = []
    for wanted in (range(3), [0], [1], [2]):
        a, b, t = (leaf.detach().requires_grad_(at in wanted) for at, leaf in enumerate(leaves))
        sums, _ = ThresholdSum.apply(a, labels, b, ref_labels, *names, "positive", "softplus", t)
        sums.sum().backward()
        grads.append([leaf.grad for leaf in (a, b, t)])
    for at in range(3):
        torch.testing.assert_close(grads[1 + at][at], grads[0][at])
        assert all(grads[1 + at][other] is None for other in range(3) if other != at)
