# SPDX-License-Identifier: Apache-2.0
"""Sums of a pointwise loss over all positive and all negative pairs of every query row."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashmetric._library import library
from flashmetric.ops.distance import (
    NEAR,
    accumulate_dtype,
    bias,
    du_dx,
    exact_u,
    full_precision,
    is_difference,
    poison,
    slabs,
    slope,
    squared_norms,
    value,
)
from flashmetric.ops.ordered_sum import ordered_sum

_PAIRS = "Tensor query, Tensor query_labels, Tensor? ref, Tensor? ref_labels, str distance"
_FORMULA = "str formula, float pos_margin, float neg_margin"
library.define(
    f"pair_sum({_PAIRS}, {_FORMULA}, bool with_grad)"
    " -> (Tensor sums, Tensor counts, Tensor grad_query, Tensor grad_ref)"
)
library.define(
    f"pair_sum_backward(Tensor grad_sums, {_PAIRS}, {_FORMULA})"
    " -> (Tensor grad_query, Tensor grad_ref)"
)


class _Batch(NamedTuple):
    """Both sides of a pair sum in the accumulation dtype."""

    x: Tensor
    x_labels: Tensor
    x_norms: Tensor
    r: Tensor
    r_labels: Tensor
    r_norms: Tensor
    alone: bool
    """One self-batch: r is x, and a row is no pair with itself."""

    @classmethod
    def of(
        cls, query: Tensor, query_labels: Tensor, ref: Tensor | None, ref_labels: Tensor | None
    ) -> "_Batch":
        x = query.to(accumulate_dtype(query.dtype))
        x_norms = squared_norms(x)
        if ref is None or ref_labels is None:
            return cls(x, query_labels, x_norms, x, query_labels, x_norms, True)
        r = ref.to(x.dtype)
        return cls(x, query_labels, x_norms, r, ref_labels, squared_norms(r), False)


class _Slab(NamedTuple):
    """The pairs of a few query rows with all reference rows; matrices are [rows, M]."""

    rows: slice
    kinds: tuple[Tensor, Tensor]
    """Which pairs are positives and which are negatives."""
    loss: Tensor
    weight: Tensor
    """Derivative of the loss in u."""
    near: tuple[Tensor, Tensor]
    """Row and column numbers of the pairs whose u comes from exact differences."""


def _exact_u_listed(
    x: Tensor, r: Tensor, pairs: tuple[Tensor, Tensor], distance: str
) -> Iterator[tuple[slice, Tensor]]:
    i, j = pairs
    for part in slabs(len(i), x.shape[1]):
        yield part, exact_u(x[i[part]], r[j[part]], distance)


def _slabs(
    batch: _Batch, distance: str, formula: str, pos_margin: float, neg_margin: float
) -> Iterator[_Slab]:
    x_bias, r_bias = bias(batch.x_norms, distance), bias(batch.r_norms, distance)
    m = batch.r.shape[0]
    for rows in slabs(batch.x.shape[0] if m else 0, m):
        x, norms = batch.x[rows], batch.x_norms[rows, None]
        same = batch.x_labels[rows, None] == batch.r_labels
        other = ~same
        if batch.alone:
            same[:, rows].fill_diagonal_(False)

        u = torch.addmm(r_bias, x, batch.r.T, alpha=-2).add_(x_bias[rows, None])
        near = same.new_empty((0, 2), dtype=torch.int64)
        if is_difference(distance):
            near = (u < (norms + batch.r_norms).mul_(NEAR)).logical_and_(same | other).nonzero()
        i, j = near.unbind(1)
        for part, exact in _exact_u_listed(x, batch.r, (i, j), distance):
            u[i[part], j[part]] = exact
        if distance == "cosine":
            u.masked_fill_(norms == 0, 2).masked_fill_(batch.r_norms == 0, 2)

        d = value(u, distance)
        violation = torch.where(same, d - pos_margin, neg_margin - d)
        loss = violation.relu()
        weight = slope(d, distance)
        weight = torch.where(same, weight, -weight).mul_(violation > 0)
        if formula == "squared_hinge":
            weight.mul_(loss).mul_(2)
            loss = loss.square_()
        if distance == "cosine":
            weight.masked_fill_(norms == 0, 0).masked_fill_(batch.r_norms == 0, 0)
        yield _Slab(rows, (same, other), loss, weight, (i, j))


def _accumulate(
    batch: _Batch, slab: _Slab, weight: Tensor, distance: str, grad_x: Tensor, grad_r: Tensor | None
) -> None:
    """Add sum(weight * du/dx) to ``grad_x`` and sum(weight * du/dr) to ``grad_r``."""
    rows, (i, j) = slab.rows, slab.near
    x, r, out = batch.x[rows], batch.r, grad_x[rows]
    near_weight = weight[i, j].unsqueeze(1)
    if len(i):
        weight = weight.index_put((i, j), weight.new_zeros(()))
    out.addmm_(weight, r, alpha=-2)
    if grad_r is not None:
        grad_r.addmm_(weight.T, x, alpha=-2)
    if is_difference(distance):
        out.addcmul_(weight.sum(1, keepdim=True), x, value=2)
        if grad_r is not None:
            grad_r.addcmul_(weight.sum(0).unsqueeze(1), r, value=2)
    for part in slabs(len(i), x.shape[1]):
        step = du_dx(x[i[part]], r[j[part]], distance).mul_(near_weight[part])
        out.index_add_(0, i[part], step)
        if grad_r is not None:
            grad_r.index_add_(0, j[part], step, alpha=-1)


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
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_sum``.

    Returns:
        Sums [2, N] over positives and over negatives; int64 counts [4, N] of positives, negatives,
        active positives and active negatives; the gradients [2, N, D] of the two total sums in
        query and [2, M, D] in ref ([2, 0, D] when not wanted or ref is None).
    """
    batch = _Batch.of(query, query_labels, ref, ref_labels)
    (n, d), m = batch.x.shape, batch.r.shape[0]
    sums = batch.x.new_zeros((2, n))
    counts = query_labels.new_zeros((4, n), dtype=torch.int64)
    grad_x = batch.x.new_zeros((2, n if with_grad else 0, d))
    grad_r = batch.x.new_zeros((2, m if with_grad and not batch.alone else 0, d))
    zero = sums.new_zeros(())
    for slab in _slabs(batch, distance, formula, pos_margin, neg_margin):
        active = slab.loss > 0
        for kind, mask in enumerate(slab.kinds):
            torch.sum(slab.loss.where(mask, zero), 1, out=sums[kind, slab.rows])
            torch.sum(mask, 1, out=counts[kind, slab.rows])
            torch.sum(active & mask, 1, out=counts[2 + kind, slab.rows])
            if with_grad:
                wanted = None if batch.alone else grad_r[kind]
                weight = slab.weight.where(mask, zero)
                _accumulate(batch, slab, weight, distance, grad_x[kind], wanted)
    if with_grad and batch.alone:
        # u and the weights are symmetric, so a row receives as much as a reference as it does as
        # a query.
        grad_x.mul_(2)

    spoiled = poison(batch.x_norms, batch.r_norms)
    sums = torch.where(counts[:2] > 0, sums + spoiled, 0)
    if with_grad:
        grad_x = torch.where((counts[:2] > 0).unsqueeze(2), grad_x + spoiled, 0)
        grad_r += spoiled
    return sums, counts, grad_x, grad_r


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
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_sum_backward``; recomputes the distances.

    Returns:
        Gradients of ``(grad_sums * sums).sum()`` in query and in ref ([0, D] when ref is None), in
        the dtypes of those.
    """
    batch = _Batch.of(query, query_labels, ref, ref_labels)
    grad_x = torch.zeros_like(batch.x, memory_format=torch.contiguous_format)
    grad_r = batch.r.new_zeros((0 if batch.alone else batch.r.shape[0], batch.r.shape[1]))
    for slab in _slabs(batch, distance, formula, pos_margin, neg_margin):
        factor = torch.zeros_like(slab.weight)
        for kind, mask in enumerate(slab.kinds):
            grad = grad_sums[kind, slab.rows, None]
            if batch.alone:
                grad = grad + grad_sums[kind]
            factor = torch.where(mask, grad, factor)
        weight = factor.mul_(slab.weight)
        _accumulate(batch, slab, weight, distance, grad_x, None if batch.alone else grad_r)
    spoiled = poison(batch.x_norms, batch.r_norms)
    grad_x += spoiled
    grad_r += spoiled
    if ref is None:
        return grad_x.to(query.dtype), grad_r.to(query.dtype)
    return grad_x.to(query.dtype), grad_r.to(ref.dtype)


library.impl("pair_sum", pair_sum_fallback, "CompositeExplicitAutograd")
library.impl("pair_sum_backward", pair_sum_backward_fallback, "CompositeExplicitAutograd")
pair_sum = torch.ops.flashmetric.pair_sum.default
pair_sum_backward = torch.ops.flashmetric.pair_sum_backward.default


@torch.library.register_fake("flashmetric::pair_sum", lib=library)
def _pair_sum_fake(
    query: Tensor, _labels: Tensor, ref: Tensor | None, *rest: object
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    n, d = query.shape
    with_grad = bool(rest[-1])
    m = 0 if ref is None or not with_grad else ref.shape[0]
    sums = query.new_empty((2, n), dtype=accumulate_dtype(query.dtype))
    return (
        sums,
        query.new_empty((4, n), dtype=torch.int64),
        sums.new_empty((2, n if with_grad else 0, d)),
        sums.new_empty((2, m, d)),
    )


@torch.library.register_fake("flashmetric::pair_sum_backward", lib=library)
def _pair_sum_backward_fake(
    _grad: Tensor, query: Tensor, _labels: Tensor, ref: Tensor | None, *_: object
) -> tuple[Tensor, Tensor]:
    rows = 0 if ref is None else ref.shape[0]
    return query.new_empty(query.shape), query.new_empty((rows, query.shape[1]))


class PairTotal(torch.autograd.Function):
    """Differentiable totals of ``flashmetric::pair_sum``, with the arguments of that op.

    Returns totals [2] and int64 counts [4]. The gradients of the totals are computed along with
    them when ``with_grad`` is set: backward is then a weighted sum of two, with no second sweep.
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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Weigh the saved gradients."""
        if grad is None:
            return (None,) * 9
        of_query, of_ref = ctx.saved_tensors
        query_dtype, ref_dtype = ctx.dtypes
        positive, negative = grad.unbind()
        grad_query = _weigh(of_query, positive, negative, query_dtype)
        grad_ref = None if ref_dtype is None else _weigh(of_ref, positive, negative, ref_dtype)
        return grad_query, None, grad_ref, *(None,) * 6


def _weigh(grads: Tensor, positive: Tensor, negative: Tensor, dtype: torch.dtype) -> Tensor:
    # Not a matrix product: autocast would round it.
    of_positives, of_negatives = grads.unbind()
    return (of_positives * positive).addcmul_(of_negatives, negative).to(dtype)


class PairRows(torch.autograd.Function):
    """Differentiable sums per query row: the arguments of ``pair_sum`` without ``with_grad``.

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
    @once_differentiable
    def backward(ctx: Any, grad: Tensor | None, _: None) -> tuple[Tensor | None, ...]:
        """Recompute the distances and weigh their gradients by row."""
        if grad is None:
            return (None,) * 8
        grad_query, grad_ref = pair_sum_backward(grad, *ctx.saved_tensors, *ctx.rest)
        ref = ctx.saved_tensors[2]
        return grad_query, None, None if ref is None else grad_ref, *(None,) * 5
