# SPDX-License-Identifier: Apache-2.0
"""What becomes of the losses of the anchors: a mean, a sum, or themselves; and their softplus."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.functional.totals import (
    count_of,
    current_ranks,
    number_of_anchors,
    total_of,
)
from flashmetric.ops.hardest_triplets import reduce_triplets

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
    total = total_of(loss)
    if reduction == "sum":
        return total
    if reduction == "mean_nonzero":
        count = count_of(loss > 0)
    else:
        count = number_of_anchors(loss) if counted is None else count_of(counted)
    return total / count.clamp(min=1)


def reduce_listed(loss: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """Sum, mean or mean over those that are not 0 of the losses [T] of triplets."""
    if current_ranks() is None:
        return reduce_triplets(loss, valid, reduction)[0]
    counted = torch.ones_like(loss, dtype=torch.bool) if valid is None else valid
    total = total_of(loss if valid is None else loss * valid)
    if reduction == "sum":
        return total
    if reduction == "mean_nonzero":
        counted = counted & (loss != 0)  # true for NaN, which must not drop out
    return total / count_of(counted).clamp(min=1)


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
