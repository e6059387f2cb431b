# SPDX-License-Identifier: Apache-2.0
"""Blocks of rows that go round the ranks, with or without sums of gradients that follow them."""

from collections.abc import Callable, Generator

import torch
import torch.distributed as dist
from torch import Tensor


class Ring:
    """The order in which ranks pass blocks on: to the next, from the one before."""

    def __init__(self, group: dist.ProcessGroup | None, counts: list[int]) -> None:
        """``counts``: rows of each rank."""
        self.group, self.counts = group, counts
        self.rank, self.size = dist.get_rank(group), len(counts)
        ranks = range(self.size) if group is None else dist.get_process_group_ranks(group)
        self._next = ranks[(self.rank + 1) % self.size]
        self._before = ranks[(self.rank - 1) % self.size]

    def rounds(
        self, rows: Tensor, settle: Callable[[], None] | None = None
    ) -> Generator[tuple[int, Tensor], None, None]:
        """The block of every rank in turn, own first; the next one travels in the meantime.

        Yields the rank and its rows, which the round after the next overwrites. Two blocks are held
        at a time, besides the rows. ``settle`` raises if another rank has failed; nothing that it
        could not tell of, as of memory that runs out, happens afterwards.
        """
        here, stopped = self._padded(rows), False
        places = [torch.empty_like(here)] if self.size > 1 else []
        if self.size > 2:
            places.append(torch.empty_like(here) if here is rows else here)
        if settle is not None:
            settle()
        for step in range(self.size):
            owner = (self.rank - step) % self.size
            arriving, wait = here, _nothing
            if step + 1 < self.size:
                arriving = places[step % len(places)]
                wait = self._pass_on(here, arriving)
            try:
                if not stopped:
                    yield owner, here[: self.counts[owner]]
            except GeneratorExit:
                # Whoever needs no more blocks still passes them on.
                stopped = True
            wait()
            here = arriving

    def rounds_with_sums(
        self, rows: Tensor, add: Callable[[int, Tensor], Tensor], dtype: torch.dtype
    ) -> Tensor:
        """Sums over all ranks of what each adds to the rows of every other.

        Args:
            rows: the block of this rank.
            add: called with a rank and its rows; returns what this rank adds for each of them.
            dtype: of the sums.

        Returns:
            The sums of this rank's own rows.
        """
        most = max(self.counts)
        sums = torch.zeros((most, *rows.shape[1:]), dtype=dtype, device=rows.device)
        spare = torch.empty_like(sums) if self.size > 1 else sums
        for owner, block in self.rounds(rows):
            arriving, wait = sums, _nothing
            if owner != self.rank:
                # What the ranks before have found of this block travels while this one adds to it.
                arriving, spare = spare, sums
                wait = self._pass_on(sums, arriving)
            own = add(owner, block)
            wait()
            sums = arriving
            sums[: self.counts[owner]] += own
        if self.size > 1:
            self._pass_on(sums, spare)()
            sums = spare
        return sums[: self.counts[self.rank]]

    def largest(self, number: int, device: torch.device, settle: Callable[[], None]) -> int:
        """The largest of the numbers that the ranks have; waits for them."""
        largest = torch.tensor(number, device=device)
        settle()
        dist.all_reduce(largest, dist.ReduceOp.MAX, self.group)
        return int(largest)

    def _padded(self, rows: Tensor) -> Tensor:
        if len(rows) == max(self.counts):
            return rows.contiguous()
        padded = rows.new_zeros((max(self.counts), *rows.shape[1:]))
        padded[: len(rows)] = rows
        return padded

    def _pass_on(self, leaving: Tensor, arriving: Tensor) -> Callable[[], None]:
        works = dist.batch_isend_irecv(
            [
                dist.P2POp(dist.isend, leaving, self._next, self.group),
                dist.P2POp(dist.irecv, arriving, self._before, self.group),
            ]
        )

        def wait() -> None:
            for work in works:
                work.wait()

        return wait


def _nothing() -> None:
    pass
