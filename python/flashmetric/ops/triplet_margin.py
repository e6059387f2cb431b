# SPDX-License-Identifier: Apache-2.0
"""The margin loss of mined triplets from their distances, reduced, with its derivative."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.hardest import hardest
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.pair_distance import pair_distance_backward

library.define(
    "triplet_margin(Tensor index, Tensor distance, float margin, bool smooth, str reduction,"
    " bool keep) -> (Tensor loss, Tensor grad_distance)"
)


def triplet_hinge(violation: Tensor, smooth: bool) -> Tensor:
    """Loss of a triplet: max(v, 0), or log(1 + e^v) if smooth."""
    if not smooth:
        return violation.relu()
    # Above the threshold torch returns v itself: by default from 20 on, where e^-v still shows in
    # float64.
    return torch.nn.functional.softplus(violation, threshold=40.0)


def triplet_weights(loss: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """What each triplet's loss is multiplied with before all are added, [T].

    Args:
        loss: losses, [T].
        valid: which of them count; None for all.
        reduction: "mean", "mean_nonzero" or "sum".
    """
    if reduction == "mean_nonzero":
        active = loss != 0  # true for NaN, which must not drop out
        valid = active if valid is None else active.logical_and_(valid)
    if valid is None:
        return torch.full_like(loss, 1 if reduction == "sum" else 1 / max(loss.shape[0], 1))
    weight = valid.to(loss.dtype)
    return weight if reduction == "sum" else weight.div_(valid.sum().clamp_(min=1))


def triplet_margin_fallback(
    index: Tensor, distance: Tensor, margin: float, smooth: bool, reduction: str, keep: bool
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::triplet_margin``.

    Args:
        index: what ``hardest`` found, int64 [2, N]; -1 for nothing.
        distance: the distances it found, [2, N].
        margin: added to the distance of the positive minus that of the negative.
        smooth: softplus in place of the hinge.
        reduction: "mean", "mean_nonzero" or "sum".
        keep: count anchors that lack a positive (at distance 0) or a negative (as far as the
            positive, so that neither distance moves the loss).

    Returns:
        The loss and its derivative in the distances, [2, N]. All are NaN if any distance is, also
        one of an anchor that does not count: the gradient of that anchor's pair is NaN.
    """
    violation = torch.sub(distance[0], distance[1]).add_(margin)
    moving = (index >= 0).all(0)
    counted: Tensor | None = moving
    if keep:
        moving, counted = index[1] >= 0, None
        violation = torch.where(moving, violation, margin)
    loss = triplet_hinge(violation, smooth)
    weight = triplet_weights(loss, counted, reduction)
    slope = violation.sigmoid() if smooth else (violation > 0).to(loss.dtype)
    slope = slope.mul_(weight).masked_fill_(moving.logical_not(), 0)
    spoiled = distance.isnan().any()
    total = ordered_sum(loss * weight).masked_fill_(spoiled, torch.nan)
    return total, torch.stack((slope, -slope)).masked_fill_(spoiled, torch.nan)


library.impl("triplet_margin", triplet_margin_fallback, "CompositeExplicitAutograd")
triplet_margin = torch.ops.flashmetric.triplet_margin.default


@torch.library.register_fake("flashmetric::triplet_margin", lib=library)
def _triplet_margin_fake(_index: Tensor, distance: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return distance.new_empty(()), distance.new_empty(distance.shape)


class HardestTriplets(torch.autograd.Function):
    """Reduced margin loss of the hardest triplets, for the reductions to a scalar.

    Arguments: (query, query_labels, ref, ref_labels, distance, margin, smooth, reduction, keep).
    The same as :class:`Hardest` followed by hinge and mean in PyTorch, as one node: at a few
    hundred rows some twenty small operations cost more time than the kernels.
    """

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Loss and its derivative in the distances."""
        query, _, ref, _, ctx.distance = args[:5]
        index, values = hardest(*args[:5])
        loss: Tensor
        loss, of_values = triplet_margin(index, values, *args[5:])
        ctx.save_for_backward(query, ref, index, values, of_values)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scatter the gradients of both distances of every anchor."""
        query, ref, index, values, of_values = ctx.saved_tensors
        ref_grad = ctx.needs_input_grad[2]
        grad_query, grad_ref = pair_distance_backward(
            of_values * grad, query, ref, None, index, values, ctx.distance, ref_grad
        )
        return grad_query, None, grad_ref if ref_grad else None, *(None,) * 6
