# SPDX-License-Identifier: Apache-2.0
"""Deep metric learning losses for PyTorch whose memory does not grow with the square of the batch.

``TripletMarginLoss`` and ``ContrastiveLoss`` are modules; :mod:`flashmetric.functional` has the
same losses as functions, and :mod:`flashmetric.reference` as textbook formulas to compare with.
"""

from flashmetric import _library, distances, functional, labels, miners, ops, reference
from flashmetric.functional import pair_loss, pair_weights
from flashmetric.grad_cache import GradCache, grad_cache
from flashmetric.losses import (
    AdaptiveWeightedTripletLoss,
    AngularLoss,
    BinomialDevianceLoss,
    CircleLoss,
    ContrastiveImageTextLoss,
    ContrastiveLoss,
    CosineContrastiveLoss,
    CosineEmbeddingLoss,
    CosineTargetLoss,
    ExponentialContrastiveLoss,
    FastAPLoss,
    GeneralizedLiftedStructureLoss,
    InfoNCELoss,
    LearnedTemperature,
    LiftedStructureLoss,
    LMNNLoss,
    LogisticDistanceLoss,
    MarginLoss,
    MultiSimilarityLoss,
    NCALoss,
    NPairsLoss,
    NTXentLoss,
    PairHingeLoss,
    PairLoss,
    QuadrupletLoss,
    RankedListLoss,
    SigLIPLoss,
    SigmoidVerificationLoss,
    SNRContrastiveLoss,
    SoftTripletLoss,
    SupConLoss,
    TripletMarginLoss,
    TripletQuotientLoss,
    TripletRatioLoss,
    VerificationLoss,
)
from flashmetric.memory import CrossBatchMemory
from flashmetric.momentum_queue import MomentumQueue

__version__ = "0.1.0"
__all__ = [
    "AdaptiveWeightedTripletLoss",
    "AngularLoss",
    "BinomialDevianceLoss",
    "CircleLoss",
    "ContrastiveImageTextLoss",
    "ContrastiveLoss",
    "CosineContrastiveLoss",
    "CosineEmbeddingLoss",
    "CosineTargetLoss",
    "CrossBatchMemory",
    "ExponentialContrastiveLoss",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "GradCache",
    "InfoNCELoss",
    "LMNNLoss",
    "LearnedTemperature",
    "LiftedStructureLoss",
    "LogisticDistanceLoss",
    "MarginLoss",
    "MomentumQueue",
    "MultiSimilarityLoss",
    "NCALoss",
    "NPairsLoss",
    "NTXentLoss",
    "PairHingeLoss",
    "PairLoss",
    "QuadrupletLoss",
    "RankedListLoss",
    "SNRContrastiveLoss",
    "SigLIPLoss",
    "SigmoidVerificationLoss",
    "SoftTripletLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletQuotientLoss",
    "TripletRatioLoss",
    "VerificationLoss",
    "distances",
    "functional",
    "grad_cache",
    "labels",
    "miners",
    "ops",
    "pair_loss",
    "pair_weights",
    "reference",
]

# The ops are defined by now; the library adds implementations to them.
_library.load_native()
