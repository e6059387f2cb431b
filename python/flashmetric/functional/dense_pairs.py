# SPDX-License-Identifier: Apache-2.0
"""The pairs of a batch in plain PyTorch on an explicit distance matrix: every loss as one reads it.

:func:`dense` makes all losses compute this way, without the fused kernels, in O(N M D) memory.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pairs import (
    Logit,
    LogSumExps,
    PairLists,
    Parameter,
    Sums,
    Term,
)
from flashmetric.functional.totals import totals_of
from flashmetric.ops.distance import accumulate_dtype, has_unit_rows, poison, squared_norms
from flashmetric.ops.labels import KINDS, Kind, pair_kinds
from flashmetric.ops.terms import Formula, term

_recorded: ContextVar[list[Tensor] | None] = ContextVar("flashmetric_dense", default=None)


@contextmanager
def dense() -> Iterator[list[Tensor]]:
    """Compute losses from explicit distance matrices, by plain autograd, within the context.

    Values and gradients are those of the fused kernels but for rounding. Not for use under
    ``torch.compile``.

    Yields:
        The distance matrices [N, M] of the losses computed so far, with gradient history.

    Example:
        >>> import torch
        >>> from flashmetric import MultiSimilarityLoss, reference
        >>> x, labels = torch.eye(3, requires_grad=True), torch.tensor([0, 0, 1])
        >>> with reference.dense() as matrices:
        ...     loss = MultiSimilarityLoss()(x, labels)
        >>> matrices[0].shape, torch.autograd.grad(loss, matrices[0])[0][0, 1].item()
        (torch.Size([3, 3]), 0.243...)
    """
    matrices: list[Tensor] = []
    token = _recorded.set(matrices)
    try:
        yield matrices
    finally:
        _recorded.reset(token)


def recorded_matrices() -> list[Tensor] | None:
    """Where the matrices of :func:`dense` go; None outside of it."""
    # A compiler does not follow context variables.
    return None if torch.compiler.is_compiling() else _recorded.get()


def distance_matrix(x: Tensor, r: Tensor, distance: str) -> Tensor:
    """Distances [N, M] of rows as the kernels compare them, by differences of features.

    Roots have derivative 0 at 0. Rows of the cosine family are of unit length or zero.
    """
    dtype = accumulate_dtype(x.dtype)
    x, r = x.to(dtype).unsqueeze(1), r.to(dtype).unsqueeze(0)
    if distance == "dot":
        return -(x * r).sum(2)
    if distance == "cityblock":
        return (x - r).abs().sum(2)
    if distance == "chi2":
        total = x + r
        none = total == 0
        return ((x - r).square() / total.masked_fill(none, 1)).masked_fill(none, 0).sum(2)
    squared = (x - r).square().sum(2)
    if has_unit_rows(distance):
        absent = ~(x.any(2) & r.any(2))
        squared = squared.masked_fill(absent, 2)
    if distance == "euclidean":
        return _root(squared)
    if distance == "cosine":
        return squared / 2
    if distance == "sqrt_cosine":
        return _root(squared / 2)
    if distance == "rbf":
        return -torch.expm1(-squared)
    if distance == "angular":
        half = _root(squared) / 2
        opposite = half >= 1
        return 2 * torch.asin(half.masked_fill(opposite, 0)) + opposite * torch.pi
    return squared


def _root(squared: Tensor) -> Tensor:
    zero = squared == 0
    return squared.masked_fill(zero, 1).sqrt().masked_fill(zero, 0)


class DensePairs(AllPairs):
    """All labelled pairs, as a distance matrix [N, M] and a mask of either kind."""

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
        """Measure every pair."""
        super().__init__(embeddings, labels, ref_emb, ref_labels, rule, distance, anchor_scale)
        self.matrix, self._d = _measure(embeddings, ref_emb, distance, anchor_scale)
        self._masks = pair_kinds(labels, labels if ref_labels is None else ref_labels, rule)
        if ref_emb is None:
            for mask in self._masks:
                mask.fill_diagonal_(False)

    def of_references(self, rows: Tensor) -> "DensePairs":
        """The same anchors with these references alone: columns of the same matrix."""
        part = copy(self)
        part.references = rows.numel()
        part.matrix, part._d = self.matrix[:, rows], self._d[:, rows]
        positive, negative = self._masks
        part._masks = positive[:, rows], negative[:, rows]
        return part

    def _kept(self, kind: int, bound: Tensor | None) -> Tensor:
        """Mask of the pairs beyond (positives) or before (negatives) a bound [N]."""
        mask = self._masks[kind]
        if bound is None:
            return mask
        d = self._d.detach()
        limit = bound.detach().to(d.dtype).expand(self.anchors).unsqueeze(1)
        kept = torch.lt(d, limit) if kind else torch.gt(d, limit)
        return mask & (kept | d.isnan())

    def _affine(self, given: Term | Logit, kept: Tensor) -> Tensor:
        """Z = scale * distance + offset, 0 where there is no pair."""

        def by_row(parameter: Parameter) -> Parameter:
            if isinstance(parameter, Tensor) and parameter.ndim:
                return parameter.to(self._d.dtype).expand(self.anchors).unsqueeze(1)
            return parameter

        z: Tensor = by_row(given.scale) * self._d + by_row(given.offset)
        return z.where(kept, z.new_zeros(()))

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
            kept = self._kept(kind, bounds[kind])
            value = torch.zeros_like(self._d)
            if given is not None:
                value = term(self._affine(given, kept), given.formula)[0] * kept
            sums.append(value.sum(1))
            counts.append(kept.sum(1))
            active.append((kept & (value > 0)).sum(1))
        return Sums(*sums, *counts, *active)

    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """See :meth:`Pairs.total`."""
        return totals_of(Sums(*(by_row.sum() for by_row in self.sum(positive, negative))))

    def logsumexp(
        self,
        positive: Logit | None = None,
        negative: Logit | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LogSumExps:
        """See :meth:`Pairs.logsumexp`."""
        return self._along(positive, negative, bounds, 1)

    def logsumexp_both_ways(
        self, positive: Logit | None = None, negative: Logit | None = None
    ) -> tuple[LogSumExps, LogSumExps]:
        """Log-sum-exps of every anchor, and of every reference over the anchors."""
        unbounded = (None, None)
        rows = self._along(positive, negative, unbounded, 1)
        return rows, self._along(positive, negative, unbounded, 0)

    def _along(
        self,
        positive: Logit | None,
        negative: Logit | None,
        bounds: tuple[Tensor | None, Tensor | None],
        dim: int,
    ) -> LogSumExps:
        lse, mean, counts = [], [], []
        for kind, given in enumerate((positive, negative)):
            kept = self._kept(kind, bounds[kind])
            if given is None:
                kept, value = torch.zeros_like(kept), torch.zeros_like(self._d)
            else:
                value = self._affine(given, kept)
                if given.form == "circle":
                    value = (value + given.shape).relu().detach() * (value - given.shape)
            value = value.masked_fill(~kept, -torch.inf)
            some = kept.any(dim)
            shown = value.masked_fill(~some.unsqueeze(dim), 0)
            total = shown.logsumexp(dim).masked_fill(~some, -torch.inf)
            weight = shown.detach().softmax(dim)
            lse.append(total)
            mean.append((weight * self._d.detach()).sum(dim).masked_fill(~some, 0))
            counts.append(kept.sum(dim))
        return LogSumExps(*lse, *mean, *counts)

    def distances(self, index: Tensor) -> PairLists:
        """Distances of each anchor to the listed references [N, K], -1 for none."""
        valid = index >= 0
        if self.references == 0:
            return PairLists(index, self._d.new_zeros(index.shape), valid)
        values = self._d.gather(1, index.clamp(min=0))
        return PairLists(index, values.where(valid, values.new_zeros(())), valid)

    def nearest(self, kind: Kind, beyond: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.nearest`."""
        return self._extreme(kind, False, beyond)

    def farthest(self, kind: Kind, below: Tensor | None = None) -> PairLists:
        """See :meth:`Pairs.farthest`."""
        return self._extreme(kind, True, below)

    def _extreme(self, kind: Kind, farthest: bool, limit: Tensor | None) -> PairLists:
        if limit is None:
            return self.top(kind, 1, farthest=farthest)
        d, mask = self._d.detach(), self._masks[KINDS.index(kind)]
        columns = []
        for column in limit.detach().to(d.dtype).unbind(1):
            beyond = d < column.unsqueeze(1) if farthest else d > column.unsqueeze(1)
            columns.append(self._in_order(mask & (beyond | d.isnan()), 1, farthest))
        none = mask.new_empty((self.anchors, 0), dtype=torch.int64)
        return self.distances(torch.cat([none, *columns], 1))

    def top(self, kind: Kind, k: int, *, farthest: bool = False) -> PairLists:
        """See :meth:`Pairs.top`."""
        return self.distances(self._in_order(self._masks[KINDS.index(kind)], k, farthest))

    def _in_order(self, mask: Tensor, k: int, farthest: bool) -> Tensor:
        """The first k pairs of each row [N, k], by distance and then by index; -1 for none."""
        d = self._d.detach()
        key = torch.where(d.isnan(), 0, -d if farthest else d).masked_fill(~mask, torch.inf)
        order = key.argsort(dim=1, stable=True)
        place = torch.arange(self.references, device=d.device)
        order = order.masked_fill(place >= mask.sum(1, keepdim=True), -1)[:, :k]
        return torch.nn.functional.pad(order, (0, k - order.shape[1]), value=-1)

    def counts(self) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.counts`."""
        positive, negative = self._masks
        return positive.sum(1), negative.sum(1)

    def threshold_sum(
        self, kind: Kind, formula: Formula, thresholds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """See :meth:`Pairs.threshold_sum`."""
        mask, d = self._masks[KINDS.index(kind)], self._d.double()
        sums = [d.new_zeros((self.anchors, 0))]
        counts = [mask.new_zeros((self.anchors, 0), dtype=torch.int64)]
        limits = thresholds.to(self._d.dtype).double().expand(self.anchors, -1)
        for limit in limits.split(1, 1):
            used = mask & (limit != -torch.inf)
            z = (limit.masked_fill(limit == -torch.inf, 0) - d).where(used, d.new_zeros(()))
            value = term(z, formula)[0].where(used, d.new_zeros(()))
            sums.append(value.sum(1, keepdim=True))
            counts.append((used & (z > 0)).sum(1, keepdim=True))
        return torch.cat(sums, 1), torch.cat(counts, 1)


class DenseListedPairs(ListedPairs):
    """Listed pairs whose distances are entries of a distance matrix."""

    def __init__(
        self,
        embeddings: Tensor,
        ref_emb: Tensor | None,
        indices: tuple[Tensor, ...],
        distance: str,
        anchor_scale: Tensor | None = None,
    ) -> None:
        """Measure every pair, listed or not."""
        super().__init__(embeddings, ref_emb, indices, distance, anchor_scale)
        self.matrix, d = _measure(embeddings, ref_emb, distance, anchor_scale)
        (a1, a2), (p, n) = self._anchor, self._other
        self._distance = tuple(
            d[a, j.clamp(min=0)].masked_fill(j < 0, 0) for a, j in ((a1, p), (a2, n))
        )


def _measure(
    x: Tensor, ref_emb: Tensor | None, distance: str, anchor_scale: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Distances [N, M], in a form to differentiate by; and what losses get to see of them."""
    r = x if ref_emb is None else ref_emb
    matrix = distance_matrix(x, r, distance)
    if anchor_scale is not None:
        matrix = matrix * anchor_scale.unsqueeze(1)
    if not matrix.requires_grad and torch.is_grad_enabled():
        matrix.requires_grad_()
    # One row that is not finite spoils everything, as in the kernels.
    norms = [squared_norms(rows.detach().to(matrix.dtype)) for rows in (x, r)]
    return matrix, matrix + poison(*norms)
