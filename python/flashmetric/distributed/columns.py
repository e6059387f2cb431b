# SPDX-License-Identifier: Apache-2.0
"""Log-sum-exps of references whose anchors are on several ranks."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashmetric.functional.pairs import LogSumExps


def merge_columns(
    lse: LogSumExps, group: dist.ProcessGroup | None, settle: Callable[[], None]
) -> LogSumExps:
    r"""Log-sum-exps over the anchors of all ranks from those over the anchors of each.

    .. math::
        L_j = \log \sum_r e^{L_j^{(r)}}, \qquad
        \frac{\partial L_j}{\partial L_j^{(r)}} = e^{L_j^{(r)} - L_j}

    The result is the same on all ranks, and so has to be what is computed from it: each rank then
    differentiates its own share, and the gradients of all ranks add up.

    Args:
        lse: of every reference [M], over the anchors of this rank.
        group: the ranks.
        settle: raises if another rank has failed.

    Returns:
        The same over the anchors of all ranks. Communicates 64 bytes for each reference.
    """
    values = torch.stack([lse.positive, lse.negative])
    means = torch.stack([lse.positive_mean, lse.negative_mean])
    counts = torch.stack([lse.positives, lse.negatives])
    merged, means, counts = _Merge.apply(  # type: ignore[no-untyped-call]
        values, means, counts, group, settle
    )
    return LogSumExps(*merged.unbind(), *means.unbind(), *counts.unbind())


class _Merge(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        lse: Tensor,
        mean: Tensor,
        counts: Tensor,
        group: dist.ProcessGroup | None,
        settle: Callable[[], None],
    ) -> tuple[Tensor, Tensor, Tensor]:
        own = lse.double()
        # The largest of several may pass NaN by; infinity comes back as NaN below.
        top = own.masked_fill(own.isnan(), torch.inf)
        settle()
        dist.all_reduce(top, dist.ReduceOp.MAX, group)
        shift = top.masked_fill(top == -torch.inf, 0)
        share = (own - shift).exp()
        sums = torch.cat([share, share * mean, counts.double()])
        settle()
        dist.all_reduce(sums, group=group)
        total, moment, number = sums.split(2)
        merged = shift + total.log()
        mean_of_all = (moment / total).masked_fill(total == 0, 0).to(lse.dtype)
        counts_of_all = number.to(counts.dtype)
        ctx.save_for_backward((own - merged).exp().masked_fill(total == 0, 0).to(lse.dtype))
        ctx.mark_non_differentiable(mean_of_all, counts_of_all)
        return merged.to(lse.dtype), mean_of_all, counts_of_all

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        (share,) = ctx.saved_tensors
        # A weight of 0 is no gradient, whatever a log-sum-exp over nothing has been asked for.
        return (grad * share).masked_fill(share == 0, 0), None, None, None, None
