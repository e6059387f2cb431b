# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exp over the positive and over the negative pairs of every row."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import accumulate_dtype, full_precision
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.row_sum import (
    PAIRS,
    RowGradients,
    fake_gradients,
    kept_pairs,
    parameter_grad,
    row,
)
from flashmetric.ops.sweep import Batch, Pairs, sweep
from flashmetric.ops.terms import logit

_LOGITS = "str positive, str negative, Tensor scale, Tensor offset, Tensor? bound, float shape"
library.define(
    f"row_lse({PAIRS}, {_LOGITS}, bool columns) -> (Tensor lse, Tensor mean, Tensor counts,"
    " Tensor ref_lse, Tensor ref_mean, Tensor ref_counts)"
)
library.define(
    "row_lse_backward(Tensor grad, Tensor lse, Tensor? ref_grad_lse, Tensor? ref_lse,"
    f" {PAIRS}, {_LOGITS}, bool ref_grad=True) -> (Tensor grad_query, Tensor grad_ref)"
)


class _Running:
    """Log-sum-exps that grow by blocks of logits, with the mean of d under their weights."""

    def __init__(self, like: Tensor, size: int) -> None:
        self.seen = torch.zeros((2, size), dtype=torch.bool, device=like.device)
        self.top = like.new_full((2, size), -torch.inf)
        self.sum = like.new_zeros((2, size))
        self.moment = like.new_zeros((2, size))
        self.count = self.seen.new_zeros((2, size), dtype=torch.int64)

    def add(self, kind: int, rows: slice, z: Tensor, d: Tensor, dim: int) -> None:
        """Add logits ``z``, -inf where there is none, along ``dim``."""
        top = torch.maximum(self.top[kind, rows], z.amax(dim))
        shift = top.masked_fill(top == -torch.inf, 0)
        e = (z - shift.unsqueeze(dim)).exp_()
        old = (self.top[kind, rows] - shift).exp_()
        self.sum[kind, rows] = self.sum[kind, rows] * old + e.sum(dim)
        self.moment[kind, rows] = self.moment[kind, rows] * old + (e * d).sum(dim)
        self.count[kind, rows] += (z != -torch.inf).sum(dim)  # NaN counts
        self.top[kind, rows] = top

    def finish(self, spoiled: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        lse = self.top + self.sum.log()
        mean = self.moment / self.sum
        empty = ~self.seen | ((self.count == 0) & ~spoiled.isnan())
        lse = (lse + spoiled).masked_fill_(empty, -torch.inf)
        return lse, (mean + spoiled).masked_fill_(empty, 0), self.count


@full_precision
def row_lse_fallback(
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
    shape: float,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::row_lse``.

    Returns:
        Log-sum-exps [2, N] over kept positives and negatives, -inf where there are none; the means
        [2, N] of their distances under the softmax weights, 0 where there are none; int64 counts
        [2, N]; the same three over the queries of every reference, [2, M], with ``columns``, else
        [2, 0].
    """
    batch = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance))
    by_row = _Running(batch.x, batch.x.shape[0])
    by_column = _Running(batch.x, batch.r.shape[0] if columns else 0)
    for slab in sweep(batch):
        rows, everything = slab.rows, slice(None)
        for kind, form in enumerate((positive, negative)):
            if form == "none":
                continue
            z = row(scale, kind, rows) * slab.d + row(offset, kind, rows)
            z = logit(z, form, shape)[0].masked_fill(~kept_pairs(slab, kind, bound), -torch.inf)
            by_row.seen[kind, rows] = slab.kinds[kind].any(1)
            by_row.add(kind, rows, z, slab.d, 1)
            if columns:
                by_column.seen[kind] |= slab.kinds[kind].any(0)
                by_column.add(kind, everything, z, slab.d, 0)
    spoiled = batch.poison()
    return *by_row.finish(spoiled), *by_column.finish(spoiled)


@full_precision
def row_lse_backward_fallback(
    grad: Tensor,
    lse: Tensor,
    ref_grad_lse: Tensor | None,
    ref_lse: Tensor | None,
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
    shape: float,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::row_lse_backward``; recomputes the distances.

    Returns:
        Gradients of ``(grad * lse).sum() + (ref_grad_lse * ref_lse).sum()`` in query and in ref
        ([0, D] when ref is None or ``ref_grad`` is not set), in the dtypes of those.
    """
    batch = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance))
    gradients = RowGradients(batch, ref_grad)
    for slab in sweep(batch):
        rows, weight = slab.rows, torch.zeros_like(slab.d)
        for kind, form in enumerate((positive, negative)):
            if form == "none":
                continue
            factor = row(scale, kind, rows)
            z, slope = logit(factor * slab.d + row(offset, kind, rows), form, shape)
            share = (z - lse[kind, rows, None]).exp_().mul_(grad[kind, rows, None])
            if ref_grad_lse is not None and ref_lse is not None:
                share += (z - ref_lse[kind]).exp_().mul_(ref_grad_lse[kind])
            slope = (slope * factor).mul_(share)
            weight += slope.masked_fill_(~kept_pairs(slab, kind, bound), 0)
        gradients.add(slab, weight)
    return gradients.finish()


