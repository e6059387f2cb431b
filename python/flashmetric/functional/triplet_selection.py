# SPDX-License-Identifier: Apache-2.0
"""Which triplets of a batch a loss looks at: one or few per anchor, found by distance."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import pair_distance
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pairs import PairLists, Pairs
from flashmetric.ops.distance import accumulate_dtype, poison, squared_norms

Selection = Literal[
    "batch_hard", "semi_hard", "semi_hard_anchor", "easy_positive", "easy_positive_semi_hard"
]
SELECTIONS: tuple[str, ...] = get_args(Selection)


def select_pairs(
    pairs: Pairs, mining: str, max_positives: int | None = None
) -> tuple[PairLists, PairLists]:
    """Positives and negatives [N, K] that make up the triplets of each anchor."""
    if mining == "batch_hard":
        return pairs.farthest("positive"), pairs.nearest("negative")
    if mining == "semi_hard":
        positive = pairs.positives(max_positives)
        return positive, semi_hard_negatives(pairs, positive)
    positive = pairs.nearest("positive")
    if mining == "easy_positive":
        return positive, pairs.nearest("negative")
    if mining == "semi_hard_anchor":
        positive = pairs.farthest("positive")
    return positive, _only_with(positive, _nearest_farther(pairs, positive))


def semi_hard_negatives(pairs: Pairs, positive: PairLists) -> PairLists:
    """For each positive the nearest negative farther than it, otherwise the farthest negative."""
    beyond = _nearest_farther(pairs, positive)
    farthest = pairs.farthest("negative")
    return _only_with(
        positive,
        PairLists(
            torch.where(beyond.valid, beyond.other, farthest.other),
            torch.where(beyond.valid, beyond.distance, farthest.distance),
            beyond.valid | farthest.valid,
        ),
    )


def _nearest_farther(pairs: Pairs, positive: PairLists) -> PairLists:
    """For each positive the nearest negative that is farther by more than rounding.

    A copy of the positive among the negatives, such as one text under two labels, is as far, but
    what the sweep finds for it may be some units of the last place above what is measured here.
    """
    limit = positive.distance.detach()
    return pairs.nearest("negative", limit + 4 * torch.finfo(limit.dtype).eps * limit.abs())


def _only_with(positive: PairLists, negative: PairLists) -> PairLists:
    """The negatives of those positives that exist."""
    valid = positive.valid & negative.valid
    return PairLists(
        negative.other.masked_fill(~valid, -1), negative.distance.masked_fill(~valid, 0), valid
    )


def triplet_distances(
    pairs: Pairs,
    mining: str,
    *,
    swap: bool = False,
    keep: bool = False,
    max_positives: int | None = None,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distances d(a, p) and d(a, n) of the triplets, and which of them count (None: all).

    Listed pairs are the triplets themselves, [T]; otherwise ``mining`` selects them, [N, K].

    Args:
        pairs: the pairs to select from.
        mining: one of :data:`SELECTIONS`.
        swap: use the distance of positive and negative where that is smaller.
        keep: count anchors without a positive, which then has distance 0, and those without a
            negative, which then is as far as the positive; for ``"semi_hard"`` it is the negative
            that has distance 0, and each listed positive counts.
        max_positives: list no more positives per anchor than these farthest ones.
    """
    if isinstance(pairs, ListedPairs):
        _, p, n, d_ap, d_an, valid = pairs.triplets()
        return d_ap, _swapped(pairs, p, n, d_an) if swap else d_an, valid
    positive, negative = select_pairs(pairs, mining, max_positives)
    valid = positive.valid & negative.valid
    d_ap, d_an = positive.distance, negative.distance
    if swap:
        p, n = (side.other.masked_fill(~valid, -1) for side in (positive, negative))
        d_an = torch.where(valid, _swapped(pairs, p, n, d_an), d_an)
    if not keep:
        return d_ap, d_an, valid
    if mining == "semi_hard":
        return d_ap, d_an, positive.valid
    return d_ap, torch.where(negative.valid, d_an, d_ap), None


def _swapped(pairs: Pairs, p: Tensor, n: Tensor, d_an: Tensor) -> Tensor:
    if pairs.anchor_scale is not None:
        raise ValueError("swap must be False with a distance that is not symmetric")
    refs = pairs.embeddings if pairs.ref_emb is None else pairs.ref_emb
    d_pn = pair_distance(refs, None, p, n, pairs.distance)
    return torch.where(d_pn < d_an, d_pn, d_an)


def spoil(pairs: Pairs, loss: Tensor) -> Tensor:
    """The loss, or NaN with NaN gradients if some row is not finite.

    Mining by comparisons skips rows that compare as neither nearer nor farther, and would so hide
    the fault. Listed pairs show it by themselves.
    """
    if isinstance(pairs, ListedPairs):
        return loss
    x = pairs.embeddings
    refs = x if pairs.ref_emb is None else pairs.ref_emb
    # Not the bool itself: the compiler does not compare a size with one.
    itself = 1 if pairs.ref_emb is None else 0
    if x.shape[0] <= itself or refs.shape[0] == 0:
        return loss
    norms = [squared_norms(rows.detach().to(accumulate_dtype(x.dtype))) for rows in (x, refs)]
    return loss * (1 + poison(*norms))
