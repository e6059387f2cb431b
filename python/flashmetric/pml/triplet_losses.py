# SPDX-License-Identifier: Apache-2.0
"""Losses of triplets: all of a batch by counting, those of a miner one by one."""

import torch
from pytorch_metric_learning import losses as peer
from pytorch_metric_learning.reducers import ThresholdReducer
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from flashmetric.functional.batch_all import batch_all_sums
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pairs import Term
from flashmetric.functional.triplet_selection import spoil
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.terms import Formula
from flashmetric.pml.batch import Batch, as_given
from flashmetric.pml.fallback import NotFusedError
from flashmetric.pml.fused_loss import FusedLoss, LossDict, Sum

__all__ = ["MarginLoss", "TripletMarginLoss"]

Triplets = tuple[Tensor, Tensor, Tensor]


class _FusedTripletLoss(FusedLoss):
    triplets_per_anchor: int | str

    def listed(self, batch: Batch) -> tuple[Triplets, Tensor, Tensor] | None:
        """Listed or drawn triplets (a, p, n), d(a, p) and d(a, n); None for all there are."""
        indices = batch.indices
        if indices is None and self.triplets_per_anchor != "all":
            labels, ref_labels = batch.labels_as_given()
            indices = loss_and_miner_utils.get_random_triplet_indices(
                labels, ref_labels, t_per_anchor=self.triplets_per_anchor
            )
        if indices is None:
            return None
        pairs = batch.pairs(indices)
        assert isinstance(pairs, ListedPairs)
        a, p, n, d_ap, d_an, _ = pairs.triplets()
        return (a, p, n), d_ap, d_an


class TripletMarginLoss(_FusedTripletLoss, peer.TripletMarginLoss):
    """See pytorch-metric-learning. All triplets of a batch are summed without listing them."""

    numbers = ("margin",)

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        every = batch.indices is None and self.triplets_per_anchor == "all"
        if self.swap and every:
            raise NotFusedError("swap compares the positive and negative of every triplet")
        if self.swap and not batch.alone:
            raise NotFusedError("swap with ref_emb looks up positives among the anchors")
        if every:
            return {"loss": self._every_triplet(batch)}
        found = self.listed(batch)
        assert found is not None
        (a, p, n), d_ap, d_an = found
        if len(a) == 0:
            return self.nothing()
        if self.swap:
            d_an = torch.minimum(d_an, batch.between_references(p, n))
        violation = d_ap - d_an + self.margin
        function = torch.nn.functional.softplus if self.smooth_loss else torch.relu
        return self.by_pair(function(violation), batch, a, p, n)

    def _every_triplet(self, batch: Batch) -> dict[str, object]:
        averages_active = isinstance(self.reducer_of("loss"), ThresholdReducer)
        if self.smooth_loss and averages_active and not batch.bounded:
            raise NotFusedError(
                "the smooth loss of long rows rounds to 0 for some triplets, and these are counted"
            )
        pairs = batch.pairs()
        formula: Formula = "softplus" if self.smooth_loss else "hinge"
        sums = batch_all_sums(pairs, float(self.margin), formula)
        value = spoil(pairs, ordered_sum(sums.loss))
        return self.reduced("loss", Sum(value, sums.triplets.sum(), sums.active.sum()), batch)


class MarginLoss(_FusedTripletLoss, peer.MarginLoss):
    """See pytorch-metric-learning. Pairs count once for each triplet they are in."""

    numbers = ("margin", "nu")

    def fused(self, batch: Batch) -> LossDict:
        """See :meth:`FusedLoss.fused`."""
        every = batch.indices is None and self.triplets_per_anchor == "all"
        if every:
            for name in ("margin_loss", "beta_reg_loss"):
                if name == "margin_loss" or self.learn_beta:
                    self.reducer_of(name)
        # As the parent, also in rounding it to the dtype of the rows.
        beta = self.beta.to(batch.given.device)
        if not torch.is_autocast_enabled(batch.given.device.type):
            beta = beta.to(batch.given.dtype)
        if every:
            return self._every_triplet(batch, beta)
        found = self.listed(batch)
        assert found is not None
        (a, p, n), d_ap, d_an = found
        if len(a) == 0:
            return self.nothing()
        if len(beta) > 1:
            beta = beta[batch.labels_as_given()[0][a]]
        level = batch.sign * beta
        positive = torch.relu(d_ap - level + self.margin)
        negative = torch.relu(level - d_an + self.margin)
        divisor = (positive > 0).sum() + (negative > 0).sum()
        losses = self.by_pair(positive + negative, batch, a, p, n)
        return {
            "margin_loss": {**losses["loss"], "divisor": divisor},
            "beta_reg_loss": self.compute_reg_loss(beta, a, divisor),
        }

    def _every_triplet(self, batch: Batch, beta: Tensor) -> LossDict:
        pairs = batch.pairs()
        by_anchor = beta if len(beta) == 1 else beta[batch.labels_as_given()[0]]
        level = batch.sign * by_anchor
        level = level[0] if len(beta) == 1 else level
        margin = float(self.margin)
        sums = pairs.sum(Term("hinge", 1.0, margin - level), Term("hinge", -1.0, margin + level))
        losses = sums.positive * sums.negatives + sums.negative * sums.positives
        triplets = sums.positives * sums.negatives
        divisor = (
            sums.active_positives * sums.negatives + sums.active_negatives * sums.positives
        ).sum()
        idle = (sums.positives - sums.active_positives) * (sums.negatives - sums.active_negatives)
        count, active = triplets.sum(), (triplets - idle).sum()
        value = Sum(ordered_sum(losses), count, active, divisor)
        return {
            "margin_loss": self.reduced("margin_loss", value, batch),
            "beta_reg_loss": self._regularizer(batch, by_anchor, triplets, divisor),
        }

    def _regularizer(
        self, batch: Batch, beta: Tensor, triplets: Tensor, divisor: Tensor
    ) -> dict[str, object]:
        if not self.learn_beta:
            return self.nothing()["beta_reg_loss"]
        if len(self.beta) == 1:
            value = self.compute_reg_loss(beta, triplets, divisor)["losses"]
            some = as_given(triplets.any().to(value.dtype), batch.given)
            return {"losses": value * some, "indices": None, "reduction_type": "already_reduced"}
        losses = beta * self.nu
        active = triplets.where(losses > 0, 0).sum()
        total = ordered_sum(losses * triplets)
        return self.reduced("beta_reg_loss", Sum(total, triplets.sum(), active, divisor), batch)
