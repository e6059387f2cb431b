# SPDX-License-Identifier: Apache-2.0
"""Miners: choose pairs or triplets of a batch, for any loss here or in pytorch-metric-learning."""

from flashmetric.miners.base import Miner, PairIndices, TripletIndices
from flashmetric.miners.cluster_negatives import ClusterNegativeMiner
from flashmetric.miners.distance_weighted import DistanceWeightedMiner
from flashmetric.miners.easy_hard import BatchEasyHardMiner
from flashmetric.miners.hard import BatchHardMiner, SemiHardMiner
from flashmetric.miners.margin_violation import MarginViolationMiner, TripletMarginMiner
from flashmetric.miners.multi_similarity import MultiSimilarityMiner
from flashmetric.miners.random_triplets import (
    HardNegativeMiner,
    HardPositiveMiner,
    RandomTripletMiner,
)
from flashmetric.miners.top_ratio import FrackingMiner, TopRatioMiner

__all__ = [
    "BatchEasyHardMiner",
    "BatchHardMiner",
    "ClusterNegativeMiner",
    "DistanceWeightedMiner",
    "FrackingMiner",
    "HardNegativeMiner",
    "HardPositiveMiner",
    "MarginViolationMiner",
    "Miner",
    "MultiSimilarityMiner",
    "PairIndices",
    "RandomTripletMiner",
    "SemiHardMiner",
    "TopRatioMiner",
    "TripletIndices",
    "TripletMarginMiner",
]
