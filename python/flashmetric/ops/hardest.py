# SPDX-License-Identifier: Apache-2.0
"""Hardest positive and hardest negative of every query row."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flashmetric._library import library
from flashmetric.ops.distance import (
    accumulate_dtype,
    bias,
    full_precision,
    poison,
    slabs,
    squared_norms,
)
from flashmetric.ops.pair_distance import pair_distance_backward, pair_distance_fallback

library.define(
    "hardest(Tensor query, Tensor query_labels, Tensor? ref, Tensor? ref_labels, str distance)"
    " -> (Tensor index, Tensor distance)"
)


@full_precision
def hardest_fallback(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::hardest``.

    Returns:
        Reference indices, int64 [2, N] (hardest positive, hardest negative, -1 if there is none),
        and their distances [2, N] in the accumulation dtype.
    """
    x = query.to(accumulate_dtype(query.dtype))
    r = x if ref is None else ref.to(x.dtype)
    r_labels = query_labels if ref_labels is None else ref_labels
    x_norms = squared_norms(x)
    r_norms = x_norms if ref is None else squared_norms(r)
    r_bias = bias(r_norms, distance)
    n, m = x.shape[0], r.shape[0]

    index = query_labels.new_full((2, n), -1, dtype=torch.int64)
    # Finite keys leave the infinities free to mark pairs that are no candidates.
    limit = torch.finfo(x.dtype).max
    for rows in slabs(n if m else 0, m):
        key = torch.addmm(r_bias, x[rows], r.T, alpha=-2).clamp_(-limit, limit)
        same = query_labels[rows, None] == r_labels
        farthest = key.masked_fill(~same, -torch.inf)
        if ref is None:
            farthest[:, rows].fill_diagonal_(-torch.inf)
        nearest = key.masked_fill_(same, torch.inf)
        for kind, (best, arg) in enumerate((farthest.max(1), nearest.min(1))):
            index[kind, rows] = arg.masked_fill_(best.isinf(), -1)

    values = pair_distance_fallback(x, None if ref is None else r, None, index, distance)
    values += poison(x_norms, r_norms)
    return index, values.masked_fill_(index < 0, 0)


library.impl("hardest", hardest_fallback, "CompositeExplicitAutograd")
hardest = torch.ops.flashmetric.hardest.default


@torch.library.register_fake("flashmetric::hardest", lib=library)
def _hardest_fake(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
) -> tuple[Tensor, Tensor]:
    shape = (2, query.shape[0])
    return (
        query.new_empty(shape, dtype=torch.int64),
        query.new_empty(shape, dtype=accumulate_dtype(query.dtype)),
    )


class Hardest(torch.autograd.Function):
    """Differentiable ``flashmetric::hardest``: (query, query_labels, ref, ref_labels, distance).

    Returns index and distance; gradients flow from the distances of the selected pairs.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> tuple[Tensor, Tensor]:
        """Select the pairs and measure them; saves O(N D), no matrix of pairs."""
        query, _, ref, _, ctx.distance = args
        index, values = hardest(*args)
        ctx.save_for_backward(query, ref, index, values)
        ctx.mark_non_differentiable(index)
        ctx.set_materialize_grads(False)
        return index, values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, _: None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        """Scatter the gradients of the two selected distances per row."""
        if grad is None:
            return None, None, None, None, None
        query, ref, index, values = ctx.saved_tensors
        grad_query, grad_ref = pair_distance_backward(
            grad, query, ref, None, index, values, ctx.distance
        )
        return grad_query, None, None if ref is None else grad_ref, None, None
