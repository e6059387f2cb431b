# SPDX-License-Identifier: Apache-2.0
"""The pairs of a batch as miners see them: rows that are not finite cannot hide."""

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import PairLists
from flashmetric.ops.labels import IGNORED, KINDS, Kind, pair_kinds, words


class MinedPairs(AllPairs):
    """All pairs, of which one with a row that is not finite counts as the hardest of its kind.

    Comparisons would leave such a row out, or choose it by its number alone, and the loss of what
    was mined would be finite: see the rule on NaN in DESIGN.md. Of several such references the
    first is chosen.
    """

    @classmethod
    def of(cls, pairs: AllPairs) -> "MinedPairs":
        """The same pairs."""
        labels, refs, ref_labels = pairs.labels, pairs.ref_emb, pairs.ref_labels
        scale = pairs.anchor_scale
        return cls(pairs.embeddings, labels, refs, ref_labels, pairs.rule, pairs.distance, scale)

    def _extreme(self, kind: Kind, farthest: bool, limit: Tensor | None) -> PairLists:
        found = super()._extreme(kind, farthest, limit)
        # Beyond every limit: no comparison says otherwise.
        return self._spoiled(kind, found, found.other.shape[1])

    def top(self, kind: Kind, k: int, *, farthest: bool = False) -> PairLists:
        """See :meth:`Pairs.top`."""
        return self._spoiled(kind, super().top(kind, k, farthest=farthest), 1)

    def _spoiled(self, kind: Kind, found: PairLists, columns: int) -> PairLists:
        """The lists with the first reference that is not finite in some columns."""
        if self.anchors == 0 or self.references == 0:
            return found
        refs = self.labels if self.ref_labels is None else self.ref_labels
        bad = not_finite(self.embeddings if self.ref_emb is None else self.ref_emb)
        bad &= words(refs)[:, 0] != IGNORED
        first = bad.int().argmax().unsqueeze(0)
        hit = pair_kinds(self.labels, refs.index_select(0, first), self.rule)[KINDS.index(kind)]
        hit &= bad.index_select(0, first)
        if self.ref_emb is None:
            hit &= (torch.arange(self.anchors, device=hit.device) != first).unsqueeze(1)
        hit = hit & (torch.arange(found.other.shape[1], device=hit.device) < columns)
        return PairLists(
            torch.where(hit, first, found.other),
            found.distance.masked_fill(hit, torch.nan),
            found.valid | hit,
        )


def not_finite(rows: Tensor) -> Tensor:
    """Which rows hold NaN or an infinity, bool [N]."""
    return ~rows.isfinite().all(1)
