# SPDX-License-Identifier: Apache-2.0
"""All labelled pairs of a batch whose references go round the ranks: none holds them all.

``ring_functions.py`` has the statistics of the anchors; selections merge here, by distance and row
number.
"""

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmetric.distributed.circle import Circle
from flashmetric.distributed.ring import Ring
from flashmetric.distributed.ring_functions import RingDistances, RingLse, RingSum, RingThresholds
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import PairLists, Pairs, Sums, Term, largest
from flashmetric.functional.totals import totals_of
from flashmetric.ops.labels import Kind
from flashmetric.ops.nearest_beyond import nearest_beyond
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.pair_distance import pair_distance
from flashmetric.ops.row_top_k import row_top_k


class _Choice(NamedTuple):
    """Rows of the whole batch, [N, K], -1 for none, and what they are compared by."""

    number: Tensor
    key: Tensor


class RingPairs(AllPairs):
    """Pairs of the anchors with the rows of all ranks."""

    def __init__(
        self,
        ring: Ring,
        settle: Callable[[], None],
        embeddings: Tensor,
        labels: Tensor,
        refs: Tensor,
        ref_labels: Tensor,
        rule: str,
        distance: str,
        anchor_scale: Tensor | None = None,
    ) -> None:
        """``refs``: of this rank; ``ref_labels``: of all."""
        super().__init__(embeddings, labels, refs, ref_labels, rule, distance, anchor_scale)
        self.references = sum(ring.counts)
        self._circle = Circle(ring, settle, labels, ref_labels, rule, distance)
        self._refs, self._settle = refs, settle

    def _worth_ordering(self) -> bool:
        return False

    def _row_sum(self, first: str, second: str, *rest: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = RingSum.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, (first, second), *rest
        )
        return result

    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """See :meth:`Pairs.total`."""
        sums, counts = self._row_sum(*self._terms(positive, negative), None)
        totals = Sums(*ordered_sum(sums).unbind(), *counts.sum(1).unbind())
        return totals_of(totals)

    def _row_lse(self, first: str, second: str, *rest: Any) -> tuple[Tensor, ...]:
        found: tuple[Tensor, ...] = RingLse.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, (first, second), *rest
        )
        return found

    def _thresholds(self, *given: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = RingThresholds.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, *given
        )
        return result

    def _measured(self, index: Tensor) -> Tensor:
        values: Tensor = RingDistances.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, index
        )
        return values

    @torch.no_grad()
    def _chosen(self, farthest: bool, choose: Callable[..., Tensor]) -> Iterator[_Choice]:
        """What ``choose(pairs)`` finds in each block; the best has the lowest key.

        A distance that is NaN is best of all: it must show.
        """
        with self._circle.rounds(self._refs) as rounds:
            for owner, block in rounds:
                index = choose(*self._circle.pairs(self.embeddings, owner, block))
                where = index.T.contiguous()
                d = pair_distance(self.embeddings, block, None, where, self.distance).T
                key = torch.nan_to_num(-d if farthest else d, -torch.inf, torch.inf, -torch.inf)
                none = index < 0
                number = (index + self._circle.begin[owner]).masked_fill(none, -1)
                yield _Choice(number, key.masked_fill(none, torch.inf))

    def _nearest_beyond(self, kind: Kind, farthest: bool, limits: Tensor) -> Tensor:
        best: _Choice | None = None
        for found in self._chosen(farthest, lambda *p: nearest_beyond(*p, kind, farthest, limits)):
            if best is None:
                best = found
                continue
            tied = (found.key == best.key) & (found.number >= 0)
            better = (found.key < best.key) | (tied & (found.number < best.number))
            better = better | ((best.number < 0) & (found.number >= 0))
            best = _Choice(
                *(torch.where(better, new, old) for new, old in zip(found, best, strict=True))
            )
        assert best is not None
        return best.number

    def _row_top_k(self, kind: Kind, k: int, farthest: bool) -> Tensor:
        parts = list(self._chosen(farthest, lambda *p: row_top_k(*p, kind, k, farthest)))
        number, key = (torch.cat(column, 1) for column in zip(*parts, strict=True))
        # By key, then by number; what is not there comes last.
        place = number.masked_fill(number < 0, self.references)
        by_number = place.argsort(dim=1)
        by_key = key.gather(1, by_number).argsort(dim=1, stable=True)
        return number.gather(1, by_number.gather(1, by_key[:, :k]))

    def positives(self, limit: int | None = None) -> PairLists:
        """See :meth:`Pairs.positives`; as many columns on every rank."""
        if limit is None:
            most = largest(self.counts()[0])
            limit = self._circle.ring.largest(most, self.embeddings.device, self._settle)
        return Pairs.positives(self, limit)
