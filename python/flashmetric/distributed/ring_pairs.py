# SPDX-License-Identifier: Apache-2.0
"""All labelled pairs of a batch whose references go round the ranks: none holds them all.

Statistics of the anchors merge from block to block: sums add up, log-sum-exps by logaddexp,
selections by distance and row number. Backward goes round once more with the finished statistics,
and the gradients of a block travel behind it.
"""

from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flashmetric.distributed.ring import Ring
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import PairLists, Pairs, Sums, Term, largest
from flashmetric.functional.totals import totals_of
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.labels import Kind
from flashmetric.ops.nearest_beyond import nearest_beyond
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.pair_distance import pair_distance, pair_distance_backward
from flashmetric.ops.row_lse import row_lse, row_lse_backward
from flashmetric.ops.row_sum import parameter_grad, row_sum, row_sum_backward
from flashmetric.ops.row_top_k import row_top_k
from flashmetric.ops.threshold_sum import threshold_sum, threshold_sum_backward


class Circle:
    """What all sweeps of one call share: the ring, labels of all rows, rule and distance."""

    def __init__(
        self,
        ring: Ring,
        settle: Callable[[], None],
        labels: Tensor,
        ref_labels: Tensor,
        rule: str,
        distance: str,
    ) -> None:
        """Bind them.

        Args:
            ring: the ranks.
            settle: raises if another rank has failed.
            labels: of the anchors.
            ref_labels: of the rows of all ranks, in the order of the ranks.
            rule: how labels are compared.
            distance: what is measured.
        """
        self._settle = settle
        self.ring, self.labels, self.rule, self.distance = ring, labels, rule, distance
        self.of_rank = ref_labels.split(ring.counts)
        begins = torch.tensor([0, *ring.counts]).cumsum(0).tolist()
        self.begin: list[int] = begins[:-1]

    @contextmanager
    def rounds(self, rows: Tensor) -> Iterator[Iterator[tuple[int, Tensor]]]:
        """:meth:`Ring.rounds`, which end on all ranks even if one of them fails meanwhile."""
        self._settle()
        with closing(self.ring.rounds(rows.detach())) as rounds:
            yield rounds

    def pairs(self, x: Tensor, owner: int, block: Tensor) -> tuple[Any, ...]:
        """The leading arguments of all ops."""
        return x, self.labels, block, self.of_rank[owner], self.rule, self.distance


def _added(
    circle: Circle, x: Tensor, refs: Tensor, sweep: Callable[..., tuple[Tensor, ...]]
) -> tuple[Tensor, ...]:
    """Sums over the blocks of what ``sweep(*pairs)`` finds in each."""
    results: tuple[Tensor, ...] | None = None
    with circle.rounds(refs) as rounds:
        for owner, block in rounds:
            part = sweep(*circle.pairs(x, owner, block))
            if results is not None:
                part = tuple(a + b for a, b in zip(results, part, strict=True))
            results = part
    assert results is not None
    return results


def _back(
    circle: Circle, x: Tensor, refs: Tensor, sweep: Callable[[int, Tensor], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """Gradients of anchors and of own references; ``sweep(owner, block)`` gives those of one."""
    dtype = accumulate_dtype(x.dtype)
    of_x = torch.zeros(x.shape, dtype=dtype, device=x.device)

    def add(owner: int, block: Tensor) -> Tensor:
        grad_x, grad_block = sweep(owner, block)
        of_x.add_(grad_x)
        grads: Tensor = grad_block.to(dtype)
        return grads

    of_refs = circle.ring.rounds_with_sums(refs, add, dtype)
    return of_x.to(x.dtype), of_refs.to(refs.dtype)


class _Sum(torch.autograd.Function):
    """row_sum of x, refs, circle, the two terms, scale, offset, bound."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        refs: Tensor,
        circle: Circle,
        terms: tuple[str, str],
        scale: Tensor,
        offset: Tensor,
        bound: Tensor | None,
    ) -> tuple[Tensor, Tensor]:
        given = (*terms, scale, offset, bound, False)
        sums, counts, slopes = _added(circle, x, refs, lambda *p: row_sum(*p, *given)[:3])
        ctx.circle, ctx.terms = circle, terms
        ctx.save_for_backward(x, refs, scale, offset, bound, slopes)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, refs, scale, offset, bound, slopes = ctx.saved_tensors
        given = (scale, offset, bound)
        circle: Circle = ctx.circle
        of_x, of_refs = _back(
            circle,
            x,
            refs,
            lambda owner, block: row_sum_backward(
                grad, *circle.pairs(x, owner, block), *ctx.terms, *given, True
            ),
        )
        by_scale = parameter_grad(grad * slopes[2:], scale)
        return of_x, of_refs, None, None, by_scale, parameter_grad(grad * slopes[:2], offset), None


class _Lse(torch.autograd.Function):
    """row_lse of x, refs, circle, the two forms, scale, offset, bound, shape."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        refs: Tensor,
        circle: Circle,
        forms: tuple[str, str],
        scale: Tensor,
        offset: Tensor,
        bound: Tensor | None,
        shape: float,
    ) -> tuple[Tensor, Tensor, Tensor]:
        total = mean = counts = None
        with circle.rounds(refs) as rounds:
            for owner, block in rounds:
                pairs = circle.pairs(x, owner, block)
                part = row_lse(*pairs, *forms, scale, offset, bound, shape, False)
                lse, moment, number = part[0].double(), part[1].double(), part[2]
                if total is None:
                    total, mean, counts = lse, moment, number
                    continue
                assert mean is not None and counts is not None
                merged = torch.logaddexp(total, lse)
                # Of two log-sum-exps of nothing the means are 0.
                safe = merged.masked_fill(merged == -torch.inf, 0)
                mean = mean * (total - safe).exp() + moment * (lse - safe).exp()
                total, counts = merged, counts + number
        assert total is not None and mean is not None and counts is not None
        dtype = accumulate_dtype(x.dtype)
        total, mean = total.to(dtype), mean.to(dtype)
        ctx.circle, ctx.forms, ctx.shape = circle, forms, shape
        ctx.save_for_backward(x, refs, scale, offset, bound, total, mean)
        ctx.mark_non_differentiable(mean, counts)
        return total, mean, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: None, __: None) -> tuple[Tensor | None, ...]:
        x, refs, scale, offset, bound, lse, mean = ctx.saved_tensors
        grad = grad.masked_fill(lse == -torch.inf, 0)
        given = (*ctx.forms, scale, offset, bound, ctx.shape, True)
        circle: Circle = ctx.circle
        of_x, of_refs = _back(
            circle,
            x,
            refs,
            lambda owner, block: row_lse_backward(
                grad, lse, None, None, *circle.pairs(x, owner, block), *given
            ),
        )
        by_scale, by_offset = parameter_grad(grad * mean, scale), parameter_grad(grad, offset)
        return of_x, of_refs, None, None, by_scale, by_offset, None, None


