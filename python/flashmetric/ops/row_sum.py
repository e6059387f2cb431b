# SPDX-License-Identifier: Apache-2.0
"""Sums of a pointwise function over the positive and over the negative pairs of every row."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import accumulate_dtype, full_precision
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.sweep import BackProduct, Batch, Pairs, Slab, sweep
from flashmetric.ops.terms import term

PAIRS = "Tensor query, Tensor labels, Tensor? ref, Tensor? ref_labels, str rule, str distance"
_TERMS = "str positive, str negative, Tensor scale, Tensor offset, Tensor? bound"
library.define(
    f"row_sum({PAIRS}, {_TERMS}, bool with_grad, bool ref_grad=True)"
    " -> (Tensor sums, Tensor counts, Tensor slopes, Tensor grad_query, Tensor grad_ref)"
)
library.define(
    f"row_sum_backward(Tensor grad, {PAIRS}, {_TERMS}, bool ref_grad=True)"
    " -> (Tensor grad_query, Tensor grad_ref)"
)


def row(parameter: Tensor, kind: int, rows: slice) -> Tensor:
    """Rows of a parameter of shape [2, 1] or [2, N] as a column."""
    return parameter[kind, None] if parameter.shape[1] == 1 else parameter[kind, rows, None]


def kept_pairs(slab: Slab, kind: int, bound: Tensor | None) -> Tensor:
    """Mask [rows, M] of the pairs of a kind within the bounds of their rows."""
    mask = slab.kinds[kind]
    if bound is None:
        return mask
    limit = row(bound, kind, slab.rows)
    return mask & ((slab.d < limit) if kind else (slab.d > limit))


@full_precision
def row_sum_fallback(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    positive: str,
    negative: str,
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    with_grad: bool,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::row_sum``.

    Returns:
        Sums [2, N] over positives and over negatives; int64 counts [4, N] of kept positives, kept
        negatives, and of those of either kind with a value above 0; slopes [4, N], the derivatives
        of the sums in the offsets (rows 0 and 1) and in the scales (rows 2 and 3) of each row; the
        gradients of the two total sums, [2, N, D] in query and [2, M, D] in ref ([2, 0, D] where
        not wanted, or for a self-batch).
    """
    batch = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance))
    (n, d), m = batch.x.shape, batch.r.shape[0]
    grad_refs = with_grad and ref_grad and not batch.alone
    sums, slopes = batch.x.new_zeros((2, n)), batch.x.new_zeros((4, n))
    counts = query.new_zeros((4, n), dtype=torch.int64)
    grad_x = batch.x.new_zeros((2, n if with_grad else 0, d))
    grad_r = batch.x.new_zeros((2, m if grad_refs else 0, d))
    # In a self-batch a row is a reference of all others, too: of as much weight where the pairs
    # are symmetric.
    symmetric = batch.alone and scale.shape[1] == 1 and offset.shape[1] == 1 and bound is None
    other_role = torch.zeros_like(grad_x) if batch.alone and not symmetric else None
    products = []
    for kind in (0, 1):
        columns = grad_r[kind] if grad_refs else None
        columns = columns if other_role is None else other_role[kind]
        products.append(BackProduct(batch, grad_x[kind], columns))
    seen = torch.zeros((2, n), dtype=torch.bool, device=query.device)
    for slab in sweep(batch):
        rows = slab.rows
        for kind, formula in enumerate((positive, negative)):
            keep = kept_pairs(slab, kind, bound)
            factor = row(scale, kind, rows)
            value, slope = term(factor * slab.d + row(offset, kind, rows), formula)
            value, slope = value.masked_fill(~keep, 0), slope.masked_fill(~keep, 0)
            seen[kind, rows] = slab.kinds[kind].any(1)
            counts[kind, rows], counts[2 + kind, rows] = keep.sum(1), (value > 0).sum(1)
            sums[kind, rows], slopes[kind, rows] = value.sum(1), slope.sum(1)
            slopes[2 + kind, rows] = (slope * slab.d).masked_fill_(~keep, 0).sum(1)
            if with_grad:
                products[kind].add(slab, slope * factor)
    if symmetric:
        grad_x.mul_(2)
    elif other_role is not None:
        grad_x.add_(other_role)

    spoiled = batch.poison()
    sums = torch.where(seen, sums + spoiled, 0)
    slopes = torch.where(seen.repeat(2, 1), slopes + spoiled, 0)
    return sums, counts, slopes, grad_x.add_(spoiled), grad_r.add_(spoiled)


