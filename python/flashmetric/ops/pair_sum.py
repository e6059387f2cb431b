# SPDX-License-Identifier: Apache-2.0
"""Sums of a pointwise loss over all positive and all negative pairs of every query row."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import accumulate_dtype, full_precision
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.row_sum import row_sum_backward_fallback, row_sum_fallback

_PAIRS = "Tensor query, Tensor query_labels, Tensor? ref, Tensor? ref_labels, str distance"
_FORMULA = "str formula, float pos_margin, float neg_margin"
library.define(
    f"pair_sum({_PAIRS}, {_FORMULA}, bool with_grad, bool ref_grad=True)"
    " -> (Tensor sums, Tensor counts, Tensor grad_query, Tensor grad_ref)"
)
library.define(
    f"pair_sum_backward(Tensor grad_sums, {_PAIRS}, {_FORMULA}, bool ref_grad=True)"
    " -> (Tensor grad_query, Tensor grad_ref)"
)


@full_precision
def pair_sum_fallback(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    formula: str,
    pos_margin: float,
    neg_margin: float,
    with_grad: bool,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_sum``.

    Returns:
        Sums [2, N] over positives and over negatives; int64 counts [4, N] of positives, negatives,
        active positives and active negatives; the gradients [2, N, D] of the two total sums in
        query and [2, M, D] in ref ([2, 0, D] when ref is None, either when not wanted).
    """
    terms = _terms(query, formula, pos_margin, neg_margin)
    pairs = query, query_labels, ref, ref_labels, "equal", distance
    sums, counts, _, grad_query, grad_ref = row_sum_fallback(*pairs, *terms, with_grad, ref_grad)
    return sums, counts, grad_query, grad_ref


@full_precision
def pair_sum_backward_fallback(
    grad_sums: Tensor,
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    formula: str,
    pos_margin: float,
    neg_margin: float,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_sum_backward``; recomputes the distances.

    Returns:
        Gradients of ``(grad_sums * sums).sum()`` in query and in ref ([0, D] when ref is None or
        ``ref_grad`` is not set), in the dtypes of those.
    """
    terms = _terms(query, formula, pos_margin, neg_margin)
    pairs = query, query_labels, ref, ref_labels, "equal", distance
    return row_sum_backward_fallback(grad_sums, *pairs, *terms, ref_grad)


def _terms(
    query: Tensor, formula: str, pos_margin: float, neg_margin: float
) -> tuple[str, str, Tensor, Tensor, None]:
    """Margins as the scales and offsets of a row sum."""
    parameters = torch.tensor([[1, -1], [-pos_margin, neg_margin]], dtype=torch.float64)
    scale, offset = parameters.to(query.device, accumulate_dtype(query.dtype)).unsqueeze(2)
    return formula, formula, scale, offset, None


library.impl("pair_sum", pair_sum_fallback, "CompositeExplicitAutograd")
library.impl("pair_sum_backward", pair_sum_backward_fallback, "CompositeExplicitAutograd")
pair_sum = torch.ops.flashmetric.pair_sum.default
pair_sum_backward = torch.ops.flashmetric.pair_sum_backward.default


@torch.library.register_fake("flashmetric::pair_sum", lib=library)
def _pair_sum_fake(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    formula: str,
    pos_margin: float,
    neg_margin: float,
    with_grad: bool,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = query.shape
    m = ref.shape[0] if ref is not None and with_grad and ref_grad else 0
    sums = query.new_empty((2, n), dtype=accumulate_dtype(query.dtype))
    return (
        sums,
        query.new_empty((4, n), dtype=torch.int64),
        sums.new_empty((2, n if with_grad else 0, d)),
        sums.new_empty((2, m, d)),
    )


@torch.library.register_fake("flashmetric::pair_sum_backward", lib=library)
def _pair_sum_backward_fake(
    grad_sums: Tensor,
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    formula: str,
    pos_margin: float,
    neg_margin: float,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    rows = ref.shape[0] if ref is not None and ref_grad else 0
    return query.new_empty(query.shape), query.new_empty((rows, query.shape[1]))


class PairTotal(torch.autograd.Function):
    """Differentiable totals of ``flashmetric::pair_sum``, with the arguments of that op.

    Returns totals [2] and int64 counts [4]. The gradients of the totals are computed along with
    them when ``with_grad`` is set (those of ref with ``ref_grad``): backward is then a weighted sum
    of two, with no second sweep.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Sum over all pairs; saves the finished gradients, 2 (N + M) D numbers."""
        query, _, ref, *_ = args
        sums, counts, grad_query, grad_ref = pair_sum(*args)
        totals, counts = ordered_sum(sums), counts.sum(1)
        ctx.dtypes = query.dtype, None if ref is None else ref.dtype
        ctx.save_for_backward(grad_query, grad_ref)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return totals, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Weigh the saved gradients."""
        if grad is None:
            return (None,) * 10
        of_query, of_ref = ctx.saved_tensors
        query_dtype, ref_dtype = ctx.dtypes
        ref_grad = ctx.needs_input_grad[2]
        positive, negative = grad.unbind()
        grad_query = _weigh(of_query, positive, negative, query_dtype)
        grad_ref = _weigh(of_ref, positive, negative, ref_dtype) if ref_grad else None
        return grad_query, None, grad_ref, *(None,) * 7


def _weigh(grads: Tensor, positive: Tensor, negative: Tensor, dtype: torch.dtype) -> Tensor:
    # Not a matrix product: autocast would round it.
    of_positives, of_negatives = grads.unbind()
    return (of_positives * positive).addcmul_(of_negatives, negative).to(dtype)


class PairRows(torch.autograd.Function):
    """Differentiable sums per query row: the arguments of ``pair_sum`` without the two flags.

    Returns sums [2, N] and int64 counts [4, N]; backward sweeps the pairs again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Sum over the pairs of every row; saves the arguments."""
        query, query_labels, ref, ref_labels, *ctx.rest = args
        sums, counts, _, _ = pair_sum(*args, False)
        ctx.save_for_backward(query, query_labels, ref, ref_labels)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Recompute the distances and weigh their gradients by row."""
        if grad is None:
            return (None,) * 8
        ref_grad = ctx.needs_input_grad[2]
        grad_query, grad_ref = pair_sum_backward(grad, *ctx.saved_tensors, *ctx.rest, ref_grad)
        return grad_query, None, grad_ref if ref_grad else None, *(None,) * 5
