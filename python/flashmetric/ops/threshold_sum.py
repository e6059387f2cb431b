# SPDX-License-Identifier: Apache-2.0
"""Sums over the pairs of every row of how far they are below thresholds: one sum per threshold."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import full_precision
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.labels import KINDS
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.row_sum import PAIRS, RowGradients, fake_gradients
from flashmetric.ops.sweep import Batch, Pairs, Slab, sweep
from flashmetric.ops.terms import term

library.define(
    f"threshold_sum({PAIRS}, str kind, str formula, Tensor thresholds)"
    " -> (Tensor sums, Tensor counts, Tensor slopes)"
)
library.define(
    f"threshold_sum_backward(Tensor grad, {PAIRS}, str kind, str formula, Tensor thresholds,"
    " bool ref_grad=True) -> (Tensor grad_query, Tensor grad_ref)"
)


def _candidates(slab: Slab, kind: int) -> Tensor:
    """Distances [rows, M] of the pairs of a kind; all others are infinitely far from a threshold.

    In float64, which the sums are in: comparisons with thresholds remain what they were.
    """
    return slab.d.double().masked_fill(~slab.kinds[kind], torch.inf)


def _in_order(thresholds: Tensor) -> tuple[Tensor, Tensor]:
    """Thresholds with the one before it in place of each NaN, and which were NaN.

    Those in place of NaN keep the others in order; what is found for them is thrown away.
    """
    missing = thresholds.isnan()
    before = thresholds.masked_fill(missing, -torch.inf).cummax(1).values
    return torch.where(missing, before, thresholds), missing


def _hinge_sums(d: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """Sums of max(t - d, 0) and numbers of d below t, of each row for all its thresholds at once.

    One sort and a binary search per threshold, so that no number of thresholds is too large.
    """
    d = d.sort(1).values
    counts = torch.searchsorted(d, t)
    before = torch.nn.functional.pad(d.cumsum(1), (1, 0)).gather(1, counts)
    return (counts * t - before).masked_fill_(counts == 0, 0), counts


def _hinge_weights(d: Tensor, t: Tensor, grad: Tensor) -> Tensor:
    """Sum of ``grad`` over the thresholds above each d."""
    tail = torch.nn.functional.pad(grad.flip(1).cumsum(1).flip(1), (0, 1))
    return tail.gather(1, torch.searchsorted(t, d, right=True))


@full_precision
def threshold_sum_fallback(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    formula: str,
    thresholds: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::threshold_sum``.

    Thresholds, [N, K] or [1, K] for all rows, ascend within a row; -inf in front is padding. For a
    threshold that is NaN, sum and slope of a row that has pairs are NaN and the count is 0; the
    other thresholds of the row are not affected.

    Returns:
        Sums [N, K] of f(threshold - distance) over the pairs of the kind; int64 counts [N, K] of
        those below the threshold; slopes [N, K], the derivatives of the sums in the thresholds.
        Sums and slopes are float64.
    """
    batch, at = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance)), KINDS.index(kind)
    shape = batch.x.shape[0], thresholds.shape[1]
    thresholds, missing = _in_order(thresholds.double().expand(shape))
    sums = batch.x.new_zeros(shape, dtype=torch.float64)
    counts, slopes = sums.new_zeros(shape, dtype=torch.int64), torch.zeros_like(sums)
    seen = torch.zeros((shape[0], 1), dtype=torch.bool, device=query.device)
    for slab in sweep(batch):
        rows, d = slab.rows, _candidates(slab, at)
        seen[rows] = slab.kinds[at].any(1, keepdim=True)
        if formula == "hinge":
            sums[rows], counts[rows] = _hinge_sums(d, thresholds[rows].contiguous())
            slopes[rows] = counts[rows].to(slopes.dtype)
            continue
        # One threshold after the other: never more than a slab of the N x M x K numbers.
        for k in range(shape[1]):
            z = thresholds[rows, k, None] - d
            value, slope = term(z, formula)
            sums[rows, k], slopes[rows, k] = value.sum(1), slope.sum(1)
            counts[rows, k] = (z > 0).sum(1)

    spoiled = batch.poison() + torch.zeros_like(sums).masked_fill_(missing, torch.nan)
    counted = seen & (missing | (thresholds != -torch.inf))
    sums = torch.where(counted, sums + spoiled, 0)
    slopes = torch.where(counted, slopes + spoiled, 0)
    return sums, counts.masked_fill_(missing, 0), slopes


