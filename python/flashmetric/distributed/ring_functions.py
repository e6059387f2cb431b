# SPDX-License-Identifier: Apache-2.0
"""The statistics of anchors whose references go round the ranks, with their gradients.

Statistics merge from block to block: sums add up, log-sum-exps by logaddexp. Backward goes round
once more with the finished statistics, and the gradients of a block travel behind it.
"""

from typing import Any

import torch
from torch import Tensor

from flashmetric.distributed.circle import Circle, added, back
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.labels import Kind
from flashmetric.ops.ordered_sum import ordered_sum
from flashmetric.ops.pair_distance import pair_distance, pair_distance_backward
from flashmetric.ops.row_lse import row_lse, row_lse_backward
from flashmetric.ops.row_sum import parameter_grad, row_sum, row_sum_backward
from flashmetric.ops.threshold_sum import threshold_sum, threshold_sum_backward


class RingSum(torch.autograd.Function):
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
        """Sums and counts [2, N]; goes round once."""
        given = (*terms, scale, offset, bound, False)
        sums, counts, slopes = added(circle, x, refs, lambda *p: row_sum(*p, *given)[:3])
        ctx.circle, ctx.terms = circle, terms
        ctx.save_for_backward(x, refs, scale, offset, bound, slopes)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of rows, scale and offset; goes round once."""
        x, refs, scale, offset, bound, slopes = ctx.saved_tensors
        given = (scale, offset, bound)
        circle: Circle = ctx.circle
        of_x, of_refs = back(
            circle,
            x,
            refs,
            lambda owner, block: row_sum_backward(
                grad, *circle.pairs(x, owner, block), *ctx.terms, *given, True
            ),
        )
        by_scale = parameter_grad(grad * slopes[2:], scale)
        return of_x, of_refs, None, None, by_scale, parameter_grad(grad * slopes[:2], offset), None


class RingLse(torch.autograd.Function):
    """row_lse of x, refs, circle, the two forms, scale, offset, bound, shape, columns.

    Of columns, the rows of all ranks, it finds what the anchors of this rank contribute.
    """

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
        columns: bool,
    ) -> tuple[Tensor, ...]:
        """The results of row_lse; goes round once."""
        total = mean = counts = None
        of_blocks: list[tuple[Tensor, ...]] = [()] * circle.ring.size
        with circle.rounds(refs) as rounds:
            for owner, block in rounds:
                pairs = circle.pairs(x, owner, block)
                part = row_lse(*pairs, *forms, scale, offset, bound, shape, columns)
                of_blocks[owner] = part[3:]
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
        of_refs = tuple(torch.cat(parts, 1) for parts in zip(*of_blocks, strict=True))
        ctx.circle, ctx.forms, ctx.shape, ctx.columns = circle, forms, shape, columns
        ctx.save_for_backward(x, refs, scale, offset, bound, total, mean, *of_refs[:2])
        ctx.mark_non_differentiable(mean, counts, *of_refs[1:])
        return total, mean, counts, *of_refs

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, *others: Tensor) -> tuple[Tensor | None, ...]:
        """Gradients of rows, scale and offset; goes round once."""
        x, refs, scale, offset, bound, lse, mean, ref_lse, ref_mean = ctx.saved_tensors
        circle: Circle = ctx.circle
        grad = grad.masked_fill(lse == -torch.inf, 0)
        ref_grad = others[2].masked_fill(ref_lse == -torch.inf, 0)
        given = (*ctx.forms, scale, offset, bound, ctx.shape, True)

        def sweep(owner: int, block: Tensor) -> tuple[Tensor, Tensor]:
            of_block: tuple[Tensor | None, Tensor | None] = (None, None)
            if ctx.columns:
                here = slice(circle.begin[owner], circle.begin[owner] + len(block))
                of_block = ref_grad[:, here].contiguous(), ref_lse[:, here].contiguous()
            pairs = circle.pairs(x, owner, block)
            grads: tuple[Tensor, Tensor] = row_lse_backward(grad, lse, *of_block, *pairs, *given)
            return grads

        of_x, of_refs = back(circle, x, refs, sweep)
        by_scale, by_offset = parameter_grad(grad * mean, scale), parameter_grad(grad, offset)
        if ctx.columns:
            by_scale = by_scale + parameter_grad(ref_grad * ref_mean, scale)
            by_offset = by_offset + parameter_grad(ref_grad, offset)
        return of_x, of_refs, None, None, by_scale, by_offset, None, None, None


class RingThresholds(torch.autograd.Function):
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
        """Sums and counts [N, K]; goes round once."""
        given = (kind, formula, thresholds)
        sums, counts, slopes = added(circle, x, refs, lambda *p: threshold_sum(*p, *given))
        ctx.circle, ctx.given = circle, (kind, formula)
        ctx.save_for_backward(x, refs, thresholds, slopes)
        ctx.mark_non_differentiable(counts)
        return sums, counts

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor, _: None) -> tuple[Tensor | None, ...]:
        """Gradients of rows and thresholds; goes round once."""
        x, refs, thresholds, slopes = ctx.saved_tensors
        grad = grad.masked_fill(thresholds == -torch.inf, 0)
        circle: Circle = ctx.circle
        of_x, of_refs = back(
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


class RingDistances(torch.autograd.Function):
    """pair_distance of x, refs, circle, numbers [N, K] of rows of the whole batch, -1 for none."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, refs: Tensor, circle: Circle, index: Tensor) -> Tensor:
        """Distances [N, K]; goes round once."""
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
        """Gradients of rows; goes round once."""
        x, refs, index, values = ctx.saved_tensors
        circle: Circle = ctx.circle

        def sweep(owner: int, block: Tensor) -> tuple[Tensor, Tensor]:
            here = _of_block(circle, owner, index).T.contiguous()
            of_pairs = (x, block, None, here, values.T.contiguous(), circle.distance, True)
            grads: tuple[Tensor, Tensor] = pair_distance_backward(grad.T.contiguous(), *of_pairs)
            return grads

        of_x, of_refs = back(circle, x, refs, sweep)
        return of_x, of_refs, None, None


def _of_block(circle: Circle, owner: int, index: Tensor) -> Tensor:
    """Numbers within a block of those that are in it, else -1."""
    here = index - circle.begin[owner]
    return here.masked_fill((here < 0) | (here >= circle.ring.counts[owner]), -1)
