# SPDX-License-Identifier: Apache-2.0
"""Losses with one value per anchor, made of log-sum-exps: any reducer takes these values."""

import math
from typing import Any

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.utils import common_functions
from torch import Tensor

from flashmetric.functional.anchor_reduction import softplus
from flashmetric.functional.pairs import Logit
from flashmetric.functional.softmax_rows import shares_of_all
from flashmetric.pml.batch import Batch, except_own
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_loss import FusedLoss, FusedPairLoss, LossDict

__all__ = [
    "CircleLoss",
    "GeneralizedLiftedStructureLoss",
    "MultiSimilarityLoss",
    "NCALoss",
    "SupConLoss",
]


def _or_zero(lse: Tensor) -> Tensor:
    """Log-sum-exps, 0 where they are of nothing."""
    return lse.masked_fill(lse == -torch.inf, 0)


class MultiSimilarityLoss(FusedPairLoss, peer.MultiSimilarityLoss):
    """See pytorch-metric-learning."""

    numbers = ("alpha", "beta", "base")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        alpha, beta, level = float(self.alpha), float(self.beta), batch.sign * float(self.base)
        lse = batch.pairs(self.each_once(batch)).logsumexp(
            Logit(alpha, -alpha * level), Logit(-beta, beta * level)
        )
        losses = softplus(lse.positive) / alpha + softplus(lse.negative) / beta
        return self.by_anchor(losses.unsqueeze(1), batch)


class CircleLoss(FusedPairLoss, peer.CircleLoss):
    """See pytorch-metric-learning."""

    numbers = ("m", "gamma")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        m = self.m
        if (self.op, self.on, self.delta_p, self.delta_n) != (1 + m, -m, 1 - m, m):
            raise NotFusedError("op, on, delta_p or delta_n are not those of m any more")
        if self.gamma <= 0:
            raise NotFusedError(f"gamma is {self.gamma}, and not above 0")
        # The distance is minus the cosine. With z = root (d + 1), or -root d, both logits are
        # max(z + root m, 0) (z - root m).
        root = math.sqrt(self.gamma)
        lse = batch.pairs(self.each_once(batch)).logsumexp(
            Logit(root, root, "circle", root * m), Logit(-root, 0.0, "circle", root * m)
        )
        both = (lse.positive != -torch.inf) & (lse.negative != -torch.inf)
        z = lse.positive.masked_fill(~both, 0) + lse.negative.masked_fill(~both, 0)
        losses = self.soft_plus(z).masked_fill(~both, 0)
        return self.by_anchor(losses.unsqueeze(1), batch)


class SupConLoss(FusedPairLoss, peer.SupConLoss):
    """See pytorch-metric-learning."""

    numbers = ("temperature",)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        scale = 1 / float(self.temperature)
        pairs = batch.pairs(self.each_once(batch))
        lse = pairs.logsumexp(Logit(-scale), Logit(-scale))
        losses, _ = shares_of_all(pairs, lse, scale, "out", "none")
        # Without any pair of either kind in the batch there is no loss at all.
        some = lse.positives.any() & lse.negatives.any()
        return self.by_anchor(losses.masked_fill(~some, 0), batch)


class GeneralizedLiftedStructureLoss(FusedPairLoss, peer.GeneralizedLiftedStructureLoss):
    """See pytorch-metric-learning. A log-sum-exp of nothing counts as 0."""

    numbers = ("neg_margin", "pos_margin")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        pos_level, neg_level = (
            batch.sign * float(margin) for margin in (self.pos_margin, self.neg_margin)
        )
        lse = batch.pairs(self.each_once(batch)).logsumexp(
            Logit(1.0, -pos_level), Logit(-1.0, neg_level)
        )
        losses = torch.relu(_or_zero(lse.positive) + _or_zero(lse.negative))
        return self.by_anchor(losses.unsqueeze(1), batch)


class NCALoss(FusedLoss, peer.NCALoss):
    """See pytorch-metric-learning. Miners' indices weight the anchors."""

    numbers = ("softmax_scale",)

    def check_call(self, embeddings: Tensor, labels: Tensor | None, *rest: Any) -> None:
        """Raise what the parent raises."""
        if len(embeddings) > 1:
            common_functions.labels_required(labels)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if batch.anchors <= 1:
            return self.nothing()
        scale = -float(self.softmax_scale)
        # Here it is the rows, not the labels, that are the same object.
        labels, ref_labels = batch.classes()
        if not batch.alone:
            pairs = batch.labelled(labels, ref_labels)
        elif batch.one_object_of_labels:
            pairs = batch.labelled(labels, None)
        else:
            own = torch.arange(len(labels), device=labels.device)
            pairs = batch.labelled(*except_own(labels, ref_labels, own, "d"))
        lse = pairs.logsumexp(Logit(scale), Logit(scale))
        counted = lse.positive != -torch.inf
        losses = softplus(lse.negative - lse.positive.masked_fill(~counted, 0))
        # Probabilities that round to 0 are left out.
        probability = torch.exp(-losses.detach()).to(batch.given.dtype)
        kept = (counted & (probability != 0)).nonzero().squeeze(1)
        losses = losses[kept]
        if batch.indices is not None:
            losses = losses * batch.weights(using_ref=not batch.alone)[kept]
        return self.by_anchor(losses, batch, kept)
