# SPDX-License-Identifier: Apache-2.0
"""The pairs that a miner has chosen, in place of all labelled pairs: see ``pairs.py``."""

import copy

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import pair_distance
from flashmetric.functional.pairs import (
    Logit,
    LogSumExps,
    PairLists,
    Pairs,
    Parameter,
    Sums,
    Term,
)
from flashmetric.functional.totals import totals_of
from flashmetric.indices import PairIndices, TripletIndices
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import Kind
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.terms import Formula, term


def as_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Triplets (a, p, n) as pairs (a, p, a, n); pairs (a1, p, a2, n) as they are.

    Of a fixed size, followed by which positive and which negative pairs are valid.
    """
    if isinstance(indices, TripletIndices):
        return indices.pairs()
    return (*indices[:2], indices[0], indices[2]) if len(indices) == 3 else indices


def other_way(indices: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Pairs whose two sides have changed places."""
    a1, p, a2, n, *valid = as_pairs(indices)
    return PairIndices(p, a1, n, a2, *valid) if valid else (p, a1, n, a2)


def positive_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors and positives, row 0 for none, and which of them are pairs (None: all)."""
    anchor, positive, _, _, *valid = as_pairs(indices)
    return anchor, positive.clamp(min=0), valid[0] if valid else None


class ListedPairs(Pairs):
    """Listed pairs, measured by exact differences; O(P D) work for P of them."""

    def __init__(
        self,
        embeddings: Tensor,
        ref_emb: Tensor | None,
        indices: tuple[Tensor, ...],
        distance: str,
        anchor_scale: Tensor | None = None,
    ) -> None:
        """Measure the pairs (a1, p, a2, n), or triplets (a, p, n), also of a fixed size."""
        self.embeddings, self.ref_emb = embeddings, ref_emb
        self.anchors = embeddings.shape[0]
        self.references = self.anchors if ref_emb is None else ref_emb.shape[0]
        self._dtype = accumulate_dtype(embeddings.dtype)
        a1, p, a2, n, *valid = as_pairs(indices)
        # The op gives pairs with row -1 distance 0 and no gradient.
        d = pair_distance(embeddings, ref_emb, torch.cat((a1, a2)), torch.cat((p, n)), distance)
        if anchor_scale is not None:
            d = d * anchor_scale[torch.cat((a1, a2))]
        self.distance, self.anchor_scale = distance, anchor_scale
        self._joined = len(indices) == 3 or isinstance(indices, TripletIndices)
        self._valid = (valid[0], valid[1]) if valid else (None, None)
        self._anchor, self._other = (a1, a2), (p, n)
        self._distance = d.split((len(p), len(n)))

    def triplets(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None]:
        """Triplets (a, p, n), d(a, p) and d(a, n), each [T], and which are valid (None: all).

        As given, or every positive pair with every negative pair of its anchor, which takes O(T)
        memory, a length that depends on the data.
        """
        (a1, a2), (p, n), (d_ap, d_an) = self._anchor, self._other, self._distance
        if self._joined:
            return a1, p, n, d_ap, d_an, self._valid[0]
        if self._valid[0] is not None and self._valid[1] is not None:
            # Of anchors that do not exist, and of different ones, so that they meet no partner.
            a1 = a1.masked_fill(~self._valid[0], self.anchors)
            a2 = a2.masked_fill(~self._valid[1], self.anchors + 1)
        sorted_a2, order = a2.sort(stable=True)
        begin = torch.searchsorted(sorted_a2, a1)
        count = torch.searchsorted(sorted_a2, a1, right=True) - begin
        pair = torch.arange(len(a1), device=a1.device).repeat_interleave(count)
        # The numbers of a pair's partners, 0 to count - 1, after each other for all pairs.
        partner = torch.arange(len(pair), device=a1.device) - (count.cumsum(0) - count)[pair]
        partner = order[begin[pair] + partner]
        return a1[pair], p[pair], n[partner], d_ap[pair], d_an[partner], None

    def minus(self, other: "ListedPairs") -> "ListedPairs":
        """The same pairs at their distances less those in ``other``."""
        pairs = copy.copy(self)
        mine, others = self._distance, other._distance
        pairs._distance = (mine[0] - others[0], mine[1] - others[1])
        return pairs

    def _at(self, parameter: Parameter, kind: int) -> Parameter:
        """A parameter per anchor as one per pair."""
        if isinstance(parameter, Tensor) and parameter.ndim:
            return parameter.to(self._dtype).expand(self.anchors)[self._anchor[kind]]
        return parameter

    def _kept(self, kind: int, bound: Tensor | None) -> Tensor | None:
        """Which pairs are valid and within a bound [N]; None for all."""
        valid = self._valid[kind]
        if bound is None:
            return valid
        limit, d = bound.expand(self.anchors)[self._anchor[kind]], self._distance[kind]
        within = torch.lt(d, limit) if kind else torch.gt(d, limit)
        return within if valid is None else within & valid

    def _values(self, kind: int, given: Term | None) -> Tensor:
        d = self._distance[kind]
        if given is None:
            return torch.zeros_like(d)
        z: Tensor = d * self._at(given.scale, kind) + self._at(given.offset, kind)
        valid = self._valid[kind]
        # Before the formula, whose slope may be infinite where there is no pair.
        return term(z if valid is None else z.masked_fill(~valid, 0), given.formula)[0]

    def _by_anchor(self, kind: int, values: Tensor) -> Tensor:
        return values.new_zeros(self.anchors).index_add(0, self._anchor[kind], values)

    def sum(
        self,
        positive: Term | None = None,
        negative: Term | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Sums:
        """See :meth:`Pairs.sum`."""
        sums, counts, active = [], [], []
        for kind, given in enumerate((positive, negative)):
            value, keep = self._values(kind, given), self._kept(kind, bounds[kind])
            kept = torch.ones_like(value, dtype=torch.int64) if keep is None else keep.long()
            value = value if keep is None else value.where(keep, value.new_zeros(()))
            sums.append(self._by_anchor(kind, value))
            counts.append(self._by_anchor(kind, kept))
            active.append(self._by_anchor(kind, (value > 0).long()))
        return Sums(*sums, *counts, *active)

    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """See :meth:`Pairs.total`."""
        values = [self._values(kind, given) for kind, given in enumerate((positive, negative))]
        counts = [value.new_full((), len(value), dtype=torch.int64) for value in values]
        for kind, valid in enumerate(self._valid):
            if valid is not None:
                values[kind] = values[kind].where(valid, values[kind].new_zeros(()))
                counts[kind] = valid.sum()
        active = [(value > 0).sum() for value in values]
        return totals_of(Sums(*map(ordered_sum, values), *counts, *active))

    def logsumexp(
        self,
        positive: Logit | None = None,
        negative: Logit | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LogSumExps:
        """See :meth:`Pairs.logsumexp`."""
        lse, mean, counts = [], [], []
        for kind, given in enumerate((positive, negative)):
            d, anchor = self._distance[kind], self._anchor[kind]
            logit = self._logits(kind, given)
            keep = self._kept(kind, bounds[kind])
            if keep is not None:
                logit = logit.masked_fill(~keep, -torch.inf)
            kept = logit > -torch.inf
            top = logit.new_full((self.anchors,), -torch.inf)
            top = top.scatter_reduce(0, anchor, logit.detach(), "amax")
            shift = top.masked_fill(top == -torch.inf, 0)
            e = (logit - shift[anchor]).exp()
            total = self._by_anchor(kind, e)
            empty = total == 0
            total = total.masked_fill(empty, 1)
            lse.append((total.log() + shift).masked_fill(empty, -torch.inf))
            mean.append(self._by_anchor(kind, (e * d).detach()) / total.detach())
            counts.append(self._by_anchor(kind, kept.long()))
        return LogSumExps(*lse, *mean, *counts)

    def _logits(self, kind: int, given: Logit | None) -> Tensor:
        d = self._distance[kind]
        if given is None:
            return torch.full_like(d, -torch.inf)
        z: Tensor = d * self._at(given.scale, kind) + self._at(given.offset, kind)
        if given.form == "affine":
            return z
        weight = (z + given.shape).relu().detach()
        return weight * (z - given.shape)

    def nearest(self, kind: Kind, beyond: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.nearest`."""
        return self._extreme(kind, False, beyond)

    def farthest(self, kind: Kind, below: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.farthest`."""
        return self._extreme(kind, True, below)

    def _extreme(self, kind: Kind, farthest: bool, limit: Tensor | None) -> PairLists:
        if limit is None:
            return self.top(kind, 1, farthest=farthest)
        position = int(kind == "negative")
        d, anchor = self._distance[position].detach(), self._anchor[position]
        columns = []
        for column in limit.detach().unbind(1):
            kept = d < column[anchor] if farthest else d > column[anchor]
            columns.append(self._sorted(position, 1, farthest, kept))
        index = torch.cat(columns, 1) if columns else anchor.new_empty((self.anchors, 0))
        return self._lists(position, index)

    def top(self, kind: Kind, k: int, *, farthest: bool = False) -> PairLists:
        """See :meth:`Pairs.top`."""
        position = int(kind == "negative")
        everything = torch.ones_like(self._anchor[position], dtype=torch.bool)
        return self._lists(position, self._sorted(position, k, farthest, everything))

    def _sorted(self, kind: int, k: int, farthest: bool, kept: Tensor) -> Tensor:
        """Positions in the list of the first k kept pairs of each anchor, [N, k], -1 for none."""
        other, d = self._other[kind], self._distance[kind].detach()
        valid = self._valid[kind]
        kept = kept if valid is None else kept & valid
        # Others belong to a row, and late ones to a column, that is cut off: no shape depends on
        # the data, which would wait for the device.
        anchor = self._anchor[kind].masked_fill(~kept, self.anchors)
        order = other.argsort(stable=True)
        order = order[(-d if farthest else d)[order].argsort(stable=True)]
        order = order[anchor[order].argsort(stable=True)]
        sorted_anchor = anchor[order]
        begin = torch.searchsorted(sorted_anchor, torch.arange(self.anchors + 1, device=d.device))
        rank = torch.arange(len(order), device=d.device) - begin[sorted_anchor]
        index = anchor.new_full((self.anchors + 1, k + 1), -1)
        index[sorted_anchor, rank.clamp(max=k)] = order
        return index[:-1, :k]

    def _lists(self, kind: int, position: Tensor) -> PairLists:
        valid = position >= 0
        if len(self._other[kind]) == 0:
            # The sum of nothing keeps it in the graph.
            empty = self._distance[kind].sum().expand(position.shape)
            return PairLists(position, empty, valid)
        at = position.clamp(min=0)
        index = self._other[kind][at].masked_fill(~valid, -1)
        return PairLists(index, self._distance[kind][at].masked_fill(~valid, 0), valid)

    def counts(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.counts`."""
        positives, negatives = (
            self._by_anchor(kind, torch.ones_like(anchor) if valid is None else valid.long())
            for kind, (anchor, valid) in enumerate(zip(self._anchor, self._valid, strict=True))
        )
        return positives, negatives

    def threshold_sum(
        self, kind: Kind, formula: Formula, thresholds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.threshold_sum`."""
        position = int(kind == "negative")
        anchor, d = self._anchor[position], self._distance[position].double()
        limit = thresholds.double().expand(self.anchors, -1)[anchor]
        none, valid = limit == -torch.inf, self._valid[position]
        if valid is not None:
            none = none | ~valid.unsqueeze(1)
        z = (limit.masked_fill(none, 0) - d.unsqueeze(1)).masked_fill(none, -1)
        values = term(z, formula)[0].masked_fill(none, 0)
        sums = values.new_zeros((self.anchors, thresholds.shape[1])).index_add(0, anchor, values)
        counts = anchor.new_zeros(sums.shape).index_add(0, anchor, ((z > 0) & ~none).long())
        return sums, counts
