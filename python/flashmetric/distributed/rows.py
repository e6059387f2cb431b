# SPDX-License-Identifier: Apache-2.0
"""Rows of all ranks, with the way back for their gradients."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(
    rows: Tensor, counts: list[int], group: dist.ProcessGroup | None, settle: Callable[[], None]
) -> Tensor:
    """Concatenate the rows of all ranks, of which rank r has ``counts[r]``; without a gradient.

    ``settle`` raises if another rank has failed. It comes between what needs memory and what needs
    the others: whoever runs out of memory keeps nobody waiting.
    """
    most, equal = max(counts), min(counts) == max(counts)
    if not equal:
        padded = rows.new_zeros((most, *rows.shape[1:]))
        padded[: len(rows)] = rows
        rows = padded
    rows = rows.contiguous()
    every = rows.new_empty((len(counts), most, *rows.shape[1:]))
    parts = list(every.unbind())
    settle()
    dist.all_gather(parts, rows, group=group)
    if equal:
        return every.flatten(0, 1)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def gather_with_gradient(
    rows: Tensor, counts: list[int], group: dist.ProcessGroup | None, settle: Callable[[], None]
) -> Tensor:
    """:func:`gather_rows`; backward gives each rank the sum of all ranks' gradients of its rows."""
    every: Tensor = _GatherRows.apply(  # type: ignore[no-untyped-call]
        rows, counts, group, settle
    )
    return every


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        counts: list[int],
        group: dist.ProcessGroup | None,
        settle: Callable[[], None],
    ) -> Tensor:
        ctx.counts, ctx.group = counts, group
        return gather_rows(rows.detach(), counts, group, settle)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
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
        return own[: counts[dist.get_rank(ctx.group)]], None, None, None
