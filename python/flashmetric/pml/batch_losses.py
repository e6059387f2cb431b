# SPDX-License-Identifier: Apache-2.0
"""Losses that compare a batch with itself only, or with learned centres."""

from typing import Any

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.distances import CosineSimilarity
from pytorch_metric_learning.utils import common_functions
from torch import Tensor

from flashmetric.functional.fast_ap import fast_ap_loss
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, Term
from flashmetric.functional.soft_triple import soft_triple_loss
from flashmetric.functional.softmax_rows import negative_log_share, take_rows
from flashmetric.ops.labels import pair_counts
from flashmetric.pml.batch import Batch
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_loss import FusedLoss, LossDict

__all__ = ["FastAPLoss", "NPairsLoss", "RankedListLoss", "SoftTripleLoss"]


class _FusedSelfLoss(FusedLoss):
    """Of labelled rows, without references."""

    def check_call(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> None:
        """Raise what the parent raises."""
        common_functions.labels_required(labels)
        common_functions.ref_not_supported(embeddings, labels, ref_emb, ref_labels)


class NPairsLoss(_FusedSelfLoss, peer.NPairsLoss):
    """See pytorch-metric-learning. The pair of a class is its first listed one, or two rows."""

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        anchor, positive = self._first_pairs(batch)
        self.num_pairs = len(anchor)
        if self.num_pairs == 0:
            return self.nothing()
        numbers = torch.arange(self.num_pairs, device=anchor.device)
        pairs = prepare_pairs(
            take_rows(batch.embeddings, anchor),
            numbers,
            distance=batch.distance,
            ref_emb=take_rows(batch.embeddings, positive),
            ref_labels=numbers,
        )
        losses, _ = negative_log_share(pairs.logsumexp(Logit(-1.0), Logit(-1.0)))
        return self.by_anchor(losses, batch, anchor)

    def _first_pairs(self, batch: Batch) -> tuple[Tensor, Tensor]:
        labels, _ = batch.classes()
        if batch.indices is not None:
            a, p = batch.indices[:2]
            ordered, order = labels[a].sort(stable=True)
            first = order[_begins(ordered)]
            return a[first], p[first]
        ordered, order = labels.sort(stable=True)
        begins = _begins(ordered)
        first = (begins[:-1] & ~begins[1:]).nonzero().squeeze(1)
        return order[first], order[first + 1]


def _begins(ordered: Tensor) -> Tensor:
    """Where in a sorted list another value begins, bool."""
    changes = ordered[1:] != ordered[:-1]
    return torch.cat((changes.new_ones(1), changes))[: len(ordered)]


class FastAPLoss(_FusedSelfLoss, peer.FastAPLoss):
    """See pytorch-metric-learning. Miners' indices weight the anchors."""

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if batch.distance != "sqeuclidean":
            raise NotFusedError("the kernels' histogram is of squared distances, power=2")
        labels, _ = batch.classes()
        losses = fast_ap_loss(batch.given, labels, bins=self.num_bins, reduction="none")
        anchors = pair_counts(labels, None, "equal")[0].nonzero().squeeze(1)
        if len(anchors) == 0:
            return self.nothing()
        losses = losses[anchors]
        if batch.indices is not None:
            losses = losses * batch.weights()[anchors]
        return self.by_anchor(losses, batch, anchors)


class RankedListLoss(_FusedSelfLoss, peer.RankedListLoss):
    """See pytorch-metric-learning. Without temperatures: its weights are differentiated."""

    numbers = ("margin", "alpha", "imbalance", "Tn", "Tp")

    def check_call(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> None:
        """Raise what the parent raises."""
        super().check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        common_functions.indices_tuple_not_supported(indices_tuple)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if self.Tn != 0 or self.Tp != 0:
            raise NotFusedError("the gradient of weights with Tn or Tp above 0 has no kernel")
        if batch.sign < 0:
            raise NotFusedError("it takes similarities for distances")
        outer = float(self.alpha)
        inner = outer - float(self.margin)
        if inner < 0:
            raise NotFusedError("it counts distances above alpha - margin and above 0")
        sums = batch.pairs().sum(Term("hinge", 1.0, -inner), Term("hinge", -1.0, outer))
        active = torch.stack((sums.active_positives, sums.active_negatives)).to(sums.positive.dtype)
        positives, negatives = active + 1e-5 * batch.anchors
        losses = (1 - self.imbalance) * sums.positive / positives
        losses = losses + self.imbalance * sums.negative / negatives
        return self.by_anchor(losses, batch)


class SoftTripleLoss(_FusedSelfLoss, peer.SoftTripleLoss):
    """See pytorch-metric-learning. Miners' indices weight the rows."""

    numbers = ("la", "gamma", "margin")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        if type(self.distance) is not CosineSimilarity or self.distance.p != 2:
            raise NotFusedError("the centres are compared by CosineSimilarity() alone")
        if self.la <= 0 or self.gamma <= 0:
            raise NotFusedError("la and gamma are not above 0")
        self.cast_types(batch.given.dtype, batch.given.device)
        centers = self.fc.T.unflatten(0, (self.num_classes, self.centers_per_class))
        losses = soft_triple_loss(
            batch.given,
            batch.classes()[0],
            centers=centers,
            la=float(self.la),
            gamma=1 / self.gamma,
            margin=float(self.margin),
            tau=0.0,
            reduction="none",
        )
        loss_dict = self.by_anchor(losses * batch.weights(), batch)
        self.add_weight_regularization_to_loss_dict(loss_dict, self.fc.t())
        return loss_dict
