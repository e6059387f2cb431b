# SPDX-License-Identifier: Apache-2.0
"""Contrastive losses over pairs of sentences that a label calls alike or different."""

from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as peer
from torch import Tensor

from flashmetric.functional.all_pairs import pair_distance
from flashmetric.functional.normalize import normalize_rows
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.sentence_transformers.distances import pair_metric
from flashmetric.sentence_transformers.fallback import NotFusedError, check_fused_rows, report
from flashmetric.sentence_transformers.labels import one_per_row, warn_unless_binary

__all__ = ["ContrastiveLoss", "OnlineContrastiveLoss"]


def _distances(loss: Any, embeddings: list[Tensor]) -> Tensor | None:
    """Distances [N] of the two columns, or None after a word about why they are the parent's."""
    if len(embeddings) != 2:
        raise ValueError(
            f"{type(loss).__name__} takes two columns of sentences; got {len(embeddings)}"
        )
    first, second = embeddings
    try:
        metric = pair_metric(loss.distance_metric)
        check_fused_rows(first, second)
        if len(first) != len(second):
            raise NotFusedError("the columns differ in the number of rows")
    except NotFusedError as reason:
        report(loss, reason)
        return None
    if metric == "cosine":
        first, second = normalize_rows(first), normalize_rows(second)
        rows = torch.arange(len(first), device=first.device)
        return pair_distance(first, second, rows, rows, metric)
    # Half precision would round away what the function adds to each difference.
    dtype = accumulate_dtype(first.dtype)
    distances: Tensor = loss.distance_metric(first.to(dtype), second.to(dtype))
    return distances


class ContrastiveLoss(peer.ContrastiveLoss):
    r"""Pulls pairs labelled 1 together, and pushes those labelled 0 a margin apart.

    See sentence-transformers, whose class this is:

    .. math::
        L = \frac{1}{2 N} \sum_i \left( y_i d_i^2
            + (1 - y_i) \max(\text{margin} - d_i, 0)^2 \right)

    or the sum in place of the mean with ``size_average=False``. Other labels than 0 and 1 weigh the
    two terms, as there.

    Differs from the parent:
        - The cosine distance is half the squared difference of unit rows: near-duplicates keep
          their digits. Rows shorter than 1e-8 have unit length like all others. Zero rows have
          gradient 0; there 1e8 times that of unit rows.
        - Labels may be bool.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """As the parent's: two tensors [N, D], labels [N]."""
        labels = one_per_row(self, labels, len(embeddings[0]))
        consequence = "others weigh the term of alike pairs, and 1 - label that of different ones"
        warn_unless_binary(self, labels, consequence)
        d = _distances(self, embeddings)
        if d is None:
            parents: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return parents
        alike = labels.to(d.dtype)
        losses = (alike * d.square() + (1 - alike) * (self.margin - d).relu().square()) / 2
        total = ordered_sum(losses)
        return total / len(d) if self.size_average else total


class OnlineContrastiveLoss(peer.OnlineContrastiveLoss):
    r"""The contrastive loss of hard pairs alone, summed.

    See sentence-transformers, whose class this is. Hard are pairs labelled 1 that are farther than
    the nearest pair labelled 0, and those labelled 0 that are nearer than the farthest labelled 1;
    in a batch of one kind only, those on the wrong side of its mean distance:

    .. math::
        L = \sum_{i \text{ hard}, y_i = 1} d_i^2
            + \sum_{i \text{ hard}, y_i = 0} \max(\text{margin} - d_i, 0)^2

    Differs from the parent:
        - A NaN distance makes the loss NaN; there such a pair is no hard one, and hides.
        - Otherwise as :class:`ContrastiveLoss`, but that pairs with other labels are left out.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """As the parent's: two tensors [N, D], labels [N]."""
        labels = one_per_row(self, labels, len(embeddings[0]))
        warn_unless_binary(self, labels, "pairs with others are left out")
        d = _distances(self, embeddings)
        if d is None:
            parents: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
            return parents
        alike, different = labels == 1, labels == 0
        farthest, nearest = _limits(d.detach(), alike, different)
        # Negated, so that NaN counts.
        hard_alike = alike & ~(d <= nearest)
        hard_different = different & ~(d >= farthest)
        zero = d.new_zeros(())
        pulled = d.where(hard_alike, zero)
        pushed = (self.margin - d).relu().where(hard_different, zero)
        return ordered_sum(pulled.square() + pushed.square())


def _limits(d: Tensor, alike: Tensor, different: Tensor) -> tuple[Tensor, Tensor]:
    """Below what distance a different pair is hard, and above which one an alike pair."""
    if not len(d):
        return d.new_zeros(()), d.new_zeros(())
    farthest = d.masked_fill(~alike, -torch.inf).amax()
    nearest = d.masked_fill(~different, torch.inf).amin()
    return (
        farthest.where(alike.any(), _mean(d, different)),
        nearest.where(different.any(), _mean(d, alike)),
    )


def _mean(d: Tensor, counted: Tensor) -> Tensor:
    return d.masked_fill(~counted, 0).sum() / counted.sum()
