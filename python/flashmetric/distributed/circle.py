# SPDX-License-Identifier: Apache-2.0
"""Sweeps over the blocks of all ranks, as they come round, and back."""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any

import torch
from torch import Tensor

from flashmetric.distributed.ring import Ring
from flashmetric.ops.distance import accumulate_dtype


class Circle:
    """What all sweeps of one call share: the ring, labels of all rows, rule and distance."""

    def __init__(
        self,
        ring: Ring,
        settle: Callable[[], None],
        labels: Tensor,
        ref_labels: Tensor,
        rule: str,
        distance: str,
    ) -> None:
        """Bind them.

        Args:
            ring: the ranks.
            settle: raises if another rank has failed.
            labels: of the anchors.
            ref_labels: of the rows of all ranks, in the order of the ranks.
            rule: how labels are compared.
            distance: what is measured.
        """
        self._settle = settle
        self.ring, self.labels, self.rule, self.distance = ring, labels, rule, distance
        self.of_rank = ref_labels.split(ring.counts)
        begins = torch.tensor([0, *ring.counts]).cumsum(0).tolist()
        self.begin: list[int] = begins[:-1]

    @contextmanager
    def rounds(self, rows: Tensor) -> Iterator[Iterator[tuple[int, Tensor]]]:
        """:meth:`Ring.rounds`, which end on all ranks even if one of them fails meanwhile."""
        with closing(self.ring.rounds(rows.detach(), self._settle)) as rounds:
            yield rounds

    def pairs(self, x: Tensor, owner: int, block: Tensor) -> tuple[Any, ...]:
        """The leading arguments of all ops."""
        return x, self.labels, block, self.of_rank[owner], self.rule, self.distance


def added(
    circle: Circle, x: Tensor, refs: Tensor, sweep: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Sums over the blocks of what ``sweep(*pairs)`` finds in each."""
    results: tuple[Tensor, ...] | None = None
    with circle.rounds(refs) as rounds:
        for owner, block in rounds:
            part = sweep(*circle.pairs(x, owner, block))
            if results is not None:
                part = tuple(a + b for a, b in zip(results, part, strict=True))
            results = part
    assert results is not None
    return results


def back(
    circle: Circle, x: Tensor, refs: Tensor, sweep: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and of own references; ``sweep(owner, block)`` gives those of one."""
    dtype = accumulate_dtype(x.dtype)
    of_x = torch.zeros(x.shape, dtype=dtype, device=x.device)

    def add(owner: int, block: Tensor) -> Tensor:
        grad_x, grad_block = sweep(owner, block)
        of_x.add_(grad_x)
        grads: Tensor = grad_block.to(dtype)
        return grads

    of_refs = circle.ring.rounds_with_sums(refs, add, dtype)
    return of_x.to(x.dtype), of_refs.to(refs.dtype)
