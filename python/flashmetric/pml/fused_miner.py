# SPDX-License-Identifier: Apache-2.0
"""What the fused miners share: the try, the fallback, and results in the parent's order."""

from typing import Any

from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.indices import PairIndices, TripletIndices, is_ascending
from flashmetric.miners.mined_pairs import MinedPairs
from flashmetric.pml.batch import Batch
from flashmetric.pml.fallback import NotFusedError, check_not_overridden, check_numbers, report

__all__ = ["FusedMiner", "in_order", "mined_pairs", "of_signed"]


class FusedMiner:
    """Put before a miner of pytorch-metric-learning: tries :meth:`fused`, else leaves it."""

    numbers: tuple[str, ...] = ()
    """Attributes that must not be tensors."""
    needs_matrix_for_stats = True
    """Whether its statistics are of all distances."""

    distance: Any
    collect_stats: bool

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """The indices, or :class:`NotFusedError` before anything costly."""
        raise NotImplementedError

    def mine(
        self, embeddings: Tensor, labels: Tensor, ref_emb: Tensor, ref_labels: Tensor
    ) -> tuple[Tensor, ...]:
        """See :meth:`fused`; the parent's own if that cannot be."""
        try:
            check_not_overridden(self)
            check_numbers(self, *self.numbers)
            if self.collect_stats and self.needs_matrix_for_stats:
                raise NotFusedError("its statistics are of the distances of all pairs")
            return self.fused(Batch(self.distance, embeddings, labels, None, ref_emb, ref_labels))
        except NotFusedError as reason:
            report(self, reason)
        return self._parents(embeddings, labels, ref_emb, ref_labels)

    def _parents(self, *call: Any) -> tuple[Tensor, ...]:
        mined: tuple[Tensor, ...] = super().mine(*call)  # type: ignore[misc]
        return mined


def mined_pairs(batch: Batch) -> MinedPairs:
    """All pairs of a call as miners see them."""
    pairs = batch.pairs()
    if not isinstance(pairs, AllPairs):
        raise NotFusedError("explicit matrices were asked for")
    return MinedPairs.of(pairs)


def in_order(found: PairIndices | TripletIndices, batch: Batch) -> tuple[Tensor, ...]:
    """What was found, sorted by anchor, then by the other rows."""
    columns = found.indices()
    width = max(1, batch.references)
    if len(columns) == 3:
        a, p, n = columns
        order = n.argsort(stable=True)
        order = order[(a * width + p)[order].argsort(stable=True)]
        return a[order], p[order], n[order]
    a1, p, a2, n = columns
    return *_sorted(a1, p, width), *_sorted(a2, n, width)


def _sorted(anchor: Tensor, other: Tensor, width: int) -> tuple[Tensor, Tensor]:
    key = anchor * width + other
    if is_ascending(key):
        return anchor, other
    order = key.argsort()
    return anchor[order], other[order]


def of_signed(limits: tuple[float, float] | None, sign: int) -> tuple[float, float] | None:
    """Limits on the peer's distances as limits on the kernel's, which may be minus those."""
    if limits is None or sign > 0:
        return None if limits is None else (float(limits[0]), float(limits[1]))
    return -float(limits[1]), -float(limits[0])
