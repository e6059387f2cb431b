# SPDX-License-Identifier: Apache-2.0
"""Losses with one value per positive pair, each against log-sum-exps over negatives.

Only the positive pairs are listed; any reducer takes their values.
"""

import math
from typing import Any

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.utils import common_functions
from torch import Tensor

from flashmetric.functional.anchor_reduction import softplus
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.functional.softmax_rows import take_rows
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.pml.batch import Batch
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_loss import FusedLoss, FusedPairLoss, LossDict

__all__ = ["AngularLoss", "LiftedStructureLoss", "TupletMarginLoss"]


def _positives(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and positives of all positive pairs, and their distances, each [P]."""
    if batch.indices is not None:
        a, p = batch.indices[:2]
        return a, p, batch.between(a, p)
    lists = batch.pairs().positives()
    a, place = lists.valid.nonzero().unbind(1)
    return a, lists.other[a, place], lists.distance[a, place]


def _at(values: Tensor, index: Tensor) -> Tensor:
    """``values[index]``; in float64, of which the CPU adds the gradients in a fixed order."""
    return values.double()[index].to(values.dtype)


class LiftedStructureLoss(FusedPairLoss, peer.LiftedStructureLoss):
    """See pytorch-metric-learning.

    With ``ref_emb``, the negatives of anchor number p join those of a positive number p.
    """

    numbers = ("neg_margin", "pos_margin")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        pos_level, neg_level = (
            batch.sign * float(margin) for margin in (self.pos_margin, self.neg_margin)
        )
        lse = batch.pairs().logsumexp(negative=Logit(-1.0, neg_level))
        a, p, d_ap = _positives(batch)
        if len(a) == 0:
            return self.nothing()
        by_anchor = lse.negative
        known = p < batch.anchors
        own, other = _at(by_anchor, a), _at(by_anchor, p.where(known, 0))
        other = other.masked_fill(~known | (a == p), -torch.inf)
        # A log-sum-exp of nothing counts as 0, unless there is none of anything.
        both = (own != -torch.inf) | (other != -torch.inf)
        negatives = torch.logaddexp(
            own.where(both, own.new_zeros(())), other.where(both, own.new_full((), -torch.inf))
        )
        losses = torch.relu(negatives + d_ap - pos_level).square() / 2
        losses = losses.masked_fill(~lse.negatives.any(), 0)
        return self.by_pair(losses.unsqueeze(1), batch, a, p)


class TupletMarginLoss(FusedPairLoss, peer.TupletMarginLoss):
    """See pytorch-metric-learning."""

    numbers = ("margin", "scale")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if self.collect_stats:
            raise NotFusedError("its statistics are of the angles of all pairs")
        scale = float(self.scale)
        lse = batch.pairs().logsumexp(negative=Logit(-scale))
        a, p, d_ap = _positives(batch)
        if len(a) == 0:
            return self.nothing()
        # The distance is minus the cosine.
        cosine = torch.cos(torch.acos(-d_ap) - float(self.margin))
        negatives = _at(lse.negative, a)
        some = negatives != -torch.inf
        losses = softplus(negatives.masked_fill(~some, 0) - scale * cosine).masked_fill(~some, 0)
        return self.by_pair(losses.unsqueeze(1), batch, a, p)


class AngularLoss(FusedLoss, peer.AngularLoss):
    """See pytorch-metric-learning. Anchors and positives have unit length, negatives any."""

    def check_call(self, embeddings: Tensor, labels: Tensor | None, *rest: Any) -> None:
        """Raise what the parent raises."""
        common_functions.labels_required(labels)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if self.collect_stats:
            raise NotFusedError("its statistics are of the angles of all triplets")
        classes, ref_classes = batch.classes()
        a, p, _ = _positives(batch)
        if len(a) == 0 or (batch.indices is not None and len(batch.indices[2]) == 0):
            return self.nothing()
        dtype = accumulate_dtype(batch.given.dtype)
        anchors = take_rows(batch.embeddings, a).to(dtype)
        positives = take_rows(batch.refs, p).to(dtype)
        tan2 = math.tan(float(self.alpha)) ** 2
        # A positive pair queries the negatives with its sum: a rectangular batch.
        queries = prepare_pairs(
            anchors + positives,
            classes[a],
            distance="dot",
            ref_emb=batch.given_refs.to(dtype),
            ref_labels=ref_classes,
        )
        lse = queries.logsumexp(negative=Logit(-4 * tan2)).negative
        some = lse != -torch.inf
        z = lse.masked_fill(~some, 0) - 2 * (1 + tan2) * (anchors * positives).sum(1)
        losses = softplus(z).masked_fill(~some, 0)
        return self.by_pair(losses.unsqueeze(1), batch, a, p)
