# SPDX-License-Identifier: Apache-2.0
"""How losses that add up a value per pair turn their sums into one number."""

from typing import Literal, get_args

from torch import Tensor

from flashmetric.functional.pairs import Pairs, Sums, Term
from flashmetric.functional.totals import totals_of
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.ordered_sum import ordered_sum

PairReduction = Literal["mean", "mean_separate", "mean_nonzero", "sum", "none"]
PAIR_REDUCTIONS: tuple[str, ...] = get_args(PairReduction)


def reduce_pairs(
    pairs: Pairs,
    positive: Term,
    negative: Term,
    reduction: PairReduction,
    factors: tuple[float, float] = (1.0, 1.0),
) -> Tensor:
    """Sums or means of the terms of all pairs, those of each kind times a factor.

    ``"mean"`` is taken over all pairs jointly, ``"mean_separate"`` over the positives plus over the
    negatives, ``"mean_nonzero"`` likewise over those above 0; ``"sum"`` over all pairs; ``"none"``
    is the sum over the pairs of each anchor.
    """
    if reduction == "none":
        rows = pairs.sum(positive, negative)
        return factors[0] * rows.positive + factors[1] * rows.negative
    return reduce_totals(pairs.total(positive, negative), reduction, factors)


def reduce_totals(
    total: Sums, reduction: PairReduction, factors: tuple[float, float] = (1.0, 1.0)
) -> Tensor:
    """The same from sums over all pairs."""
    positive, negative = factors[0] * total.positive, factors[1] * total.negative
    if reduction == "sum":
        return positive + negative
    if reduction == "mean":
        return (positive + negative) / (total.positives + total.negatives).clamp(min=1)
    positives, negatives = total.positives, total.negatives
    if reduction == "mean_nonzero":
        positives, negatives = total.active_positives, total.active_negatives
    return positive / positives.clamp(min=1) + negative / negatives.clamp(min=1)


def totals(rows: Sums) -> Sums:
    """Sums over all pairs from sums per anchor."""
    positive, negative, *counts = rows
    sums = Sums(ordered_sum(positive), ordered_sum(negative), *(count.sum() for count in counts))
    return totals_of(sums)


def anchors_with_pairs(rows: Sums) -> Tensor:
    """Which anchors are in any pair, bool [N], from sums per anchor."""
    return (rows.positives + rows.negatives) > 0


def as_parameter(value: float | Tensor, embeddings: Tensor) -> float | Tensor:
    """A number, or a learned one in the dtype that the sums of these rows have."""
    if isinstance(value, Tensor):
        return value.to(accumulate_dtype(embeddings.dtype))
    return float(value)
