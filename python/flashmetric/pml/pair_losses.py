# SPDX-License-Identifier: Apache-2.0
"""Losses that add up a value per pair: the kernels sum them, and their reducers get the sums."""

from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.reducers import ThresholdReducer

from flashmetric.functional.pairs import Logit, Sums, Term
from flashmetric.pml.batch import Batch
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_loss import FusedPairLoss, LossDict, Sum

__all__ = [
    "ContrastiveLoss",
    "IntraPairVarianceLoss",
    "NTXentLoss",
    "SignalToNoiseRatioContrastiveLoss",
]

# Far below any logit, and still finite: 0 times infinity is NaN.
_NOTHING = -1e30


class _FusedTwoSidedLoss(FusedPairLoss):
    """Positives and negatives are sub-losses of their own."""

    def both(self, sums: Sums, batch: Batch) -> LossDict:
        """The loss dictionary from the sums over all pairs."""
        positive = Sum(sums.positive, sums.positives, sums.active_positives)
        negative = Sum(sums.negative, sums.negatives, sums.active_negatives)
        return {
            "pos_loss": self.reduced("pos_loss", positive, batch),
            "neg_loss": self.reduced("neg_loss", negative, batch),
        }


class ContrastiveLoss(_FusedTwoSidedLoss, peer.ContrastiveLoss):
    """See pytorch-metric-learning."""

    numbers = ("pos_margin", "neg_margin")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        self.reducer_of("pos_loss"), self.reducer_of("neg_loss")
        pos_level, neg_level = (
            batch.sign * float(margin) for margin in (self.pos_margin, self.neg_margin)
        )
        pairs = batch.pairs()
        return self.both(
            pairs.total(Term("hinge", 1.0, -pos_level), Term("hinge", -1.0, neg_level)), batch
        )


class SignalToNoiseRatioContrastiveLoss(ContrastiveLoss, peer.SignalToNoiseRatioContrastiveLoss):
    """See pytorch-metric-learning."""


class IntraPairVarianceLoss(_FusedTwoSidedLoss, peer.IntraPairVarianceLoss):
    """See pytorch-metric-learning. A first sweep finds the means, a second one the loss."""

    numbers = ("pos_eps", "neg_eps")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        self.reducer_of("pos_loss"), self.reducer_of("neg_loss")
        pairs = batch.pairs()
        means = pairs.total(Term("linear"), Term("linear"))
        positive = means.positive / means.positives.clamp(min=1)
        negative = means.negative / means.negatives.clamp(min=1)
        # Of similarities s = -d: (1 - eps) mean(s) - s for positives, s - (1 + eps) mean(s) for
        # negatives; of distances with eps the other way round.
        pos_eps, neg_eps = batch.sign * float(self.pos_eps), batch.sign * float(self.neg_eps)
        return self.both(
            pairs.total(
                Term("squared_hinge", 1.0, -(1 + pos_eps) * positive),
                Term("squared_hinge", -1.0, (1 - neg_eps) * negative),
            ),
            batch,
        )


class NTXentLoss(FusedPairLoss, peer.NTXentLoss):
    """See pytorch-metric-learning."""

    numbers = ("temperature",)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if isinstance(self.reducer_of("loss"), ThresholdReducer):
            raise NotFusedError("which of its losses round to 0, and do not count, is not known")
        scale = 1 / float(self.temperature)
        pairs = batch.pairs()
        negatives = pairs.logsumexp(negative=Logit(-scale)).negative
        # -log(p / (p + n)) = log(1 + e^(log n - log p)), with log n an offset of the anchor.
        offset = negatives.masked_fill(negatives.isneginf(), _NOTHING)
        total = pairs.total(Term("softplus", scale, offset))
        return {"loss": self.reduced("loss", Sum(total.positive, total.positives, None), batch)}
