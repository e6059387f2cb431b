# SPDX-License-Identifier: Apache-2.0
"""All labelled pairs of a batch by the fused kernels: see ``pairs.py``."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from flashmetric.functional.pairs import (
    Logit,
    LogSumExps,
    PairLists,
    Pairs,
    Parameter,
    Sums,
    Term,
    largest,
)
from flashmetric.functional.totals import totals_of
from flashmetric.ops import PairDistance, RowLse, RowSum, RowTotal, ThresholdSum
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import Kind, class_members, pair_counts, words
from flashmetric.ops.nearest_beyond import nearest_beyond
from flashmetric.ops.row_top_k import row_top_k
from flashmetric.ops.terms import Formula

_row_sum: Callable[..., tuple[Tensor, Tensor]] = RowSum.apply
_row_total: Callable[..., tuple[Tensor, Tensor]] = RowTotal.apply
_row_lse: Callable[..., tuple[Tensor, ...]] = RowLse.apply
_threshold_sum: Callable[..., tuple[Tensor, Tensor]] = ThresholdSum.apply
pair_distance: Callable[..., Tensor] = PairDistance.apply
"""Exact distances of listed pairs, see ``flashmetric::pair_distance``."""

# Pairs above which it pays to bring rows of a class together when only positives are wanted.
_MANY_PAIRS = 1 << 20


def _of_rows(term: Term | None, order: Tensor) -> Term | None:
    """A term with parameters per anchor in the given order of anchors."""
    if term is None:
        return None
    scale, offset = (
        value.expand(len(order)).index_select(0, order)
        if isinstance(value, Tensor) and value.ndim
        else value
        for value in (term.scale, term.offset)
    )
    return term._replace(scale=scale, offset=offset)


class AllPairs(Pairs):
    """All ordered pairs of labelled rows, by the fused kernels; no N x M matrix exists."""

    def __init__(
        self,
        embeddings: Tensor,
        labels: Tensor,
        ref_emb: Tensor | None,
        ref_labels: Tensor | None,
        rule: str,
        distance: str,
        anchor_scale: Tensor | None = None,
    ) -> None:
        """Rows as the kernel compares them; ``anchor_scale`` [N] multiplies all distances."""
        self.embeddings, self.ref_emb = embeddings, ref_emb
        self.labels, self.ref_labels = labels, ref_labels
        self.rule, self.distance = rule, distance
        self.anchor_scale = anchor_scale
        self.anchors = embeddings.shape[0]
        self.references = self.anchors if ref_emb is None else ref_emb.shape[0]
        self._dtype = accumulate_dtype(embeddings.dtype)
        self._ordered = False

    @property
    def _pairs(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, str, str]:
        labels, ref_labels, ref_emb = self.labels, self.ref_labels, self.ref_emb
        # The compiler takes no tensor twice, such as two views with the same labels.
        if ref_labels is labels:
            ref_labels = labels.view_as(labels)
        if ref_emb is self.embeddings:
            ref_emb = ref_emb.view_as(ref_emb)
        return self.embeddings, labels, ref_emb, ref_labels, self.rule, self.distance

    # What sweeps the pairs: elsewhere references may be in several places.

    def _row_sum(self, *given: Any) -> tuple[Tensor, Tensor]:
        return _row_sum(*self._pairs, *given)

    def _row_lse(self, *given: Any) -> tuple[Tensor, ...]:
        return _row_lse(*self._pairs, *given)

    def _thresholds(self, *given: Any) -> tuple[Tensor, Tensor]:
        return _threshold_sum(*self._pairs, *given)

    def _measured(self, index: Tensor) -> Tensor:
        listed = index.T.contiguous()
        return pair_distance(self.embeddings, self.ref_emb, None, listed, self.distance).T

    # What is selected has no gradient; without a kernel, autograd would record the search.
    def _nearest_beyond(self, kind: Kind, farthest: bool, limits: Tensor) -> Tensor:
        with torch.no_grad():
            index: Tensor = nearest_beyond(*self._pairs, kind, farthest, limits)
        return index

    def _row_top_k(self, kind: Kind, k: int, farthest: bool) -> Tensor:
        with torch.no_grad():
            index: Tensor = row_top_k(*self._pairs, kind, k, farthest)
        return index

    def _by_kind(self, positive: Parameter, negative: Parameter) -> Tensor:
        """Parameters of both kinds as [2, 1] or [2, N]."""
        if not isinstance(positive, Tensor) and not isinstance(negative, Tensor):
            # Filled, not copied from the host: that would not be allowed in a CUDA graph.
            both = self.embeddings.new_full((2, 1), positive, dtype=self._dtype)
            if positive != negative:
                both[1] = negative
            return both
        sides = [self._as_tensor(side) for side in (positive, negative)]
        # One for all, or one per anchor, of whom there may be none.
        size = next((side.numel() for side in sides if side.ndim and side.numel() != 1), 1)
        return torch.stack([side.expand(size) for side in sides])

    def _as_tensor(self, parameter: Parameter) -> Tensor:
        if isinstance(parameter, Tensor):
            return parameter.to(self.embeddings.device, self._dtype)
        return self.embeddings.new_full((), parameter, dtype=self._dtype)

    def _scaled(self, scale: Tensor) -> Tensor:
        return scale if self.anchor_scale is None else scale * self.anchor_scale

    def _bound(self, bounds: tuple[Tensor | None, Tensor | None]) -> Tensor | None:
        if bounds[0] is None and bounds[1] is None:
            return None
        none = self.embeddings.new_full((1,), torch.inf, dtype=self._dtype)
        low, high = (none.neg() if bounds[0] is None else bounds[0], bounds[1])
        high = none if high is None else high
        bound = torch.stack([side.to(self._dtype).expand(self.anchors) for side in (low, high)])
        if self.anchor_scale is not None:
            bound = bound / self.anchor_scale
        return bound.detach()

    def _worth_ordering(self) -> bool:
        """Whether sweeps of the positives alone should find the rows of a class together."""
        many = self.anchors * self.references >= _MANY_PAIRS
        return many and not self._ordered and self.rule != "any"

    def _by_class(self) -> tuple["AllPairs", Tensor]:
        """The same pairs with rows sorted by class, and the rows in that order.

        Nearly all blocks of pairs then hold no positive, and are left out.
        """
        order = words(self.labels)[:, 0].argsort(stable=True)
        scale, refs, ref_labels = self.anchor_scale, self.ref_emb, self.ref_labels
        if refs is not None and ref_labels is not None:
            of_refs = words(ref_labels)[:, 0].argsort(stable=True)
            refs, ref_labels = refs.index_select(0, of_refs), ref_labels.index_select(0, of_refs)
        pairs = AllPairs(
            self.embeddings.index_select(0, order),
            self.labels.index_select(0, order),
            refs,
            ref_labels,
            self.rule,
            self.distance,
            None if scale is None else scale.index_select(0, order),
        )
        pairs._ordered = True
        return pairs, order

    def _terms(
        self, positive: Term | None, negative: Term | None
    ) -> tuple[str, str, Tensor, Tensor]:
        absent = Term("none", 0.0, 0.0)
        p, n = positive or absent, negative or absent
        scale = self._scaled(self._by_kind(p.scale, n.scale))
        return p.formula, n.formula, scale, self._by_kind(p.offset, n.offset)

    def sum(
        self,
        positive: Term | None = None,
        negative: Term | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Sums:
        """See :meth:`Pairs.sum`."""
        if negative is None and bounds == (None, None) and self._worth_ordering():
            pairs, order = self._by_class()
            by_class = pairs.sum(_of_rows(positive, order))
            back = order.argsort()
            return Sums(*(column.index_select(0, back) for column in by_class))
        terms = self._terms(positive, negative)
        sums, counts = self._row_sum(*terms, self._bound(bounds))
        return Sums(*sums.unbind(), *counts.unbind())

    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """See :meth:`Pairs.total`."""
        if negative is None and self._worth_ordering():
            pairs, order = self._by_class()
            return pairs.total(_of_rows(positive, order))
        terms = self._terms(positive, negative)
        training = torch.is_grad_enabled()
        # A memory bank of constant references costs no gradient work.
        ref_grad = training and self.ref_emb is not None and self.ref_emb.requires_grad
        with_grad = ref_grad or (training and self.embeddings.requires_grad)
        totals, counts = _row_total(*self._pairs, *terms, None, with_grad, ref_grad)
        return totals_of(Sums(*totals.unbind(), *counts.unbind()))

    def logsumexp(
        self,
        positive: Logit | None = None,
        negative: Logit | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LogSumExps:
        """See :meth:`Pairs.logsumexp`."""
        return self._logsumexp(positive, negative, bounds, False)[0]

    def logsumexp_both_ways(
        self, positive: Logit | None = None, negative: Logit | None = None
    ) -> tuple[LogSumExps, LogSumExps]:
        """Log-sum-exps of every anchor, and of every reference over the anchors, in one sweep.

        References must be given, and the parameters must be uniform.
        """
        rows, columns = self._logsumexp(positive, negative, (None, None), True)
        return rows, columns

    def _logsumexp(
        self,
        positive: Logit | None,
        negative: Logit | None,
        bounds: tuple[Tensor | None, Tensor | None],
        columns: bool,
    ) -> tuple[LogSumExps, LogSumExps]:
        absent = Logit(0.0, 0.0)
        p, n = positive or absent, negative or absent
        forms = [side.form if given else "none" for side, given in ((p, positive), (n, negative))]
        if self.anchor_scale is not None and "circle" in forms:
            # The kernels have no derivative of these in the scale.
            raise ValueError("a distance that scales by anchor needs affine logits, got 'circle'")
        scale = self._scaled(self._by_kind(p.scale, n.scale))
        offset = self._by_kind(p.offset, n.offset)
        shape = p.shape if positive else n.shape
        results = self._row_lse(*forms, scale, offset, self._bound(bounds), shape, columns)
        lse, mean, counts, *of_refs = results
        if self.anchor_scale is not None:
            mean = mean * self.anchor_scale.detach()
        by_row = LogSumExps(*lse.unbind(), *mean.unbind(), *counts.unbind())
        lse, mean, counts = of_refs
        return by_row, LogSumExps(*lse.unbind(), *mean.unbind(), *counts.unbind())

    def of_references(self, rows: Tensor) -> "AllPairs":
        """The same anchors with these references alone.

        The rows of a self-batch are then no longer known to be the anchors themselves: for pairs
        of different classes only.
        """
        refs, ref_labels = self.embeddings, self.labels
        if self.ref_emb is not None and self.ref_labels is not None:
            refs, ref_labels = self.ref_emb, self.ref_labels
        return AllPairs(
            self.embeddings,
            self.labels,
            refs.index_select(0, rows),
            ref_labels.index_select(0, rows),
            self.rule,
            self.distance,
            self.anchor_scale,
        )

    def distances(self, index: Tensor) -> PairLists:
        """Distances of each anchor to the listed references [N, K], -1 for none."""
        values = self._measured(index)
        if self.anchor_scale is not None:
            values = values * self.anchor_scale.unsqueeze(1)
        return PairLists(index, values, index >= 0)

    def nearest(self, kind: Kind, beyond: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.nearest`."""
        return self._extreme(kind, False, beyond)

    def farthest(self, kind: Kind, below: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.farthest`."""
        return self._extreme(kind, True, below)

    def _extreme(self, kind: Kind, farthest: bool, limit: Tensor | None) -> PairLists:
        if limit is None:
            anything = torch.inf if farthest else -torch.inf
            limit = self.embeddings.new_full((self.anchors, 1), anything, dtype=self._dtype)
        else:
            limit = self._unscaled(limit)
        return self.distances(self._nearest_beyond(kind, farthest, limit.detach()))

    def _unscaled(self, thresholds: Tensor) -> Tensor:
        """Thresholds on distances as thresholds on what the kernel measures."""
        thresholds = thresholds.to(self._dtype)
        return (
            thresholds if self.anchor_scale is None else thresholds / self.anchor_scale.unsqueeze(1)
        )

    def top(self, kind: Kind, k: int, *, farthest: bool = False) -> PairLists:
        """See :meth:`Pairs.top`."""
        return self.distances(self._row_top_k(kind, k, farthest))

    def positives(self, limit: int | None = None) -> PairLists:
        """See :meth:`Pairs.positives`."""
        plain = self.rule == "equal" and self.labels.ndim == 1
        if limit is not None or not plain or not self.anchors or not self.references:
            return super().positives(limit)
        # All rows of a class are listed: no need to look at the others.
        alone = self.ref_emb is None
        count = largest(self.counts()[0])
        refs = self.labels if self.ref_labels is None else self.ref_labels
        other = class_members(self.labels, refs, count + alone)
        if alone:
            other = other.masked_fill(
                other == torch.arange(len(other), device=other.device)[:, None], -1
            )
        lists = self.distances(other)
        farness = lists.distance.detach().masked_fill(~lists.valid, -torch.inf)
        order = farness.sort(dim=1, descending=True, stable=True).indices[:, :count]
        return PairLists(*(column.gather(1, order) for column in lists))

    def counts(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.counts`."""
        return pair_counts(self.labels, self.ref_labels, self.rule)

    def threshold_sum(
        self, kind: Kind, formula: Formula, thresholds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.threshold_sum`."""
        if self.anchor_scale is None:
            return self._thresholds(kind, formula, thresholds.to(self._dtype))
        if formula != "hinge":
            raise ValueError(f"a distance that scales by anchor needs the hinge, got {formula!r}")
        # max(t - q d, 0) = q max(t / q - d, 0); an anchor without a scale counts nothing.
        known = (self.anchor_scale > 0).unsqueeze(1)
        scale = self.anchor_scale.unsqueeze(1).masked_fill(~known, 1)
        # Padding takes no part in the division: the derivative of -inf / q is not finite.
        padding = (thresholds == -torch.inf).expand(self.anchors, -1)
        limit = thresholds.to(self._dtype).masked_fill(thresholds == -torch.inf, 0) / scale
        limit = limit.masked_fill(padding | ~known, -torch.inf)
        sums, counts = self._thresholds(kind, formula, limit)
        return sums * scale, counts
