# SPDX-License-Identifier: Apache-2.0
"""Sums over all triplets of a batch, without listing them: one threshold per positive.

Every positive p of an anchor turns the sum over its triplets into a sum over negatives of
f(t_p - d(a, n)) with the threshold t_p = d(a, p) + margin. For a hinge, all thresholds of an anchor
are served by one sweep over its negatives, and the numbers of active triplets are exact integers.
"""

from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import Pairs, Term
from flashmetric.functional.totals import count_of, total_of
from flashmetric.ops.labels import IGNORED
from flashmetric.ops.terms import Formula

Types = Literal["all", "hard", "semihard", "easy"]
TYPES: tuple[str, ...] = get_args(Types)


class TripletSums(NamedTuple):
    """Sums over the triplets of each anchor, [N]."""

    loss: Tensor
    """float64."""
    triplets: Tensor
    """How many there are of the wanted type, int64."""
    active: Tensor
    """How many of these have a loss above 0, int64."""


def _positive_distances(pairs: Pairs, limit: int | None) -> Tensor:
    """Distances of the positives of each anchor, ascending, [N, K]; -inf in front for none."""
    positive = pairs.positives(limit)
    # Sorted once more: the lists are ordered by what the kernel measured, not by these distances.
    return positive.distance.masked_fill(~positive.valid, -torch.inf).sort(1).values


def batch_all_sums(
    pairs: Pairs,
    margin: float,
    formula: Formula,
    type_of_triplets: str = "all",
    max_positives: int | None = None,
) -> TripletSums:
    """Sums of f(d(a, p) - d(a, n) + margin) over the triplets of each anchor.

    Args:
        pairs: the pairs that triplets consist of.
        margin: added to the difference.
        formula: f; ``"linear"`` or any formula of :meth:`Pairs.threshold_sum`.
        type_of_triplets: ``"all"``; ``"hard"``, the negative is no farther than the positive;
            ``"semihard"``, farther, but by no more than the margin; ``"easy"``, farther than that.
            All but the first need ``"hinge"`` or ``"linear"``.
        max_positives: only this many of the farthest positives of each anchor.
    """
    positives, negatives = pairs.counts()
    positive = _positive_distances(pairs, max_positives)
    triplets = (positive > -torch.inf).sum(1) * negatives
    if formula not in ("hinge", "linear"):
        sums, _ = pairs.threshold_sum("negative", formula, positive + margin)
        return TripletSums(sums.sum(1), triplets, triplets)
    if formula == "linear" and type_of_triplets == "all":
        return TripletSums(_linear(pairs, positive, negatives, margin), triplets, triplets)
    if formula == "hinge" and type_of_triplets == "easy":
        violating = _count_up_to(pairs, positive + margin)
        # Attached to the graph, with zero gradient.
        nothing = positive.masked_fill(positive == -torch.inf, 0).double().sum(1) * 0
        return TripletSums(nothing, triplets - violating, torch.zeros_like(triplets))

    sums, counts = pairs.threshold_sum("negative", "hinge", positive + margin)
    loss, active = sums.sum(1), counts.sum(1)
    if type_of_triplets == "all":
        return TripletSums(loss, triplets, active)
    if type_of_triplets == "easy":
        linear = _linear(pairs, positive, negatives, margin)
        easy = triplets - _count_up_to(pairs, positive + margin)
        return TripletSums(linear - loss, easy, easy)
    violating = _count_up_to(pairs, positive + margin)
    # The hinge at the hard triplets' own threshold, lifted to their loss.
    below = min(margin, 0.0)
    hard_sums, hard_counts = pairs.threshold_sum("negative", "hinge", _next(positive + below))
    hard = hard_counts.sum(1)
    hard_loss = hard_sums.sum(1) + (margin - below) * hard.double()
    hard_active = hard if margin > 0 else active
    if type_of_triplets == "hard":
        return TripletSums(hard_loss, hard, hard_active)
    return TripletSums(loss - hard_loss, violating - hard, active - hard_active)


