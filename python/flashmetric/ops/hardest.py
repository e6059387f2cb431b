# SPDX-License-Identifier: Apache-2.0
"""Hardest positive and hardest negative of every query row."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import (
    NEAR,
    accumulate_dtype,
    bias,
    exact_u,
    full_precision,
    is_difference,
    is_direct,
    poison,
    slabs,
    squared_norms,
    value,
)
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.pair_distance import pair_distance_backward, pair_distance_fallback

library.define(
    "hardest(Tensor query, Tensor query_labels, Tensor? ref, Tensor? ref_labels, str distance,"
    " bool exact=False) -> (Tensor index, Tensor distance)"
)


def _extremes(key: Tensor, same: Tensor, own: Tensor | None) -> tuple[Tensor, Tensor]:
    """Largest key among the columns of the same class and smallest among the others, per row.

    Args:
        key: finite keys, [rows, M]; overwritten.
        same: which columns are of the row's class, [rows, M].
        own: column that is the row itself, [rows]; None if there is none.

    Returns:
        Keys and columns, both [2, rows]; column -1 where there is no candidate.
    """
    farthest = key.masked_fill(~same, -torch.inf)
    if own is not None:
        farthest.scatter_(1, own.unsqueeze(1), -torch.inf)
    positive, negative = farthest.max(1), key.masked_fill_(same, torch.inf).min(1)
    best = torch.stack((positive.values, negative.values))
    column = torch.stack((positive.indices, negative.indices))
    return best, column.masked_fill_(best.isinf(), -1)


@full_precision
def hardest_fallback(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::hardest``.

    With ``exact`` every candidate is measured as ``pair_distance`` does; without, candidates are
    compared by Gram-form keys, and by measured distances only where the keys lost their digits.

    Returns:
        Reference indices, int64 [2, N] (hardest positive, hardest negative, -1 if there is none),
        and their distances [2, N] in the accumulation dtype.
    """
    x = query.to(accumulate_dtype(query.dtype))
    r = x if ref is None else ref.to(x.dtype)
    r_labels = query_labels if ref_labels is None else ref_labels
    own = torch.arange(len(x), device=x.device) if ref is None else None
    x_norms = squared_norms(x)
    r_norms = x_norms if ref is None else squared_norms(r)
    poisoned = poison(x_norms, r_norms)
    n, m = x.shape[0], r.shape[0]
    # Finite keys leave the infinities free to mark pairs that are no candidates.
    limit = torch.finfo(x.dtype).max

    index = query_labels.new_full((2, n), -1, dtype=torch.int64)
    # Where distances are summed feature by feature there is no key.
    if exact or is_direct(distance):
        values = x.new_zeros((2, n))
        again = torch.arange(n if m else 0, device=x.device)
    else:
        r_bias = bias(r_norms, distance)
        for rows in slabs(n if m else 0, m):
            key = torch.addmm(r_bias, x[rows], r.T, alpha=-2).clamp_(-limit, limit)
            same = query_labels[rows, None] == r_labels
            _, index[:, rows] = _extremes(key, same, None if own is None else own[rows])
        values = pair_distance_fallback(x, None if ref is None else r, None, index, distance)
        values.add_(poisoned).masked_fill_(index < 0, 0)
        again = index.new_empty(0)
        if m and is_difference(distance):
            # The keys of such pairs are mostly rounding errors, so any candidate may have won.
            limit_u = (x_norms + r_norms[index.clamp(min=0)]).mul_(NEAR)
            near = (values < value(limit_u, distance)).logical_and_(index >= 0)
            again = near.any(0).nonzero().squeeze(1)
    for part in slabs(len(again), r.numel()):
        rows_again = again[part]
        measured = value(exact_u(x[rows_again, None], r, distance), distance).clamp_(-limit, limit)
        same = query_labels[rows_again, None] == r_labels
        best, column = _extremes(measured, same, None if own is None else own[rows_again])
        index[:, rows_again] = column
        values[:, rows_again] = best.add_(poisoned).masked_fill_(column < 0, 0)
    return index, values


library.impl("hardest", hardest_fallback, "CompositeExplicitAutograd")
hardest = torch.ops.flashmetric.hardest.default


@torch.library.register_fake("flashmetric::hardest", lib=library)
def _hardest_fake(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    exact: bool = False,
) -> tuple[Tensor, Tensor]:
    shape = (2, query.shape[0])
    return (
        query.new_empty(shape, dtype=torch.int64),
        query.new_empty(shape, dtype=accumulate_dtype(query.dtype)),
    )


class Hardest(torch.autograd.Function):
    """Differentiable ``flashmetric::hardest``, with all arguments of that op.

    Returns index and distance; gradients flow from the distances of the selected pairs.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Select the pairs and measure them; saves O(N D), no matrix of pairs."""
        query, _, ref, _, ctx.distance, _ = args
        index, values = hardest(*args)
        ctx.save_for_backward(query, ref, index, values)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return index, values

    @staticmethod
    @first_order_only
    def backward(ctx: Any, _: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scatter the gradients of the two selected distances per row."""
        if grad is None:
            return (None,) * 6
        query, ref, index, values = ctx.saved_tensors
        ref_grad = ctx.needs_input_grad[2]
        grad_query, grad_ref = pair_distance_backward(
            grad, query, ref, None, index, values, ctx.distance, ref_grad
        )
        return grad_query, None, grad_ref if ref_grad else None, None, None, None