class _Thresholds(torch.autograd.Function):
    """threshold_sum of x, refs, circle, kind, formula, thresholds."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        refs: Tensor,
        circle: Circle,
        kind: Kind,
        formula: str,
        thresholds: Tensor,
    ) -> tuple[Tensor, Tensor]:
        given = (kind, formula, thresholds)
        sums, counts, slopes = _added(circle, x, refs, lambda *p: threshold_sum(*p, *given))
        ctx.circle, ctx.given = circle, (kind, formula)
        ctx.save_for_backward(x, refs, thresholds, slopes)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        x, refs, thresholds, slopes = ctx.saved_tensors
        grad = grad.masked_fill(thresholds == -torch.inf, 0)
        circle: Circle = ctx.circle
        of_x, of_refs = _back(
            circle,
            x,
            refs,
            lambda owner, block: threshold_sum_backward(
                grad, *circle.pairs(x, owner, block), *ctx.given, thresholds, True
            ),
        )
        by_threshold = grad * slopes
        if thresholds.shape[0] == 1:
            by_threshold = ordered_sum(by_threshold.T).unsqueeze(0)
        return of_x, of_refs, None, None, None, by_threshold.to(thresholds.dtype)


class _Distances(torch.autograd.Function):
    """pair_distance of x, refs, circle, numbers [N, K] of rows of the whole batch, -1 for none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, refs: Tensor, circle: Circle, index: Tensor) -> Tensor:
        values = torch.zeros(index.shape, dtype=accumulate_dtype(x.dtype), device=x.device)
        with circle.rounds(refs) as rounds:
            for owner, block in rounds:
                here = _of_block(circle, owner, index)
                part = pair_distance(x, block, None, here.T.contiguous(), circle.distance).T
                values = torch.where(here >= 0, part, values)
        ctx.circle = circle
        ctx.save_for_backward(x, refs, index, values)
        return values

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, refs, index, values = ctx.saved_tensors
        circle: Circle = ctx.circle

        def sweep(owner: int, block: Tensor) -> tuple[Tensor, Tensor]:
            here = _of_block(circle, owner, index).T.contiguous()
            of_pairs = (x, block, None, here, values.T.contiguous(), circle.distance, True)
            grads: tuple[Tensor, Tensor] = pair_distance_backward(grad.T.contiguous(), *of_pairs)
            return grads

        of_x, of_refs = _back(circle, x, refs, sweep)
        return of_x, of_refs, None, None


def _of_block(circle: Circle, owner: int, index: Tensor) -> Tensor:
    """Numbers within a block of those that are in it, else -1."""
    here = index - circle.begin[owner]
    return here.masked_fill((here < 0) | (here >= circle.ring.counts[owner]), -1)


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
        self._refs = refs

    def _worth_ordering(self) -> bool:
        return False

    def _row_sum(self, first: str, second: str, *rest: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _Sum.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, (first, second), *rest
        )
        return result

    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """See :meth:`Pairs.total`."""
        sums, counts = self._row_sum(*self._terms(positive, negative), None)
        totals = Sums(*ordered_sum(sums).unbind(), *counts.sum(1).unbind())
        return totals_of(totals)

    def _row_lse(self, first: str, second: str, *rest: Any) -> tuple[Tensor, ...]:
        *given, columns = rest
        if columns:
            raise ValueError("statistics of references are not to be had in a ring")
        found: tuple[Tensor, ...] = _Lse.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, (first, second), *given
        )
        return *found, *(t[:, :0] for t in found)

    def _thresholds(self, *given: Any) -> tuple[Tensor, Tensor]:
        result: tuple[Tensor, Tensor] = _Thresholds.apply(  # type: ignore[no-untyped-call]
            self.embeddings, self._refs, self._circle, *given
        )
        return result

    def _measured(self, index: Tensor) -> Tensor:
        values: Tensor = _Distances.apply(  # type: ignore[no-untyped-call]
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
            limit = self._circle.ring.largest(largest(self.counts()[0]))
        return Pairs.positives(self, limit)