library.impl("row_lse", row_lse_fallback, "CompositeExplicitAutograd")
library.impl("row_lse_backward", row_lse_backward_fallback, "CompositeExplicitAutograd")
row_lse = torch.ops.flashmetric.row_lse.default
row_lse_backward = torch.ops.flashmetric.row_lse_backward.default


@torch.library.register_fake("flashmetric::row_lse", lib=library)
def _row_lse_fake(
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
    shape: float,
    columns: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    n, m = query.shape[0], ref.shape[0] if ref is not None and columns else 0
    dtype = accumulate_dtype(query.dtype)

    def statistics(size: int) -> tuple[Tensor, Tensor, Tensor]:
        shape = (2, size)
        values = query.new_empty(shape, dtype=dtype)
        return values, values.new_empty(shape), query.new_empty(shape, dtype=torch.int64)

    return *statistics(n), *statistics(m)


@torch.library.register_fake("flashmetric::row_lse_backward", lib=library)
def _row_lse_backward_fake(
    grad: Tensor,
    lse: Tensor,
    ref_grad_lse: Tensor | None,
    ref_lse: Tensor | None,
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
    shape: float,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    return fake_gradients(query, ref, ref_grad)


class RowLse(torch.autograd.Function):
    """Differentiable ``flashmetric::row_lse``, with the arguments of that op.

    Returns lse [2, N], mean [2, N], counts [2, N] and the same for the references ([2, 0] without
    ``columns``). Only the log-sum-exps are differentiable: in the rows by a second sweep, in scale
    and offset (affine logits only) by what the first one has found.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, ...]:
        """Log-sum-exps of every row; saves the arguments and O(N) statistics."""
        query, labels, ref, ref_labels, *forms, scale, offset, bound, shape, columns = args
        results: tuple[Tensor, ...] = row_lse(*args)
        lse, mean, counts, ref_lse, ref_mean, ref_counts = results
        ctx.forms, ctx.shape, ctx.columns = forms, shape, columns
        ctx.save_for_backward(
            query, labels, ref, ref_labels, scale, offset, bound, lse, mean, ref_lse, ref_mean
        )
        ctx.mark_non_differentiable(mean, counts, ref_mean, ref_counts)
        ctx.set_materialize_grads(False)
        return results

    @staticmethod
    @first_order_only
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        """Recompute the distances and weigh their gradients by their softmax."""
        grad, ref_grad_lse = grads[0], grads[3]
        if grad is None and ref_grad_lse is None:
            return (None,) * 13
        *sides, scale, offset, bound, lse, mean, ref_lse, ref_mean = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        # What nothing depends on counts for nothing: no NaN from -inf - (-inf).
        grad = _relevant(grad, lse)
        columns = ctx.columns
        ref_grad_lse = _relevant(ref_grad_lse, ref_lse) if columns else None
        grad_query = grad_ref = None
        if wanted[0] or wanted[2]:
            grad_query, grad_ref = row_lse_backward(
                grad,
                lse,
                ref_grad_lse,
                ref_lse if columns else None,
                *sides,
                *ctx.forms,
                scale,
                offset,
                bound,
                ctx.shape,
                wanted[2],
            )
        grad_scale = grad_offset = None
        if wanted[8]:
            grad_scale = parameter_grad(grad * mean, scale)
            if ref_grad_lse is not None:
                grad_scale = grad_scale + parameter_grad(ref_grad_lse * ref_mean, scale)
        if wanted[9]:
            grad_offset = parameter_grad(grad, offset)
            if ref_grad_lse is not None:
                grad_offset = grad_offset + parameter_grad(ref_grad_lse, offset)
        none = (None,) * 5
        return (
            grad_query,
            None,
            grad_ref if wanted[2] else None,
            *none,
            grad_scale,
            grad_offset,
            *(None,) * 3,
        )


def _relevant(grad: Tensor | None, lse: Tensor) -> Tensor:
    if grad is None:
        return torch.zeros_like(lse)
    return grad.masked_fill(lse == -torch.inf, 0)
