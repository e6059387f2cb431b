# SPDX-License-Identifier: Apache-2.0
"""Sums of a pointwise loss over all positive and all negative pairs of every query row."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import (
    NEAR,
    accumulate_dtype,
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
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.ordered_sum import ordered_sum

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


class _Batch(NamedTuple):
    """Both sides of a pair sum in the accumulation dtype."""

    x: Tensor
    x_moved: Tensor
    """Rows for products: for differences, near the origin, where the products cancel less."""
    x_labels: Tensor
    x_norms: Tensor
    r: Tensor
    r_moved: Tensor
    r_labels: Tensor
    r_norms: Tensor
    alone: bool
    """One self-batch: r is x, and a row is no pair with itself."""

    @classmethod
    def of(
        cls,
        query: Tensor,
        query_labels: Tensor,
        ref: Tensor | None,
        ref_labels: Tensor | None,
        distance: str,
    ) -> "_Batch":
        x = query.to(accumulate_dtype(query.dtype))
        alone = ref is None or ref_labels is None
        r = x if ref is None else ref.to(x.dtype)
        x_moved, r_moved = x, r
        if is_difference(distance) and r.shape[0]:
            # Any point will do: a move changes no difference.
            centre = r.mean(0)
            x_moved = x - centre
            r_moved = x_moved if alone else r - centre
        x_norms = squared_norms(x)
        return cls(
            x,
            x_moved,
            query_labels,
            x_norms,
            r,
            r_moved,
            query_labels if ref_labels is None else ref_labels,
            x_norms if alone else squared_norms(r),
            alone,
        )

    def has_pairs(self) -> bool:
        """Whether there is any pair, positive or negative."""
        return self.x.shape[0] > self.alone and self.r.shape[0] > 0

    def poison(self) -> Tensor:
        """0-d tensor: NaN if some row is not finite and there is any pair to show it, else 0."""
        return poison(self.x_norms, self.r_norms) if self.has_pairs() else self.x.new_zeros(())


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
    n, m = batch.x.shape[0], batch.r.shape[0]
    x_norms, r_norms = batch.x.new_zeros(n), batch.r.new_zeros(m)
    if is_difference(distance):
        x_norms, r_norms = squared_norms(batch.x_moved), squared_norms(batch.r_moved)
    for rows in slabs(n if batch.has_pairs() else 0, m):
        x = batch.x[rows]
        same = batch.x_labels[rows, None] == batch.r_labels
        other = ~same
        if batch.alone:
            same[:, rows].fill_diagonal_(False)

        u = torch.addmm(r_norms, batch.x_moved[rows], batch.r_moved.T, alpha=-2)
        u.add_(x_norms[rows, None])
        near = same.new_empty((0, 2), dtype=torch.int64)
        if is_difference(distance):
            limit = (x_norms[rows, None] + r_norms).mul_(NEAR)
            near = (u < limit).logical_and_(same | other).nonzero()
        i, j = near.unbind(1)
        for part, exact in _exact_u_listed(x, batch.r, (i, j), distance):
            u[i[part], j[part]] = exact
        if distance == "cosine":
            zero_row = (batch.x_norms[rows, None] == 0).logical_or(batch.r_norms == 0)
            u.masked_fill_(zero_row, 2)

        d = value(u, distance)
        violation = torch.where(same, d - pos_margin, neg_margin - d)
        loss = violation.relu()
        weight = slope(d, distance)
        weight = torch.where(same, weight, -weight).mul_(violation > 0)
        if formula == "squared_hinge":
            weight.mul_(loss).mul_(2)
            loss = loss.square_()
        if distance == "cosine":
            weight.masked_fill_(zero_row, 0)
        yield _Slab(rows, (same, other), loss, weight, (i, j))


def _accumulate(
    batch: _Batch, slab: _Slab, weight: Tensor, distance: str, grad_x: Tensor, grad_r: Tensor | None
) -> None:
    """Add sum(weight * du/dx) to ``grad_x`` and sum(weight * du/dr) to ``grad_r``."""
    rows, (i, j) = slab.rows, slab.near
    x, r, out = batch.x_moved[rows], batch.r_moved, grad_x[rows]
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
        step = du_dx(batch.x[rows][i[part]], batch.r[j[part]], distance).mul_(near_weight[part])
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
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_sum``.

    Returns:
        Sums [2, N] over positives and over negatives; int64 counts [4, N] of positives, negatives,
        active positives and active negatives; the gradients [2, N, D] of the two total sums in
        query and [2, M, D] in ref ([2, 0, D] when ref is None, either when not wanted).
    """
    batch = _Batch.of(query, query_labels, ref, ref_labels, distance)
    (n, d), m = batch.x.shape, batch.r.shape[0]
    grad_refs = with_grad and ref_grad and not batch.alone
    sums = batch.x.new_zeros((2, n))
    counts = query_labels.new_zeros((4, n), dtype=torch.int64)
    grad_x = batch.x.new_zeros((2, n if with_grad else 0, d))
    grad_r = batch.x.new_zeros((2, m if grad_refs else 0, d))
    zero = sums.new_zeros(())
    for slab in _slabs(batch, distance, formula, pos_margin, neg_margin):
        active = slab.loss > 0
        for kind, mask in enumerate(slab.kinds):
            torch.sum(slab.loss.where(mask, zero), 1, out=sums[kind, slab.rows])
            torch.sum(mask, 1, out=counts[kind, slab.rows])
            torch.sum(active & mask, 1, out=counts[2 + kind, slab.rows])
            if with_grad:
                wanted = grad_r[kind] if grad_refs else None
                weight = slab.weight.where(mask, zero)
                _accumulate(batch, slab, weight, distance, grad_x[kind], wanted)
    if with_grad and batch.alone:
        # u and the weights are symmetric, so a row receives as much as a reference as it does as
        # a query.
        grad_x.mul_(2)

    spoiled = batch.poison()
    sums = torch.where(counts[:2] > 0, sums + spoiled, 0)
    return sums, counts, grad_x.add_(spoiled), grad_r.add_(spoiled)


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
    batch = _Batch.of(query, query_labels, ref, ref_labels, distance)
    grad_x = torch.zeros_like(batch.x, memory_format=torch.contiguous_format)
    grad_refs = ref_grad and not batch.alone
    grad_r = batch.r.new_zeros((batch.r.shape[0] if grad_refs else 0, batch.r.shape[1]))
    for slab in _slabs(batch, distance, formula, pos_margin, neg_margin):
        factor = torch.zeros_like(slab.weight)
        for kind, mask in enumerate(slab.kinds):
            grad = grad_sums[kind, slab.rows, None]
            if batch.alone:
                grad = grad + grad_sums[kind]
            factor = torch.where(mask, grad, factor)
        weight = factor.mul_(slab.weight)
        _accumulate(batch, slab, weight, distance, grad_x, grad_r if grad_refs else None)
    spoiled = batch.poison()
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