def batch_all_sums_by_class(
    pairs: AllPairs, margins: Tensor, formula: Formula, max_positives: int | None = None
) -> TripletSums:
    """As :func:`batch_all_sums`, of all triplets, with a margin per class of anchor and negative.

    The negatives of one class shift all thresholds of an anchor alike: one sweep over each class.

    Args:
        pairs: the pairs that triplets consist of, with labels 0 ... C - 1.
        margins: of the classes of anchor and negative, [C, C].
        formula: f, as for :func:`batch_all_sums`.
        max_positives: only this many of the farthest positives of each anchor.
    """
    positive = _positive_distances(pairs, max_positives)
    count = (positive > -torch.inf).sum(1)
    own = pairs.labels.clamp(min=0)
    refs = pairs.labels if pairs.ref_labels is None else pairs.ref_labels
    if margins.device != positive.device:
        raise ValueError(
            f"margin must be on {positive.device}, as embeddings are; got {margins.device}"
        )
    # Attached to the graph where there are no negatives, and the margins where no class is.
    loss = positive.masked_fill(positive == -torch.inf, 0).double().sum(1) * 0
    loss = loss + margins.flatten()[:0].sum()
    triplets, active = torch.zeros_like(count), torch.zeros_like(count)
    for label in _present(refs, pairs.labels, margins):
        part = pairs.of_references((refs == label).nonzero()[:, 0])
        margin = margins[own, label].to(positive.dtype)
        negatives = part.counts()[1]
        triplets = triplets + count * negatives
        if formula == "linear":
            loss = loss + _linear(part, positive, negatives, margin)
            continue
        thresholds = positive + margin.unsqueeze(1)
        sums, counts = part.threshold_sum("negative", formula, thresholds)
        loss, active = loss + sums.sum(1), active + counts.sum(1)
    return TripletSums(loss, triplets, active if formula == "hinge" else triplets)


def _present(refs: Tensor, labels: Tensor, margins: Tensor) -> list[int]:
    """Classes that a reference has; waits for the device."""
    every = torch.cat([refs, labels]).unique()
    every = every[every != IGNORED]
    if every.numel() and (every[0] < 0 or every[-1] >= len(margins)):
        wrong = int(every[0] if every[0] < 0 else every[-1])
        raise ValueError(
            f"labels must be 0 ... {len(margins) - 1} for a margin of shape "
            f"{tuple(margins.shape)}; got {wrong}"
        )
    present: list[int] = refs[refs != IGNORED].unique().tolist()
    return present


def _linear(pairs: Pairs, positive: Tensor, negatives: Tensor, margin: float | Tensor) -> Tensor:
    known = positive > -torch.inf
    count = known.sum(1)
    total = positive.masked_fill(~known, 0).double().sum(1) + margin * count.double()
    return total * negatives - count * pairs.sum(negative=Term("linear")).negative.double()


def _count_up_to(pairs: Pairs, thresholds: Tensor) -> Tensor:
    """How many negatives are no farther than the thresholds of each row."""
    return pairs.threshold_sum("negative", "hinge", _next(thresholds.detach()))[1].sum(1)


def _next(thresholds: Tensor) -> Tensor:
    """Thresholds that count what lies exactly at the given ones too; differentiable."""
    value = thresholds.detach()
    after = value.nextafter(torch.full_like(value, torch.inf))
    # The number after 0 would be subnormal, and 0 to hardware that flushes those.
    tiny = torch.finfo(value.dtype).tiny
    step = torch.where(value.abs() < tiny, tiny, after) - value
    step = step.masked_fill(value == -torch.inf, 0)
    return thresholds + step


def reduce_sums(sums: TripletSums, reduction: str, dtype: torch.dtype) -> Tensor:
    """Sums per anchor to the loss; 0 where nothing is left to divide by."""
    if reduction == "none":
        return sums.loss.to(dtype)
    total = total_of(sums.loss)
    if reduction != "sum":
        count = sums.active if reduction == "mean_nonzero" else sums.triplets
        total = total / count_of(count).clamp(min=1)
    return total.to(dtype)
