# SPDX-License-Identifier: Apache-2.0
"""What becomes of the losses of the anchors: a mean, a sum, or themselves; and their softplus."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.ops.ordered_sum import ordered_sum

Reduction = Literal["mean", "mean_nonzero", "sum", "none"]
REDUCTIONS = get_args(Reduction)


def reduce_anchors(loss: Tensor, counted: Tensor | None, reduction: Reduction) -> Tensor:
    """Reduce losses [N] of the anchors; those not ``counted`` are left out, with no gradient.

    The mean of nothing is 0, attached to the graph. Sums do not depend on the number of threads.
    """
    if counted is not None:
        loss = loss.where(counted, loss.new_zeros(()))
    if reduction == "none":
        return loss
    total = ordered_sum(loss)
    if reduction == "sum":
        return total
    if reduction == "mean_nonzero":
        count = (loss > 0).sum()
    else:
        count = loss.new_full((), len(loss)) if counted is None else counted.sum()
    return total / count.clamp(min=1)


def both_finite(first: Tensor, second: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Where neither of two log-sum-exps is of nothing, and both with 0 in place of nothing.

    NaN counts as something: it must show.
    """
    some = (first != -torch.inf) & (second != -torch.inf)
    zero = first.new_zeros(())
    return some, first.where(some, zero), second.where(some, zero)


def softplus(z: Tensor) -> Tensor:
    """log(1 + e^z).

    Not torch's own: that is z above its threshold of 20, which float64 can tell, and e^z overflows
    if the threshold is raised.
    """
    return torch.logaddexp(z, torch.zeros_like(z))


def straight_through(value: Tensor, slope: Tensor) -> Tensor:
    """``value`` with the gradient of ``slope``."""
    return value.detach() + (slope - slope.detach())
