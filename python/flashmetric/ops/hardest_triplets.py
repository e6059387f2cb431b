# SPDX-License-Identifier: Apache-2.0
"""The reduced margin loss of the hardest triplets, and its gradient: one op each way."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.hardest import hardest_fallback
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.pair_distance import pair_distance_backward_fallback

library.define(
    "hardest_triplets(Tensor query, Tensor query_labels, Tensor? ref, Tensor? ref_labels,"
    " str distance, float margin, bool smooth, str reduction, bool keep, bool exact=False)"
    " -> (Tensor loss, Tensor index, Tensor distance, Tensor slope, Tensor scale)"
)
library.define(
    "hardest_triplets_backward(Tensor grad, Tensor slope, Tensor scale, Tensor query, Tensor? ref,"
    " Tensor index, Tensor distance_value, str distance, bool ref_grad=True)"
    " -> (Tensor grad_query, Tensor grad_ref)"
)


def triplet_hinge(violation: Tensor, smooth: bool) -> Tensor:
    """Loss of a triplet: max(v, 0), or log(1 + e^v) if smooth."""
    if not smooth:
        return violation.relu()
    # Above the threshold torch returns v itself: by default from 20 on, where e^-v still shows in
    # float64.
    return torch.nn.functional.softplus(violation, threshold=40.0)


def reduce_triplets(loss: Tensor, valid: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Sum or mean of losses, and the constant that their sum was multiplied with, both 0-d.

    Args:
        loss: losses, [T].
        valid: which of them count; None for all.
        reduction: "mean", "mean_nonzero" or "sum".
    """
    divided = valid
    if reduction == "mean_nonzero":
        active = loss != 0  # true for NaN, which must not drop out
        divided = active if valid is None else active.logical_and_(valid)
    if reduction == "sum":
        scale = loss.new_ones(())
    elif divided is None:
        scale = loss.new_full((), 1 / max(loss.shape[0], 1))
    else:
        scale = divided.sum().clamp_(min=1).to(loss.dtype).reciprocal_()
    return ordered_sum(loss * (scale if valid is None else valid * scale)), scale


def hardest_triplets_fallback(
    query: Tensor,
    query_labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
    margin: float,
    smooth: bool,
    reduction: str,
    keep: bool,
    exact: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::hardest_triplets``.

    Args:
        query: anchors, [N, D].
        query_labels: their classes, [N].
        ref: rows to choose from, [M, D]; None for the anchors.
        ref_labels: their classes, [M].
        distance: name of the distance.
        margin: added to the distance of the positive minus that of the negative.
        smooth: softplus in place of the hinge.
        reduction: "mean", "mean_nonzero" or "sum".
        keep: count anchors that lack a positive (at distance 0) or a negative (as far as the
            positive, so that neither distance moves the loss).
        exact: as in ``flashmetric::hardest``.

    Returns:
        The loss; index and distance as ``flashmetric::hardest`` returns them; the derivative of
        each anchor's loss in its two distances, [2, N]; and the factor of the reduction. Loss and
        derivatives are NaN if any distance is, also one of an anchor that does not count: the
        gradient of that anchor's pair is NaN.
    """
    index, values = hardest_fallback(query, query_labels, ref, ref_labels, distance, exact)
    violation = torch.sub(values[0], values[1]).add_(margin)
    moving = (index >= 0).all(0)
    counted: Tensor | None = moving
    if keep:
        moving, counted = index[1] >= 0, None
        violation = torch.where(moving, violation, margin)
    loss, scale = reduce_triplets(triplet_hinge(violation, smooth), counted, reduction)
    slope = violation.sigmoid() if smooth else (violation > 0).to(values.dtype)
    slope = slope.masked_fill_(moving.logical_not(), 0)
    spoiled = values.isnan().any()
    slopes = torch.stack((slope, -slope)).masked_fill_(spoiled, torch.nan)
    return loss.masked_fill_(spoiled, torch.nan), index, values, slopes, scale


def hardest_triplets_backward_fallback(
    grad: Tensor,
    slope: Tensor,
    scale: Tensor,
    query: Tensor,
    ref: Tensor | None,
    index: Tensor,
    distance_value: Tensor,
    distance: str,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::hardest_triplets_backward``.

    Returns:
        Gradients as ``flashmetric::pair_distance_backward`` returns them.
    """
    return pair_distance_backward_fallback(
        slope * (grad * scale), query, ref, None, index, distance_value, distance, ref_grad
    )


library.impl("hardest_triplets", hardest_triplets_fallback, "CompositeExplicitAutograd")
library.impl(
    "hardest_triplets_backward", hardest_triplets_backward_fallback, "CompositeExplicitAutograd"
)
hardest_triplets = torch.ops.flashmetric.hardest_triplets.default
hardest_triplets_backward = torch.ops.flashmetric.hardest_triplets_backward.default


@torch.library.register_fake("flashmetric::hardest_triplets", lib=library)
def _hardest_triplets_fake(
    query: Tensor, *_: object
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    shape, dtype = (2, query.shape[0]), accumulate_dtype(query.dtype)
    return (
        query.new_empty((), dtype=dtype),
        query.new_empty(shape, dtype=torch.int64),
        query.new_empty(shape, dtype=dtype),
        query.new_empty(shape, dtype=dtype),
        query.new_empty((), dtype=dtype),
    )


@torch.library.register_fake("flashmetric::hardest_triplets_backward", lib=library)
def _hardest_triplets_backward_fake(
    grad: Tensor,
    slope: Tensor,
    scale: Tensor,
    query: Tensor,
    ref: Tensor | None,
    index: Tensor,
    distance_value: Tensor,
    distance: str,
    ref_grad: bool = True,
) -> tuple[Tensor, Tensor]:
    rows = ref.shape[0] if ref is not None and ref_grad else 0
    return query.new_empty(query.shape), query.new_empty((rows, query.shape[1]))


class HardestTriplets(torch.autograd.Function):
    """Reduced margin loss of the hardest triplets, for the reductions to a scalar.

    Takes all arguments of ``flashmetric::hardest_triplets``. The same as :class:`Hardest` followed
    by hinge and mean in PyTorch, as one op: at a few hundred rows some twenty small operations cost
    more time than the kernels.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Loss; saves O(N D), no matrix of pairs."""
        query, _, ref, _, ctx.distance = args[:5]
        loss: Tensor
        loss, index, values, slope, scale = hardest_triplets(*args)
        ctx.save_for_backward(slope, scale, query, ref, index, values)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scatter the gradients of both distances of every anchor."""
        ref_grad = ctx.needs_input_grad[2]
        grad_query, grad_ref = hardest_triplets_backward(
            grad, *ctx.saved_tensors, ctx.distance, ref_grad
        )
        return grad_query, None, grad_ref if ref_grad else None, *(None,) * 7
