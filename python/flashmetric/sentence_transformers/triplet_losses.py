# SPDX-License-Identifier: Apache-2.0
"""Triplet losses over labelled single sentences, mined by the kernels."""

from typing import Any

from sentence_transformers.sentence_transformer import losses as peer
from torch import Tensor

from flashmetric.functional.triplet import Mining, Reduction, triplet_margin_loss
from flashmetric.sentence_transformers.distances import triplet_distance
from flashmetric.sentence_transformers.fallback import NotFusedError, check_fused_rows, report
from flashmetric.sentence_transformers.labels import class_numbers, one_per_row

__all__ = [
    "BatchAllTripletLoss",
    "BatchHardSoftMarginTripletLoss",
    "BatchHardTripletLoss",
    "BatchSemiHardTripletLoss",
]


def _fused(
    loss: Any,
    labels: Tensor,
    embeddings: Tensor,
    margin: Any,
    mining: Mining = "batch_hard",
    reduction: Reduction = "mean",
    smooth: bool = False,
) -> Tensor | None:
    """The loss of the kernels, or None after a word about why they cannot compute it."""
    labels = one_per_row(loss, labels, len(embeddings))
    try:
        if isinstance(margin, Tensor):
            raise NotFusedError("margin is a tensor")
        distance = triplet_distance(loss.distance_metric)
        check_fused_rows(embeddings)
    except NotFusedError as reason:
        report(loss, reason)
        return None
    return triplet_margin_loss(
        embeddings,
        class_numbers(labels),
        margin=margin,
        distance=distance,
        mining=mining,
        smooth=smooth,
        reduction=reduction,
        empty="skip" if mining == "batch_all" else "keep",
    )


class BatchHardTripletLoss(peer.BatchHardTripletLoss):
    r"""Of each anchor the farthest positive and the nearest negative.

    See sentence-transformers, whose class this is, without its N x N matrix:

    .. math::
        L = \frac{1}{N} \sum_a \max(\max_p d(a, p) - \min_n d(a, n) + \text{margin}, 0)

    Every anchor counts. One without a positive has it at distance 0, one without a negative as far
    as its hardest positive.

    Differs from the parent:
        - A triplet whose hinge is exactly 0 has gradient 0; there that of the active side.
        - Distances are measured by differences, there by ``|x|^2 - 2 x.y + |y|^2``, which in
          float32 loses those of near-duplicates far from the origin. Candidates that agree to
          rounding may be taken for one another.
        - Zero rows have gradient 0 by the cosine distance; there 1e12 times that of unit rows. One
          is at distance 0 from itself, there 1, which an anchor without negatives can see.
        - An empty batch costs 0; there it raises.
    """

    def batch_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """As the parent's: labels [N], embeddings [N, D]."""
        value = _fused(self, labels, embeddings, self.triplet_margin)
        return super().batch_hard_triplet_loss(labels, embeddings) if value is None else value


class BatchHardSoftMarginTripletLoss(BatchHardTripletLoss, peer.BatchHardSoftMarginTripletLoss):
    r"""Softplus in place of the hinge and its margin.

    .. math::
        L = \frac{1}{N} \sum_a \log(1 + e^{\max_p d(a, p) - \min_n d(a, n)})

    See sentence-transformers, and :class:`BatchHardTripletLoss` for which anchors count and what
    differs.
    """

    def batch_hard_triplet_soft_margin_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """As the parent's: labels [N], embeddings [N, D]."""
        value = _fused(self, labels, embeddings, 0.0, smooth=True)
        if value is not None:
            return value
        parents: Tensor = super().batch_hard_triplet_soft_margin_loss(labels, embeddings)
        return parents


class BatchSemiHardTripletLoss(peer.BatchSemiHardTripletLoss):
    r"""Of each positive pair the nearest negative farther than the positive.

    See sentence-transformers, whose class this is. If no negative is farther, the farthest one is
    taken; without any negative, one at distance 0:

    .. math::
        L = \frac{1}{P} \sum_{(a, p)} \max(d(a, p) - d(a, n_{ap}) + \text{margin}, 0)

    Differs from the parent:
        - A triplet whose hinge is exactly 0 has gradient 0; there half of the active side's.
        - A negative as far as the positive up to rounding does not count as farther; there
          rounding decides, but for copies of the positive.
        - Otherwise as :class:`BatchHardTripletLoss`. Memory is O(N P) for P positives of an anchor.
    """

    def batch_semi_hard_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """As the parent's: labels [N], embeddings [N, D]."""
        value = _fused(self, labels, embeddings, self.margin, "semi_hard")
        return super().batch_semi_hard_triplet_loss(labels, embeddings) if value is None else value


class BatchAllTripletLoss(peer.BatchAllTripletLoss):
    r"""All triplets of the batch, averaged over those with a loss above 0.

    See sentence-transformers, whose class this is. Triplets are counted and summed without being
    listed, in O(N P) memory for P positives of an anchor:

    .. math::
        L = \frac{\sum_{a, p, n} v_{apn}}{|\{v_{apn} > 0\}|}, \quad
        v_{apn} = \max(d(a, p) - d(a, n) + \text{margin}, 0)

    Differs from the parent:
        - Losses up to 1e-16, which float32 has only beside distances near 0, count as active; there
          they do not.
        - Triplets whose hinge is exactly 0 have gradient 0; there that of the active side, times
          1e16 if no triplet is active.
        - Otherwise as :class:`BatchHardTripletLoss`.
    """

    def batch_all_triplet_loss(self, labels: Tensor, embeddings: Tensor) -> Tensor:
        """As the parent's: labels [N], embeddings [N, D]."""
        value = _fused(self, labels, embeddings, self.triplet_margin, "batch_all", "mean_nonzero")
        return super().batch_all_triplet_loss(labels, embeddings) if value is None else value
