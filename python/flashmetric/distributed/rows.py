# SPDX-License-Identifier: Apache-2.0
"""Rows of all ranks, with the way back for their gradients."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def gather_rows(rows: Tensor, counts: list[int], group: dist.ProcessGroup | None) -> Tensor:
    """Concatenate the rows of all ranks, of which rank r has ``counts[r]``; without a gradient."""
    most = max(counts)
    padded = rows.new_zeros((most, *rows.shape[1:]))
    padded[: len(rows)] = rows
    every = [torch.empty_like(padded) for _ in counts]
    dist.all_gather(every, padded, group=group)
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
        most, rank = max(counts), dist.get_rank(ctx.group)
        parts = grad.new_zeros((len(counts), most, *grad.shape[1:]))
        for part, own, count in zip(parts, grad.split(counts), counts, strict=True):
            part[:count] = own
        own = torch.empty_like(parts[0])
        if dist.get_backend(ctx.group) == "gloo":
            # Gloo has no reduce-scatter.
            dist.all_reduce(parts, group=ctx.group)
            own = parts[rank]
        else:
            dist.reduce_scatter_tensor(own, parts, group=ctx.group)
        return own[: counts[rank]], None, None
