# SPDX-License-Identifier: Apache-2.0
"""What ranks tell each other before and while they compute one loss, so that none waits in vain.

Whatever fails on one rank would leave the others in a collective for as long as the group's timeout
is. Everything here therefore travels in vectors of one length whose first number says whether the
sender has failed; a rank that fails sends one such vector more, and all others raise when it
arrives.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import Tensor

from flashmetric.distributed.columns import merge_columns
from flashmetric.distributed.ring import Ring
from flashmetric.distributed.ring_pairs import RingPairs
from flashmetric.distributed.rows import gather_with_gradient
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import LogSumExps, Pairs

_NUMBERS = 8
"""Numbers of a vector of sums: a flag, and up to seven values."""


class RankError(RuntimeError):
    """Another rank has failed, or ranks were given what does not fit together."""


def served_devices(group: dist.ProcessGroup | None) -> list[str]:
    """Types of the devices between which a process group communicates, such as ``"cpu"``."""
    return [pair.split(":")[0] for pair in dist.get_backend_config(group).split(",")]


def check_served(embeddings: Tensor, group: dist.ProcessGroup | None) -> None:
    """Raise unless the group communicates between devices such as that of the embeddings."""
    served = served_devices(group)
    if embeddings.device.type not in served:
        raise ValueError(
            f"embeddings must be on a device that the group serves, one of {served}; "
            f"got {embeddings.device}"
        )


class GroupRanks:
    """The ranks of a process group, which add numbers up in a fixed order."""

    def __init__(self, group: dist.ProcessGroup | None, device: torch.device) -> None:
        """``group``: None for all processes. ``device``: where the tensors of the loss are."""
        self.group, self.device = group, device
        self.size = dist.get_world_size(group)
        self.rank = dist.get_rank(group)
        self.counts = [0] * self.size
        self.one_batch = False
        # Of the references of all ranks, where these go round.
        self.ring_labels: Tensor | None = None

    def pairs(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        rule: str,
        distance: str,
        anchor_scale: Tensor | None,
    ) -> Pairs:
        """All labelled pairs of the anchors of this rank."""
        given = (embeddings, labels, ref_emb, ref_labels, rule, distance, anchor_scale)
        if self.ring_labels is None:
            return AllPairs(*given)
        assert ref_emb is not None
        ring = Ring(self.group, self.counts)
        return RingPairs(
            ring,
            self.settle,
            embeddings,
            labels,
            ref_emb,
            self.ring_labels,
            rule,
            distance,
            anchor_scale,
        )

    def gather(self, values: Tensor) -> Tensor:
        """Values [N] of the anchors of all ranks; the gradient finds its way back."""
        return gather_with_gradient(values, self.counts, self.group, self.settle)

    def merge(self, lse: LogSumExps) -> LogSumExps:
        """Log-sum-exps of references over the anchors of all ranks, alike on all of them."""
        return merge_columns(lse, self.group, self.settle)

    @property
    def begin(self) -> int:
        """Which row of the whole batch is the first anchor of this rank."""
        return sum(self.counts[: self.rank])

    @property
    def anchors(self) -> int:
        """How many anchors this rank has."""
        return self.counts[self.rank]

    def add(self, numbers: Tensor) -> Tensor:
        """Sums over all ranks of a few numbers, float64, shape [K]."""
        if numbers.numel() >= _NUMBERS:
            raise ValueError(f"numbers must be less than {_NUMBERS}, got {numbers.numel()}")
        message = numbers.new_zeros(_NUMBERS)
        message[1 : 1 + numbers.numel()] = numbers
        dist.all_reduce(message, group=self.group)
        # This waits for a GPU. To go on without the rank that failed would be to wait for ever.
        if message[0] != 0:
            raise RankError("another rank has failed while the loss was computed: see its error")
        return message[1 : 1 + numbers.numel()]

    def settle(self) -> None:
        """The last thing that all ranks do, so that a failure anywhere reaches everyone."""
        self.add(torch.zeros(1, dtype=torch.float64, device=self.device))

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """What fails on one rank fails on all of them; at the end they wait for each other."""
        try:
            yield
            self.settle()
        except RankError:
            raise
        except Exception:
            message = torch.full((_NUMBERS,), torch.nan, dtype=torch.float64, device=self.device)
            dist.all_reduce(message, group=self.group)
            raise

    def agree(self, name: str, facts: dict[str, int], error: Exception | None) -> list[list[int]]:
        """Compare facts about this call with those of the other ranks.

        Args:
            name: what is called, for messages.
            facts: integers; those whose key begins with ``"same "`` have to be equal everywhere.
            error: what is wrong with the arguments of this rank.

        Returns:
            The facts of every rank, in the order of ``facts``.

        Raises:
            Exception: ``error``, on its own rank.
            RankError: another rank has an error, or facts differ.
        """
        # Not where the tensors are, which may be in the wrong place.
        device = "cpu" if "cpu" in served_devices(self.group) else "cuda"
        flag = int(error is not None)
        own = torch.tensor([flag, *facts.values()], dtype=torch.int64, device=device)
        every = [torch.empty_like(own) for _ in range(self.size)]
        dist.all_gather(every, own, group=self.group)
        if error is not None:
            raise error
        table = torch.stack(every).tolist()
        failed = [rank for rank, row in enumerate(table) if row[0]]
        if failed:
            raise RankError(f"{name}: wrong arguments on rank {failed[0]}: see its error")
        for place, fact in enumerate(facts, 1):
            values = [row[place] for row in table]
            if fact.startswith("same ") and len(set(values)) > 1:
                what = fact.removeprefix("same ")
                raise RankError(f"{name}: {what} must be the same on all ranks; got {values}")
        return [row[1:] for row in table]
