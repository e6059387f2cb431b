# SPDX-License-Identifier: Apache-2.0
"""Softmax losses of queries against the documents of the whole batch."""

import warnings

import torch
from sentence_transformers.sentence_transformer import losses as peer
from torch import Tensor
from typing_extensions import deprecated

from flashmetric.sentence_transformers.fallback import NotFusedError, report
from flashmetric.sentence_transformers.ranking import ranking_loss

__all__ = [
    "CachedMultipleNegativesRankingLoss",
    "CachedMultipleNegativesSymmetricRankingLoss",
    "MultipleNegativesRankingLoss",
    "MultipleNegativesSymmetricRankingLoss",
]

_WORD = "use {} with directions=('query_to_doc', 'doc_to_query'), partition_mode='per_direction'"


class MultipleNegativesRankingLoss(peer.MultipleNegativesRankingLoss):
    r"""InfoNCE of queries q and documents d, with hard negatives, directions and penalties.

    See sentence-transformers, whose class this is, without its B x B matrices, for each query and
    all C columns of documents; by default:

    .. math::
        L = -\frac{1}{B} \sum_i
            \log \frac{e^{c\, s(q_i, d_{i1})}}{\sum_{j, k} e^{c\, s(q_i, d_{jk})}}

    All options are fused: ``directions``, ``partition_mode``, ``hardness_mode``,
    ``gather_across_devices``, and as ``similarity_fct`` ``cos_sim``, ``dot_score``,
    ``euclidean_sim`` and ``manhattan_sim`` of ``sentence_transformers.util`` or the model's own
    ``similarity``. ``query_to_doc`` and ``doc_to_query`` come from one sweep, unless rows are
    gathered or other examples' documents penalised. Memory is O(B C D).

    Differs from the parent:
        - The loss is ``log(1 + e^x)`` of the difference of logits, there the difference of a
          log-sum-exp and a logit: losses below 1e-7 keep their digits.
        - Similarities of float16 and bfloat16 rows are float32; there they are rounded to that.
        - Rows shorter than 1e-12 have unit length by ``cos_sim`` like all others, there they are
          divided by 1e-12. Zero rows have gradient 0; there 1e12 times that of unit rows.
    """

    def compute_loss_from_embeddings(self, embeddings: list[Tensor], labels: Tensor) -> Tensor:
        """As the parent's: queries and columns of documents, each [B, D]; no labels are read."""
        if len(embeddings) < 2:
            raise ValueError(
                f"{type(self).__name__} takes queries and documents, at least two columns; "
                f"got {len(embeddings)}"
            )
        try:
            with torch.autocast(embeddings[0].device.type, enabled=False):
                return ranking_loss(self, embeddings[0], list(embeddings[1:]))
        except NotFusedError as reason:
            report(self, reason)
        parents: Tensor = super().compute_loss_from_embeddings(embeddings, labels)
        return parents


class CachedMultipleNegativesRankingLoss(peer.CachedMultipleNegativesRankingLoss):
    """The same loss, with the activations of ``mini_batch_size`` sentences at a time (GradCache).

    See sentence-transformers, whose class this is, and :class:`MultipleNegativesRankingLoss` for
    what is fused and what differs. The model is run by the parent's code; the loss takes all
    embeddings at once, in O(B C D) memory, where the parent takes chunks of the B x B matrices. So
    there is no progress bar for it.
    """

    def calculate_loss(
        self, reps: list[list[Tensor]], labels: Tensor | None = None, *, with_backward: bool = False
    ) -> Tensor:
        """As the parent's: the mini-batches of each column, [any, D]; no labels are read."""
        columns = [torch.cat(chunks) for chunks in reps]
        try:
            # The backward pass runs here, still within the trainer's autocast.
            with torch.autocast(columns[0].device.type, enabled=False):
                loss = ranking_loss(self, columns[0], columns[1:])
                if with_backward:
                    loss.backward()
                    loss = loss.detach()
            return loss
        except NotFusedError as reason:
            report(self, reason)
        parents: Tensor = super().calculate_loss(reps, labels, with_backward=with_backward)
        return parents


with warnings.catch_warnings():
    # The parents warn whoever subclasses them. These warn whoever calls them, as the parents do.
    warnings.simplefilter("ignore", DeprecationWarning)

    @deprecated(_WORD.format("MultipleNegativesRankingLoss"))
    class MultipleNegativesSymmetricRankingLoss(
        MultipleNegativesRankingLoss, peer.MultipleNegativesSymmetricRankingLoss
    ):
        """The loss of both directions, averaged, under its deprecated name."""

    @deprecated(_WORD.format("CachedMultipleNegativesRankingLoss"))
    class CachedMultipleNegativesSymmetricRankingLoss(
        CachedMultipleNegativesRankingLoss, peer.CachedMultipleNegativesSymmetricRankingLoss
    ):
        """The same, with the activations of ``mini_batch_size`` sentences at a time."""
