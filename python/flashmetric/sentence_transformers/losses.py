# SPDX-License-Identifier: Apache-2.0
"""The losses of sentence-transformers, fused where the kernels can compute them."""

from sentence_transformers.sentence_transformer.losses import (
    AdaptiveLayerLoss,
    AnglELoss,
    BatchHardTripletLossDistanceFunction,
    CachedGISTEmbedLoss,
    ContrastiveTensionDataLoader,
    ContrastiveTensionLoss,
    ContrastiveTensionLossInBatchNegatives,
    CoSENTLoss,
    CosineSimilarityLoss,
    DenoisingAutoEncoderLoss,
    DistillKLDivLoss,
    EmbedDistillLoss,
    GISTEmbedLoss,
    GlobalOrthogonalRegularizationLoss,
    MarginMSELoss,
    Matryoshka2dLoss,
    MatryoshkaLoss,
    MegaBatchMarginLoss,
    MSELoss,
    SiameseDistanceMetric,
    SoftmaxLoss,
    TripletDistanceMetric,
    TripletLoss,
)

from flashmetric.sentence_transformers.pair_losses import ContrastiveLoss, OnlineContrastiveLoss
from flashmetric.sentence_transformers.ranking_losses import (
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
)
from flashmetric.sentence_transformers.triplet_losses import (
    BatchAllTripletLoss,
    BatchHardSoftMarginTripletLoss,
    BatchHardTripletLoss,
    BatchSemiHardTripletLoss,
)

__all__ = [
    "AdaptiveLayerLoss",
    "AnglELoss",
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardTripletLossDistanceFunction",
    "BatchSemiHardTripletLoss",
    "CachedGISTEmbedLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "CoSENTLoss",
    "ContrastiveLoss",
    "ContrastiveTensionDataLoader",
    "ContrastiveTensionLoss",
    "ContrastiveTensionLossInBatchNegatives",
    "CosineSimilarityLoss",
    "DenoisingAutoEncoderLoss",
    "DistillKLDivLoss",
    "EmbedDistillLoss",
    "GISTEmbedLoss",
    "GlobalOrthogonalRegularizationLoss",
    "MSELoss",
    "MarginMSELoss",
    "Matryoshka2dLoss",
    "MatryoshkaLoss",
    "MegaBatchMarginLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "OnlineContrastiveLoss",
    "SiameseDistanceMetric",
    "SoftmaxLoss",
    "TripletDistanceMetric",
    "TripletLoss",
]

# Model cards and pickles name a class by its module: this one, that users import.
for _name in __all__:
    if globals()[_name].__module__.startswith("flashmetric."):
        globals()[_name].__module__ = __name__
