# SPDX-License-Identifier: Apache-2.0
"""Drop-in for the losses of sentence-transformers 6: the same classes, computed by fused kernels.

Change the import, nothing else::

    from flashmetric.sentence_transformers import losses

    loss = losses.MultipleNegativesRankingLoss(model)
    trainer = SentenceTransformerTrainer(model=model, train_dataset=pairs, loss=loss)

Every class is that of sentence-transformers or a subclass of the same name, with its arguments,
defaults, attributes, configuration and call, so that the trainer and losses that wrap losses know
it; a model card names the class of this module. What the kernels cannot compute, such as a
similarity function of your own, is left to the parent's own code; a warning, once per object, says
why.

Where the parent's formula is defined, value and gradients are its own up to rounding. Each class
says where they differ. In all of them: rows of float16 and bfloat16 are widened before they are
compared, also under autocast, and the loss is float32; second derivatives raise.
"""

try:
    import sentence_transformers.sentence_transformer.losses as _  # noqa: F401
except ModuleNotFoundError as error:
    if (error.name or "").split(".")[0] != "sentence_transformers":
        raise
    raise ImportError(
        "flashmetric.sentence_transformers needs sentence-transformers 6, which is not installed; "
        "install it with: python -m pip install 'flashmetric[sentence-transformers]'"
    ) from error

from flashmetric.sentence_transformers import losses
from flashmetric.sentence_transformers.fallback import NotFusedWarning
from flashmetric.sentence_transformers.losses import (
    BatchAllTripletLoss,
    BatchHardSoftMarginTripletLoss,
    BatchHardTripletLoss,
    BatchHardTripletLossDistanceFunction,
    BatchSemiHardTripletLoss,
    CachedMultipleNegativesRankingLoss,
    CachedMultipleNegativesSymmetricRankingLoss,
    ContrastiveLoss,
    MultipleNegativesRankingLoss,
    MultipleNegativesSymmetricRankingLoss,
    OnlineContrastiveLoss,
    SiameseDistanceMetric,
)

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchHardTripletLossDistanceFunction",
    "BatchSemiHardTripletLoss",
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "ContrastiveLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
    "NotFusedWarning",
    "OnlineContrastiveLoss",
    "SiameseDistanceMetric",
    "losses",
]