@full_precision
def row_sum_backward_fallback(
    grad: Tensor,
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    positive: str,
    negative: str,
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::row_sum_backward``; recomputes the distances.

    Returns:
        Gradients of ``(grad * sums).sum()`` in query and in ref ([0, D] when ref is None or
        ``ref_grad`` is not set), in the dtypes of those.
    """
    batch = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance))
    gradients = RowGradients(batch, ref_grad)
    for slab in sweep(batch):
        weight = torch.zeros_like(slab.d)
        for kind, formula in enumerate((positive, negative)):
            factor = row(scale, kind, slab.rows)
            _, slope = term(factor * slab.d + row(offset, kind, slab.rows), formula)
            slope.mul_(factor * grad[kind, slab.rows, None])
            weight += slope.masked_fill_(~kept_pairs(slab, kind, bound), 0)
        gradients.add(slab, weight)
    return gradients.finish()


class RowGradients:
    """Gradients in the rows of both sides, gathered slab by slab, in the dtypes of those rows."""

    def __init__(self, batch: Batch, ref_grad: bool) -> None:
        """Begin with zeros."""
        self._batch = batch
        self._x = torch.zeros_like(batch.x, memory_format=torch.contiguous_format)
        wanted = ref_grad or batch.alone
        self._r = batch.r.new_zeros((batch.r.shape[0] if wanted else 0, batch.r.shape[1]))
        self._product = BackProduct(batch, self._x, self._r if wanted else None)

    def add(self, slab: Slab, weight: Tensor) -> None:
        """Add the gradients of sum(weight * d)."""
        self._product.add(slab, weight)

    def finish(self) -> tuple[Tensor, Tensor]:
        """Gradients of query and of ref ([0, D] for a self-batch)."""
        batch, (query, _, ref, *_) = self._batch, self._batch.pairs
        spoiled = batch.poison()
        if ref is None:
            # A row is a reference of all others, too.
            return self._x.add_(self._r).add_(spoiled).to(query.dtype), query.new_empty(
                (0, query.shape[1])
            )
        return self._x.add_(spoiled).to(query.dtype), self._r.add_(spoiled).to(ref.dtype)


library.impl("row_sum", row_sum_fallback, "CompositeExplicitAutograd")
library.impl("row_sum_backward", row_sum_backward_fallback, "CompositeExplicitAutograd")
row_sum = torch.ops.flashmetric.row_sum.default
row_sum_backward = torch.ops.flashmetric.row_sum_backward.default


@torch.library.register_fake("flashmetric::row_sum", lib=library)
def _row_sum_fake(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    positive: str,
    negative: str,
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    with_grad: bool,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, d = query.shape
    m = ref.shape[0] if ref is not None and with_grad and ref_grad else 0
    sums = query.new_empty((2, n), dtype=accumulate_dtype(query.dtype))
    return (
        sums,
        query.new_empty((4, n), dtype=torch.int64),
        sums.new_empty((4, n)),
        sums.new_empty((2, n if with_grad else 0, d)),
        sums.new_empty((2, m, d)),
    )


@torch.library.register_fake("flashmetric::row_sum_backward", lib=library)
def _row_sum_backward_fake(
    grad: Tensor,
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    positive: str,
    negative: str,
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    return fake_gradients(query, ref, ref_grad)


def fake_gradients(query: Tensor, ref: Tensor | None, ref_grad: bool) -> tuple[Tensor, Tensor]:
    """Shapes of what a backward op on pairs returns."""
    rows = ref.shape[0] if ref is not None and ref_grad else 0
    like = query if ref is None else ref
    return query.new_empty(query.shape), like.new_empty((rows, query.shape[1]))


class RowSum(torch.autograd.Function):
    """Differentiable ``flashmetric::row_sum``: its arguments without the two flags.

    Returns sums [2, N] and int64 counts [4, N]. Scale and offset are differentiable; backward
    sweeps the pairs again.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Sum over the pairs of every row; saves the arguments."""
        query, labels, ref, ref_labels, *rest, scale, offset, bound = args
        sums, counts, slopes, _, _ = row_sum(*args, False)
        ctx.rest = rest
        ctx.save_for_backward(query, labels, ref, ref_labels, scale, offset, bound, slopes)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Recompute the distances and weigh their gradients by row."""
        if grad is None:
            return (None,) * 11
        *sides, scale, offset, bound, slopes = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad_query = grad_ref = None
        if wanted[0] or wanted[2]:
            grad_query, grad_ref = row_sum_backward(
                grad, *sides, *ctx.rest, scale, offset, bound, wanted[2]
            )
        return (
            grad_query,
            None,
            grad_ref if wanted[2] else None,
            *(None,) * 5,
            parameter_grad(grad * slopes[2:], scale) if wanted[8] else None,
            parameter_grad(grad * slopes[:2], offset) if wanted[9] else None,
            None,
        )


def parameter_grad(by_row: Tensor, parameter: Tensor) -> Tensor:
    """Gradient [2, N] by row as that of a parameter [2, 1] or [2, N]."""
    return by_row if parameter.shape[1] != 1 else ordered_sum(by_row).unsqueeze(1)


class RowTotal(torch.autograd.Function):
    """Differentiable totals of ``flashmetric::row_sum``, with the arguments of that op.

    Returns totals [2] and int64 counts [4]. The gradients of the totals are computed along with
    them when ``with_grad`` is set (those of ref with ``ref_grad``): backward is then a weighted sum
    of two, with no second sweep. Scale and offset are differentiable in any case.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Sum over all pairs; saves the finished gradients, 2 (N + M) D numbers."""
        query, _, ref, *_, scale, offset, _, _, _ = args
        sums, counts, slopes, grad_query, grad_ref = row_sum(*args)
        totals, counts = ordered_sum(sums), counts.sum(1)
        ctx.dtypes = query.dtype, None if ref is None else ref.dtype
        ctx.save_for_backward(grad_query, grad_ref, slopes, scale, offset)
        ctx.mark_non_differentiable(counts)
        ctx.set_materialize_grads(False)
        return totals, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Weigh the saved gradients."""
        if grad is None:
            return (None,) * 13
        of_query, of_ref, slopes, scale, offset = ctx.saved_tensors
        query_dtype, ref_dtype = ctx.dtypes
        wanted = ctx.needs_input_grad
        by_row = grad.unsqueeze(1)
        return (
            _weigh(of_query, grad, query_dtype) if wanted[0] else None,
            None,
            _weigh(of_ref, grad, ref_dtype) if wanted[2] else None,
            *(None,) * 5,
            parameter_grad(by_row * slopes[2:], scale) if wanted[8] else None,
            parameter_grad(by_row * slopes[:2], offset) if wanted[9] else None,
            *(None,) * 3,
        )


def _weigh(grads: Tensor, weights: Tensor, dtype: torch.dtype) -> Tensor:
    # Not a matrix product: autocast would round it.
    of_positives, of_negatives = grads.unbind()
    positive, negative = weights.unbind()
    return (of_positives * positive).addcmul_(of_negatives, negative).to(dtype)