@full_precision
def threshold_sum_backward_fallback(
    grad: Tensor,
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    formula: str,
    thresholds: Tensor,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::threshold_sum_backward``; recomputes the distances.

    Returns:
        Gradients of ``(grad * sums).sum()`` in query and in ref ([0, D] when ref is None or
        ``ref_grad`` is not set), in the dtypes of those; NaN if ``grad`` is not 0 for a threshold
        that is NaN.
    """
    batch, at = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance)), KINDS.index(kind)
    thresholds, missing = _in_order(thresholds.double().expand(grad.shape))
    spoiled = grad.new_zeros(())
    if batch.has_pairs():
        spoiled = spoiled.masked_fill((missing & (grad != 0)).any(), torch.nan)
    grad = grad.masked_fill(missing, 0)
    gradients = RowGradients(batch, ref_grad)
    for slab in sweep(batch):
        rows, d = slab.rows, _candidates(slab, at)
        if formula == "hinge":
            weight = _hinge_weights(d, thresholds[rows].contiguous(), grad[rows])
        else:
            weight = torch.zeros_like(d)
            for k in range(grad.shape[1]):
                _, slope = term(thresholds[rows, k, None] - d, formula)
                weight.addcmul_(slope, grad[rows, k, None])
        gradients.add(slab, weight.neg_().to(batch.x.dtype))
    grad_query, grad_ref = gradients.finish()
    return grad_query.add_(spoiled), grad_ref.add_(spoiled)


library.impl("threshold_sum", threshold_sum_fallback, "CompositeExplicitAutograd")
library.impl("threshold_sum_backward", threshold_sum_backward_fallback, "CompositeExplicitAutograd")
threshold_sum = torch.ops.flashmetric.threshold_sum.default
threshold_sum_backward = torch.ops.flashmetric.threshold_sum_backward.default


@torch.library.register_fake("flashmetric::threshold_sum", lib=library)
def _threshold_sum_fake(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    formula: str,
    thresholds: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    sums = query.new_empty((query.shape[0], thresholds.shape[1]), dtype=torch.float64)
    return sums, sums.new_empty(sums.shape, dtype=torch.int64), sums.new_empty(sums.shape)


@torch.library.register_fake("flashmetric::threshold_sum_backward", lib=library)
def _threshold_sum_backward_fake(
    grad: Tensor,
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    formula: str,
    thresholds: Tensor,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    return fake_gradients(query, ref, ref_grad)


class ThresholdSum(torch.autograd.Function):
    """Differentiable ``flashmetric::threshold_sum``, with the arguments of that op.

    Returns float64 sums [N, K] and int64 counts [N, K]. Thresholds are differentiable by what
    forward has found; backward sweeps the pairs again for the gradients of the rows.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Sum over the pairs of every row; saves the arguments and the slopes."""
        query, labels, ref, ref_labels, *rest, thresholds = args
        sums, counts, slopes = threshold_sum(*args)
        ctx.rest = rest
        ctx.save_for_backward(query, labels, ref, ref_labels, thresholds, slopes)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Recompute the distances and weigh their gradients by row and threshold."""
        if grad is None:
            return (None,) * 9
        *sides, thresholds, slopes = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # The sums of padding are constants, whatever was made of them: no NaN from inf * 0.
        grad = grad.masked_fill(thresholds == -torch.inf, 0)
        grad_query = grad_ref = grad_thresholds = None
        if wanted[0] or wanted[2]:
            grad_query, grad_ref = threshold_sum_backward(
                grad, *sides, *ctx.rest, thresholds, wanted[2]
            )
        if wanted[8]:
            grad_thresholds = grad * slopes
            if thresholds.shape[0] == 1:
                grad_thresholds = ordered_sum(grad_thresholds.T).unsqueeze(0)
            grad_thresholds = grad_thresholds.to(thresholds.dtype)
        return (
            grad_query if wanted[0] else None,
            None,
            grad_ref if wanted[2] else None,
            *(None,) * 5,
            grad_thresholds,
        )
