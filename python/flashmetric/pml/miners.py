# SPDX-License-Identifier: Apache-2.0
"""The miners of pytorch-metric-learning, fused where the kernels can choose."""

from pytorch_metric_learning import miners as peer
from pytorch_metric_learning.miners import (
    AngularMiner,
    BaseMiner,
    DistanceWeightedMiner,
    EmbeddingsAlreadyPackagedAsTriplets,
    UniformHistogramMiner,
)
from torch import Tensor

from flashmetric import miners
from flashmetric.miners.slabs import RowSlab, listed
from flashmetric.pml.batch import Batch
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_miner import FusedMiner, in_order, mined_pairs, of_signed

__all__ = [
    "AngularMiner",
    "BaseMiner",
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "DistanceWeightedMiner",
    "EmbeddingsAlreadyPackagedAsTriplets",
    "HDCMiner",
    "MultiSimilarityMiner",
    "PairMarginMiner",
    "TripletMarginMiner",
    "UniformHistogramMiner",
]


class BatchEasyHardMiner(FusedMiner, peer.BatchEasyHardMiner):
    """See pytorch-metric-learning."""

    needs_matrix_for_stats = False

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        every = self.ALL in (self.pos_strategy, self.neg_strategy)
        if self.collect_stats and every:
            raise NotFusedError("its statistics are of the distances of all pairs")
        miner = miners.BatchEasyHardMiner(
            self.pos_strategy,
            self.neg_strategy,
            of_signed(self.allowed_pos_range, batch.sign),
            of_signed(self.allowed_neg_range, batch.sign),
        )
        a1, p, a2, n = in_order(miner.mine(mined_pairs(batch), False), batch)
        if self.collect_stats:
            self.set_stats(batch.sign * batch.between(a1, p), batch.sign * batch.between(a2, n))
        return a1, p, a2, n


class BatchHardMiner(BatchEasyHardMiner, peer.BatchHardMiner):
    """See pytorch-metric-learning."""

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        found = super().fused(batch)
        return found[0], found[1], found[3]


class HDCMiner(FusedMiner, peer.HDCMiner):
    """See pytorch-metric-learning."""

    needs_matrix_for_stats = False

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        if self.was_set_externally:
            raise NotFusedError("it chooses from pairs that were set by hand")
        if not 0 < self.filter_percentage <= 1:
            raise NotFusedError(f"filter_percentage is {self.filter_percentage}")
        found = miners.TopRatioMiner(self.filter_percentage).mine(mined_pairs(batch), False)
        self.a1, self.p, self.a2, self.n = found.indices()
        return self.a1, self.p, self.a2, self.n


class MultiSimilarityMiner(FusedMiner, peer.MultiSimilarityMiner):
    """See pytorch-metric-learning."""

    numbers = ("epsilon",)
    needs_matrix_for_stats = False

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        if batch.alone != batch.one_object_of_labels:
            raise NotFusedError("of rows and labels, one has references of its own")
        miner = miners.MultiSimilarityMiner(float(self.epsilon))
        return in_order(miner.mine(mined_pairs(batch), False), batch)


class PairMarginMiner(FusedMiner, peer.PairMarginMiner):
    """See pytorch-metric-learning."""

    numbers = ("pos_margin", "neg_margin")

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        low, high = batch.sign * float(self.pos_margin), batch.sign * float(self.neg_margin)

        def beyond(slab: RowSlab) -> tuple[Tensor, Tensor]:
            # NaN is beyond every margin.
            d = slab.distance
            return slab.positive & ~(d <= low), slab.negative & ~(d >= high)

        return listed(mined_pairs(batch), beyond)


class TripletMarginMiner(FusedMiner, peer.TripletMarginMiner):
    """See pytorch-metric-learning."""

    numbers = ("margin",)

    def fused(self, batch: Batch) -> tuple[Tensor, ...]:
        """See :meth:`FusedMiner.fused`."""
        if self.type_of_triplets not in ("all", "hard", "semihard", "easy"):
            raise NotFusedError(f"type_of_triplets is {self.type_of_triplets!r}")
        miner = miners.TripletMarginMiner(float(self.margin), self.type_of_triplets)
        return in_order(miner.mine(mined_pairs(batch), False), batch)
