# SPDX-License-Identifier: Apache-2.0
"""Exact distances of listed pairs."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import (
    accumulate_dtype,
    du_dx,
    exact_u,
    full_precision,
    is_difference,
    slabs,
    slope,
    value,
)
from flashmetric.ops.first_order import first_order_only

library.define(
    "pair_distance(Tensor query, Tensor? ref, Tensor? query_index, Tensor ref_index, str distance)"
    " -> Tensor"
)
library.define(
    "pair_distance_backward(Tensor grad, Tensor query, Tensor? ref, Tensor? query_index,"
    " Tensor ref_index, Tensor distance_value, str distance, bool ref_grad=True)"
    " -> (Tensor grad_query, Tensor grad_ref)"
)


def _check_range(index: Tensor, rows: int, name: str) -> None:
    message = f"{name} must hold row numbers below {rows}, or -1 for no pair"
    if index.numel() == 0:
        return
    if index.device.type == "cuda":
        torch._assert_async(((index >= -1) & (index < rows)).all(), message)
        return
    low, high = (int(bound) for bound in index.aminmax())
    if low < -1 or high >= rows:
        raise IndexError(f"{message}; got {low} to {high}")


def _flat_pairs(
    query: Tensor, ref: Tensor, query_index: Tensor | None, ref_index: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Row numbers of both sides as flat lists, and which pairs are missing."""
    _check_range(ref_index, ref.shape[0], "ref_index")
    if query_index is None:
        rows = torch.arange(query.shape[0], device=query.device).expand(ref_index.shape)
    else:
        _check_range(query_index, query.shape[0], "query_index")
        rows = query_index
    i, j = rows.reshape(-1), ref_index.reshape(-1)
    return i.clamp(min=0), j.clamp(min=0), (i < 0) | (j < 0)


@full_precision
def pair_distance_fallback(
    query: Tensor,
    ref: Tensor | None,
    query_index: Tensor | None,
    ref_index: Tensor,
    distance: str,
) -> Tensor:
    """PyTorch implementation of ``flashmetric::pair_distance``.

    Returns:
        Distances in the accumulation dtype, of the shape of ``ref_index``; 0 for missing pairs.
    """
    x = query.to(accumulate_dtype(query.dtype))
    r = x if ref is None else ref.to(x.dtype)
    i, j, missing = _flat_pairs(x, r, query_index, ref_index)
    out = x.new_zeros(i.shape)
    if x.shape[0] and r.shape[0]:
        for part in slabs(len(i), x.shape[1]):
            out[part] = value(exact_u(x[i[part]], r[j[part]], distance), distance)
    return out.masked_fill_(missing, 0).view(ref_index.shape)


@full_precision
def pair_distance_backward_fallback(
    grad: Tensor,
    query: Tensor,
    ref: Tensor | None,
    query_index: Tensor | None,
    ref_index: Tensor,
    distance_value: Tensor,
    distance: str,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::pair_distance_backward``.

    Returns:
        Gradients of query and of ref ([0, D] when ref is None or ``ref_grad`` is not set), in the
        dtypes of those.
    """
    x = query.to(accumulate_dtype(query.dtype))
    r = x if ref is None else ref.to(x.dtype)
    i, j, missing = _flat_pairs(x, r, query_index, ref_index)
    grad_x = torch.zeros_like(x, memory_format=torch.contiguous_format)
    grad_r: Tensor | None = grad_x
    if ref is not None:
        grad_r = r.new_zeros(r.shape) if ref_grad else None
    if x.shape[0] and r.shape[0]:
        factor = (grad * slope(distance_value, distance)).reshape(-1, 1)
        absent = missing.unsqueeze(1)
        for part in slabs(len(i), x.shape[1]):
            x_rows, r_rows = x[i[part]], r[j[part]]
            # Filled, not multiplied by 0: the row that stands in for a missing one may be NaN.
            step = (du_dx(x_rows, r_rows, distance) * factor[part]).masked_fill_(absent[part], 0)
            grad_x.index_add_(0, i[part], step)
            if grad_r is None:
                continue
            if is_difference(distance):
                grad_r.index_add_(0, j[part], step, alpha=-1)
            else:
                step = du_dx(r_rows, x_rows, distance) * factor[part]
                grad_r.index_add_(0, j[part], step.masked_fill_(absent[part], 0))
    if ref is None or grad_r is None:
        return grad_x.to(query.dtype), query.new_empty((0, query.shape[1]))
    return grad_x.to(query.dtype), grad_r.to(ref.dtype)


library.impl("pair_distance", pair_distance_fallback, "CompositeExplicitAutograd")
library.impl("pair_distance_backward", pair_distance_backward_fallback, "CompositeExplicitAutograd")
pair_distance = torch.ops.flashmetric.pair_distance.default
pair_distance_backward = torch.ops.flashmetric.pair_distance_backward.default


@torch.library.register_fake("flashmetric::pair_distance", lib=library)
def _pair_distance_fake(
    query: Tensor, ref: Tensor | None, query_index: Tensor | None, ref_index: Tensor, distance: str
) -> Tensor:
    return query.new_empty(ref_index.shape, dtype=accumulate_dtype(query.dtype))


@torch.library.register_fake("flashmetric::pair_distance_backward", lib=library)
def _pair_distance_backward_fake(
    grad: Tensor,
    query: Tensor,
    ref: Tensor | None,
    query_index: Tensor | None,
    ref_index: Tensor,
    distance_value: Tensor,
    distance: str,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    rows = ref.shape[0] if ref is not None and ref_grad else 0
    return query.new_empty(query.shape), query.new_empty((rows, query.shape[1]))


class PairDistance(torch.autograd.Function):
    """Differentiable ``flashmetric::pair_distance``, with the arguments of that op.

    An index of -1 on either side yields distance 0 and no gradient.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Measure the listed pairs."""
        query, ref, query_index, ref_index, ctx.distance = args
        values: Tensor = pair_distance(*args)
        ctx.save_for_backward(query, ref, query_index, ref_index, values)
        return values

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scatter the gradients of the listed distances."""
        query, ref, query_index, ref_index, values = ctx.saved_tensors
        ref_grad = ctx.needs_input_grad[1]
        grad_query, grad_ref = pair_distance_backward(
            grad, query, ref, query_index, ref_index, values, ctx.distance, ref_grad
        )
        return grad_query, grad_ref if ref_grad else None, None, None, None
