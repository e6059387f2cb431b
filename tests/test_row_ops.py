# SPDX-License-Identifier: Apache-2.0
"""Row sums and row log-sum-exps against loops over plain Python floats, and their gradients."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmetric.ops import RowLse, RowSum, RowTotal
from helpers import DTYPES
from row_batches import (
    FORMULAS,
    ROW_DISTANCES,
    RULES,
    Pairs,
    accumulated,
    assert_matches,
    make_batch,
    make_parameters,
)
from row_oracle import LoopPairs, loop_row_lse, loop_row_sum

OPS = torch.ops.flashmetric
SIDES = [None, 11]
# Every formula once for each kind.
FORMULA_PAIRS = list(zip(FORMULAS, FORMULAS[3:] + FORMULAS[:3], strict=True))

pytestmark = pytest.mark.usefixtures("poisoned_empty")


def check_row_sum(batch: Pairs, formulas: tuple[str, str], *parameters: Tensor | None) -> None:
    """All outputs of ``row_sum`` and of its backward op."""
    x, _, r, *_ = batch
    dtype, kind = x.dtype, accumulated(x.dtype)
    grad = torch.randn(2, len(x), dtype=torch.float64).to(kind).to(x.device)
    loops = LoopPairs(*batch)
    sums, counts, slopes, total_x, total_r, grad_x, grad_r = loop_row_sum(
        loops, formulas, *parameters, grad
    )
    ours = OPS.row_sum(*batch, *formulas, *parameters, True, True)
    assert [out.dtype for out in ours] == [kind, torch.int64, kind, kind, kind]
    assert_matches(ours[0], sums, dtype, ("sums", formulas))
    assert ours[1].tolist() == counts.tolist(), formulas
    assert_matches(ours[2], slopes, dtype, ("slopes", formulas))
    assert_matches(ours[3], total_x, dtype, ("total in query", formulas))
    assert_matches(ours[4], total_r, dtype, ("total in ref", formulas))
    alone = OPS.row_sum(*batch, *formulas, *parameters, False, True)
    assert_matches(alone[0], sums, dtype, ("sums alone", formulas))
    assert alone[1].tolist() == counts.tolist()
    assert_matches(alone[2], slopes, dtype, ("slopes alone", formulas))
    d = x.shape[1]
    assert alone[3].shape == (2, 0, d) and alone[4].shape == (2, 0, d)

    ours = OPS.row_sum_backward(grad, *batch, *formulas, *parameters, True)
    assert_matches(ours[0], grad_x, dtype, ("grad_query", formulas), rounded=True)
    assert_matches(ours[1], grad_r, dtype, ("grad_ref", formulas), rounded=True)


def check_row_lse(
    batch: Pairs,
    forms: tuple[str, str],
    *parameters: Tensor | None,
    shape: float = 0.0,
    columns: bool = False,
) -> None:
    """All outputs of ``row_lse`` and of its backward op."""
    x, _, r, *_ = batch
    dtype, kind = x.dtype, accumulated(x.dtype)
    grad = torch.randn(2, len(x), dtype=torch.float64).to(kind).to(x.device)
    ref_grad = None
    if columns:
        assert r is not None
        ref_grad = torch.randn(2, len(r), dtype=torch.float64).to(kind).to(x.device)
    *statistics, grad_x, grad_r = loop_row_lse(
        LoopPairs(*batch), forms, *parameters, shape, grad, ref_grad
    )
    ours = OPS.row_lse(*batch, *forms, *parameters, shape, columns)
    assert [out.dtype for out in ours] == [kind, kind, torch.int64] * 2
    if not columns:
        assert [out.shape for out in ours[3:]] == [(2, 0)] * 3
    checked = zip(ours[: 6 if columns else 3], statistics, strict=False)
    for at, (got, expected) in enumerate(checked):
        if got.dtype == torch.int64:
            assert got.tolist() == expected.tolist(), (at, forms)
        else:
            assert_matches(got, expected, dtype, (at, forms))
    saved = (grad, ours[0], ref_grad, ours[3] if columns else None)
    ours = OPS.row_lse_backward(*saved, *batch, *forms, *parameters, shape, True)
    assert_matches(ours[0], grad_x, dtype, ("grad_query", forms), rounded=True)
    assert_matches(ours[1], grad_r, dtype, ("grad_ref", forms), rounded=True)


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_row_sum(distance: str, m: int | None, device: torch.device) -> None:
    for dtype in (torch.float64, torch.float32):
        batch = make_batch(13, m, 5, distance, dtype=dtype, device=device)
        for at, formulas in enumerate(FORMULA_PAIRS):
            check_row_sum(batch, formulas, *make_parameters(batch, by_row=at % 2 == 1))


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("rule", RULES)
def test_row_sum_rules(rule: str, m: int | None, device: torch.device) -> None:
    for by_row in (False, True):
        batch = make_batch(14, m, 3, rule=rule, device=device)
        check_row_sum(batch, ("linear", "softplus"), *make_parameters(batch, by_row=by_row))


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_row_sum_within_bounds(distance: str, m: int | None, device: torch.device) -> None:
    batch = make_batch(13, m, 5, distance, device=device)
    for by_row in (False, True):
        parameters = make_parameters(batch, by_row=by_row, bounded=True)
        check_row_sum(batch, ("square", "linear"), *parameters)


def test_bounds_are_strict(device: torch.device) -> None:
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [-2.0]], device=device)
    labels = torch.tensor([0, 0, 0, 1, 1], device=device)
    one, zero = x.new_ones(2, 1), x.new_zeros(2, 1)
    terms = ("linear", "linear", one, zero)
    for low, high, kept in (
        (1.0, 2.0, [0, 0]),
        (0.75, 2.25, [2, 2]),
        (-math.inf, math.inf, [2, 2]),
    ):
        bound = x.new_tensor([[low], [high]]).repeat(1, 5)
        _, counts, *_ = OPS.row_sum(
            x, labels, None, None, "equal", "euclidean", *terms, bound, True
        )
        assert counts[:2, 0].tolist() == kept
        forms = ("affine", "affine", one, zero)
        lse, _, counts, *_ = OPS.row_lse(
            x, labels, None, None, "equal", "euclidean", *forms, bound, 0.0, False
        )
        assert counts[:, 0].tolist() == kept
        assert lse[:, 0].isneginf().tolist() == [count == 0 for count in kept]


def test_words_that_differ_anywhere_are_different_labels(device: torch.device) -> None:
    batch = make_batch(12, None, 3, device=device)
    labels = torch.randint(2, (12, 3), device=device)
    x, _, *rest = batch
    check_row_sum((x, labels, *rest), ("linear", "linear"), *make_parameters(batch, by_row=False))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("strides", ["contiguous", "columns", "slice"])
@pytest.mark.parametrize("m", SIDES)
def test_dtypes_and_strides(
    m: int | None, strides: str, dtype: torch.dtype, device: torch.device
) -> None:
    for distance in ("euclidean", "angular", "dot", "chi2"):
        batch = make_batch(13, m, 6, distance, dtype=dtype, device=device, strides=strides)
        parameters = make_parameters(batch, by_row=True)
        check_row_sum(batch, ("softplus", "squared_hinge"), *parameters)
        check_row_lse(batch, ("affine", "circle"), *parameters, shape=0.3)


@pytest.mark.parametrize("m", [None, 131])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_more_rows_than_a_tile(distance: str, m: int | None, device: torch.device) -> None:
    batch = make_batch(67, m, 18, distance, dtype=torch.float32, classes=7, device=device)
    parameters = make_parameters(batch, by_row=True)
    check_row_sum(batch, ("softplus", "hinge"), *parameters)
    check_row_lse(batch, ("affine", "affine"), *parameters)


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_row_lse(distance: str, m: int | None, device: torch.device) -> None:
    forms = [("affine", "affine"), ("circle", "circle"), ("affine", "none"), ("none", "circle")]
    for dtype in (torch.float64, torch.float32):
        batch = make_batch(13, m, 5, distance, dtype=dtype, device=device)
        for at, pair in enumerate(forms):
            parameters = make_parameters(batch, by_row=at % 2 == 0)
            check_row_lse(batch, pair, *parameters, shape=0.25)
        check_row_lse(batch, forms[0], *make_parameters(batch, by_row=True, bounded=True))
        if m is not None:
            for pair in forms:
                parameters = make_parameters(batch, by_row=False)
                check_row_lse(batch, pair, *parameters, shape=0.4, columns=True)


@pytest.mark.parametrize("m", SIDES)
@pytest.mark.parametrize("rule", RULES)
def test_row_lse_rules(rule: str, m: int | None, device: torch.device) -> None:
    batch = make_batch(14, m, 3, rule=rule, device=device)
    parameters = make_parameters(batch, by_row=False)
    check_row_lse(batch, ("affine", "affine"), *parameters, columns=m is not None)


@pytest.mark.parametrize("m", SIDES)
def test_large_logits(m: int | None, device: torch.device) -> None:
    batch = make_batch(13, m, 5, "sqeuclidean", device=device)
    scale = batch[0].new_tensor([[200.0], [-300.0]])
    offset = batch[0].new_tensor([[-1e4], [3e3]])
    check_row_lse(batch, ("affine", "affine"), scale, offset, None, columns=m is not None)


def test_gradients_of_opposite_rows_are_finite(device: torch.device) -> None:
    # Their angle is pi, where the slope of the arc sine is infinite.
    for dtype in (torch.float64, torch.float32):
        x = torch.eye(3, dtype=dtype, device=device)
        x = torch.cat((x, -x))
        labels = torch.arange(6, device=device) % 2
        batch = (x, labels, None, None, "equal", "angular")
        check_row_sum(batch, ("linear", "linear"), *make_parameters(batch, by_row=False))


def gradcheck_batch(
    m: int | None, distance: str, device: torch.device, rule: str = "equal"
) -> tuple[Tensor, Tensor | None, tuple[Any, ...]]:
    batch = make_batch(6, m, 3, distance, rule=rule, device=device, classes=2)
    x, labels, r, ref_labels, *names = batch
    # No distance of exactly 0 and no equal features: those have no derivative.
    return (
        x.requires_grad_(),
        None if r is None else r.requires_grad_(),
        (labels, ref_labels, *names),
    )


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize(
    "distance, formulas",
    [(distance, ("square", "softplus")) for distance in ROW_DISTANCES]
    + [("sqeuclidean", formulas) for formulas in FORMULA_PAIRS],
)
def test_gradcheck_row_sum(
    distance: str, formulas: tuple[str, str], m: int | None, device: torch.device
) -> None:
    x, r, (labels, ref_labels, *names) = gradcheck_batch(m, distance, device)
    batch = (x, labels, r, ref_labels, *names)
    for by_row in (False, True):
        scale, offset, _ = make_parameters(batch, by_row=by_row)
        scale, offset = (0.4 * scale).requires_grad_(), offset.requires_grad_()
        inputs = tuple(leaf for leaf in (x, r, scale, offset) if leaf is not None)
        for flags in ((), (True, True)):
            function = RowTotal if flags else RowSum

            def values(*leaves: Tensor, flags: Any = flags, function: Any = function) -> Tensor:
                x, *refs, scale, offset = leaves
                pairs = (x, labels, *(refs or [None]), ref_labels, *names)
                sums, counts = function.apply(*pairs, *formulas, scale, offset, None, *flags)
                assert not counts.requires_grad
                return sums

            assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("m", [None, 5])
@pytest.mark.parametrize("distance", ROW_DISTANCES)
def test_gradcheck_row_lse(distance: str, m: int | None, device: torch.device) -> None:
    x, r, (labels, ref_labels, *names) = gradcheck_batch(m, distance, device)
    for by_row, columns in ((False, m is not None), (True, False)):
        scale, offset, _ = make_parameters((x, labels, r, ref_labels, *names), by_row=by_row)
        inputs = (x, r, scale.requires_grad_(), offset.requires_grad_())
        inputs = tuple(leaf for leaf in inputs if leaf is not None)

        def values(*leaves: Tensor, columns: bool = columns) -> tuple[Tensor, ...]:
            x, *refs, scale, offset = leaves
            pairs = (x, labels, *(refs or [None]), ref_labels, *names)
            lse, mean, counts, *by_ref = RowLse.apply(
                *pairs, "affine", "affine", scale, offset, None, 0.0, columns
            )
            assert not (mean.requires_grad or counts.requires_grad or by_ref[1].requires_grad)
            # Rows without a pair are at -inf, for any argument.
            results = [lse[lse.isfinite()]]
            if columns:
                results.append(by_ref[0][by_ref[0].isfinite()])
            return tuple(results)

        assert torch.autograd.gradcheck(values, inputs)


@pytest.mark.parametrize("function", [RowSum, RowTotal, RowLse])
def test_only_wanted_gradients(function: Any, device: torch.device) -> None:
    forms, tail = ("linear", "linear"), ()
    if function is RowTotal:
        tail = (True, True)
    elif function is RowLse:
        forms, tail = ("affine", "affine"), (0.0, True)
    batch = make_batch(9, 10, 3, device=device)
    x, labels, r, ref_labels, *names = batch
    scale, offset, _ = make_parameters(batch, by_row=False)
    leaves = (x, r, scale, offset)
    grads = []
    for wanted in (range(4), *([at] for at in range(4))):
        a, b, c, d = (leaf.detach().requires_grad_(at in wanted) for at, leaf in enumerate(leaves))
        pairs = (a, labels, b, ref_labels, *names)
        values, *_ = function.apply(*pairs, *forms, c, d, None, *tail)
        values[values.isfinite()].sum().backward()
        grads.append([leaf.grad for leaf in (a, b, c, d)])
    for at in range(4):
        torch.testing.assert_close(grads[1 + at][at], grads[0][at])
        assert all(grads[1 + at][other] is None for other in range(4) if other != at)
