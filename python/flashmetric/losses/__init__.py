# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: hyper-parameters in the constructor, :mod:`functional` does the rest."""

from flashmetric.losses.base import Loss
from flashmetric.losses.contrastive import ContrastiveLoss
from flashmetric.losses.log_sum_exp import (
    AdaptiveWeightedTripletLoss,
    GeneralizedLiftedStructureLoss,
    LiftedStructureLoss,
    MultiSimilarityLoss,
    NCALoss,
    RankedListLoss,
)
from flashmetric.losses.margin import MarginLoss
from flashmetric.losses.pair_loss import PairLoss
from flashmetric.losses.pairwise import (
    BinomialDevianceLoss,
    CosineContrastiveLoss,
    CosineEmbeddingLoss,
    CosineTargetLoss,
    ExponentialContrastiveLoss,
    LogisticDistanceLoss,
    SNRContrastiveLoss,
)
from flashmetric.losses.ranking import FastAPLoss, QuadrupletLoss
from flashmetric.losses.siglip import SigLIPLoss
from flashmetric.losses.soft_triple import SoftTripleLoss, SoftTripletLoss
from flashmetric.losses.softmax import (
    AngularLoss,
    CircleLoss,
    ContrastiveImageTextLoss,
    InfoNCELoss,
    NPairsLoss,
    NTXentLoss,
    SupConLoss,
)
from flashmetric.losses.temperature import LearnedTemperature
from flashmetric.losses.triplets import (
    LMNNLoss,
    TripletMarginLoss,
    TripletQuotientLoss,
    TripletRatioLoss,
)
from flashmetric.losses.verification import PairHingeLoss, SigmoidVerificationLoss, VerificationLoss

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
    "ExponentialContrastiveLoss",
    "FastAPLoss",
    "GeneralizedLiftedStructureLoss",
    "InfoNCELoss",
    "LMNNLoss",
    "LearnedTemperature",
    "LiftedStructureLoss",
    "LogisticDistanceLoss",
    "Loss",
    "MarginLoss",
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
    "SoftTripleLoss",
    "SoftTripletLoss",
    "SupConLoss",
    "TripletMarginLoss",
    "TripletQuotientLoss",
    "TripletRatioLoss",
    "VerificationLoss",
]
