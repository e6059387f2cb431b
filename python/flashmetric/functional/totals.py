# SPDX-License-Identifier: Apache-2.0
"""Sums and counts over all anchors of a batch, also of one whose anchors are on several ranks.

Every loss that is a mean takes its totals from here. Inside of :func:`across` the anchors of a
process are a part of the batch: totals and counts are those of all ranks, and a total passes its
gradient to the anchors of its own rank, so that the gradients of all ranks add up to that of the
whole batch.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, Protocol

import torch
from torch import Tensor

from flashmetric.functional.pairs import LogSumExps, Pairs, Sums
from flashmetric.ops.ordered_sum import ordered_sum


class Ranks(Protocol):
    """What adds numbers up over ranks."""

    one_batch: bool
    """Whether the references are the anchors of all ranks, in the order of the ranks."""

    def add(self, numbers: Tensor) -> Tensor:
        """Sums over all ranks of a few numbers, float64, shape [K]."""

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

    def gather(self, values: Tensor) -> Tensor:
        """Values [N] of the anchors of all ranks; the gradient finds its way back."""

    def merge(self, lse: LogSumExps) -> LogSumExps:
        """Log-sum-exps of references over the anchors of all ranks, alike on all of them."""

    @property
    def begin(self) -> int:
        """Which row of the whole batch is the first anchor of this rank."""

    @property
    def anchors(self) -> int:
        """How many anchors this rank has."""


_ranks: ContextVar[Ranks | None] = ContextVar("flashmetric_ranks", default=None)


@contextmanager
def across(ranks: Ranks) -> Iterator[None]:
    """Within this context, totals and counts are those of all ranks."""
    token = _ranks.set(ranks)
    try:
        yield
    finally:
        _ranks.reset(token)


def current_ranks() -> Ranks | None:
    """The ranks over which totals are taken now, or None."""
    # A compiler does not follow context variables.
    return None if torch.compiler.is_compiling() else _ranks.get()


class _AddAcross(torch.autograd.Function):
    """Numbers summed over ranks; each rank differentiates its own share."""

    @staticmethod
    def forward(ctx: Any, numbers: Tensor, ranks: Ranks) -> Tensor:
        return ranks.add(numbers)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def _added(numbers: Tensor, ranks: Ranks) -> Tensor:
    added: Tensor = _AddAcross.apply(numbers, ranks)  # type: ignore[no-untyped-call]
    return added


def total_of(values: Tensor) -> Tensor:
    """Sum of the values [N] of the anchors, in an order that no number of threads changes."""
    total, ranks = ordered_sum(values), current_ranks()
    if ranks is None:
        return total
    return _added(total.double().reshape(1), ranks).to(total.dtype).squeeze(0)


def count_of(values: Tensor) -> Tensor:
    """Sum of counts or flags of the anchors; without a gradient."""
    count, ranks = values.detach().sum(), current_ranks()
    if ranks is None:
        return count
    return ranks.add(count.double().reshape(1)).to(count.dtype).squeeze(0)


def number_of_anchors(values: Tensor) -> Tensor:
    """How many anchors there are, int64, given something [N] of them."""
    return count_of(torch.ones_like(values, dtype=torch.int64))


def one_batch(ref_emb: Tensor | None) -> bool:
    """Whether the references are the anchors themselves, here or of all ranks."""
    ranks = current_ranks()
    return ref_emb is None if ranks is None else ranks.one_batch


def of_references(values: Tensor) -> Tensor:
    """Values [N] of the anchors as those of the references, where these are one batch."""
    ranks = current_ranks()
    return values if ranks is None else ranks.gather(values)


def over_all_anchors(lse: LogSumExps) -> LogSumExps:
    """Log-sum-exps of the references over the anchors here, as those over all anchors.

    All ranks have them alike, and each differentiates its own share: sums of what follows from them
    are the whole batch's already, and no business of :func:`total_of`.
    """
    ranks = current_ranks()
    return lse if ranks is None else ranks.merge(lse)


def of_own_anchors(values: Tensor) -> Tensor:
    """Of values of the whole batch those of this rank's anchors."""
    ranks = current_ranks()
    if ranks is None or not ranks.one_batch:
        return values
    return values[ranks.begin : ranks.begin + ranks.anchors]


def totals_of(sums: Sums) -> Sums:
    """Totals that one process has of its anchors, over all ranks."""
    ranks = current_ranks()
    if ranks is None:
        return sums
    values = _added(torch.stack([value.double() for value in sums]), ranks)
    return Sums(*(value.to(own.dtype) for value, own in zip(values, sums, strict=True)))
