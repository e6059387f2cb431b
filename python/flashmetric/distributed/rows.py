# SPDX-License-Identifier: Apache-2.0
"""Rows of all ranks, with the way back for their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, of which rank r has ``counts[r]``; without a gradient."""
    most, equal = max(counts), min(counts) == max(counts)
    if not equal:
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        rows = padded
    every = rows.new_empty((len(counts), most, *rows.shape[1:]))
    dist.all_gather(list(every.unbind()), rows.contiguous(), group=group)
    if equal:
        return every.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(every, counts, strict=True)])


def gather_with_gradient(
    rows: Tensor, counts: list[int], group: dist.ProcessGroup | None
) -> Tensor:
    """:func:`gather_rows`; backward gives each rank the sum of all ranks' gradients of its rows."""
    every: Tensor = _GatherRows.apply(rows, counts, group)  # type: ignore[no-untyped-call]
    return every


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: Tensor, counts: list[int], group: dist.ProcessGroup | None
    ) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(rows.detach(), counts, group)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        counts: list[int] = ctx.counts
        most = max(counts)
        parts = list(grad.contiguous().split(counts))
        if min(counts) < most:
            # All of one size, whatever is behind the rows.
            parts = [grad.new_zeros((most, *grad.shape[1:])) for _ in counts]
            for part, of_rank in zip(parts, grad.split(counts), strict=True):
                part[: len(of_rank)] = of_rank
        own = torch.empty_like(parts[0])
        dist.reduce_scatter(own, parts, group=ctx.group)
        return own[: counts[dist.get_rank(ctx.group)]], None, None
