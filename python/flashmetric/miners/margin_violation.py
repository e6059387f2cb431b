# SPDX-License-Identifier: Apache-2.0
"""Miners of triplets whose negative is about as far as the positive."""

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import largest
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, TripletIndices, as_triplets, limit_of
from flashmetric.miners.slabs import random_rank, row_slabs, uniform
from flashmetric.ops.distance import Distance

Violation = Literal["violating", "absolute", "all", "hard", "semihard", "easy"]
_TYPES = ("all", "hard", "semihard", "easy")


class _Candidates(NamedTuple):
    """Negatives that make up a triplet with each positive of a few anchors."""

    rows: slice
    positives: Tensor
    """Row numbers [rows, K], farthest first; -1 for none."""
    order: Tensor
    """Negatives of each anchor, nearest first, [rows, M]."""
    begin: Tensor
    """First candidate in that order, [rows, K]."""
    sizes: Tensor
    """How many follow, [rows, K]; 0 without a positive."""


class MarginViolationMiner(Miner):
    """For every positive pair a random negative that violates the margin: triplets (a, p, n).

    Args:
        margin: in units of the distance. Default: 0.2.
        violation: ``"violating"`` (default), d(a, n) - d(a, p) < margin; ``"absolute"``, these two
            differ by no more than the margin; or a type of :class:`TripletMarginMiner`.
        max_positives: how many positives an anchor has at most; the farthest are used. Default:
            they are counted, which ``fixed_size`` does not allow.
        generator: source of random numbers, best on the device of the embeddings. Default: that of
            the device.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import MarginViolationMiner
        >>> x = torch.tensor([[0.0], [2.0], [2.5], [9.0]])
        >>> MarginViolationMiner(1.0, normalize=False)(x, torch.tensor([0, 0, 1, 2]))
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))

    Source:
        The face recognition codes facenet (VGG Face selection) and OpenFace: preset ``"facenet"``.
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        violation: Violation = "violating",
        max_positives: int | None = None,
        generator: torch.Generator | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        check_number("margin", margin)
        check_choice("violation", violation, get_args(Violation))
        check_max_positives(max_positives)
        self.margin = float(margin)
        self.violation: Violation = violation
        self.max_positives = max_positives
        self.generator = generator

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "MarginViolationMiner":
        """The miner as another code defines it.

        Args:
            name: ``"facenet"`` and ``"openface"``: squared distances of unit rows, margin 0.2.
            **overrides: options to set differently.

        Raises:
            ValueError: the preset is unknown.
        """
        check_choice("name", name, ("facenet", "openface"))
        return cls(**{"margin": 0.2, "distance": "sqeuclidean", **overrides})

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        limit = _limit(pairs, limit_of("max_positives", self.max_positives, fixed_size))
        numbers = uniform(pairs, (pairs.anchors, limit), self.generator)
        positive = torch.full(numbers.shape, -1, dtype=torch.int64, device=numbers.device)
        negative = positive.clone()
        for part in _candidates(pairs, self.violation, self.margin, limit):
            place = part.begin + random_rank(numbers[part.rows], part.sizes)
            found = part.order.gather(1, place.clamp(max=part.order.shape[1] - 1))
            positive[part.rows] = part.positives
            negative[part.rows] = found.masked_fill(part.sizes == 0, -1)
        return as_triplets(positive, negative)


class TripletMarginMiner(Miner):
    """All triplets of a type: (a, p, n), as many as there are.

    Args:
        margin: in units of the distance. Default: 0.2.
        type_of_triplets: by v = d(a, n) - d(a, p): ``"all"`` (default) that violate the margin,
            v <= margin; of these ``"hard"``, v <= 0, and ``"semihard"``, v > 0; ``"easy"``, the
            others, v > margin.
        max_positives: only this many of the farthest positives of each anchor. Default: all.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True, as pytorch-metric-learning.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    The result is as long as the number of triplets; ``TripletMarginLoss(mining="batch_all")`` sums
    over the same without listing them. ``fixed_size`` is not possible: the size would be that of
    all triplets there could be.

    Example:
        >>> import torch
        >>> from flashmetric.miners import TripletMarginMiner
        >>> x = torch.tensor([[0.0], [2.0], [2.5], [9.0]])
        >>> TripletMarginMiner(1.0, normalize=False)(x, torch.tensor([0, 0, 1, 2]))
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))
    """

    def __init__(
        self,
        margin: float = 0.2,
        type_of_triplets: Literal["all", "hard", "semihard", "easy"] = "all",
        *,
        max_positives: int | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        check_number("margin", margin)
        check_choice("type_of_triplets", type_of_triplets, _TYPES)
        check_max_positives(max_positives)
        self.margin = float(margin)
        self.type_of_triplets = type_of_triplets
        self.max_positives = max_positives

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        if fixed_size:
            raise ValueError("fixed_size must be False: there may be as many as N^3 triplets")
        limit = _limit(pairs, self.max_positives)
        nothing = torch.empty(0, dtype=torch.int64, device=pairs.embeddings.device)
        found = [[nothing], [nothing], [nothing]]
        for part in _candidates(pairs, self.type_of_triplets, self.margin, limit):
            count = part.sizes.flatten()
            of = torch.arange(len(count), device=count.device).repeat_interleave(count)
            rank = torch.arange(len(of), device=of.device) - (count.cumsum(0) - count)[of]
            row = of // limit
            found[0].append(row + part.rows.start)
            found[1].append(part.positives.flatten()[of])
            found[2].append(part.order[row, part.begin.flatten()[of] + rank])
        a, p, n = (torch.cat(column) for column in found)
        return TripletIndices(a, p, n, torch.ones_like(a, dtype=torch.bool))


def _limit(pairs: AllPairs, max_positives: int | None) -> int:
    return largest(pairs.counts()[0]) if max_positives is None else max_positives


def _candidates(
    pairs: AllPairs, violation: str, margin: float, limit: int
) -> Iterator[_Candidates]:
    for slab in row_slabs(pairs):
        inf = torch.inf
        # A distance that is NaN is the largest of positives and the smallest of negatives.
        most = torch.finfo(slab.distance.dtype).max
        distance = slab.distance.nan_to_num(nan=most, posinf=inf)
        far = (-distance).masked_fill(~slab.positive, inf).sort(dim=1, stable=True)
        missing = limit - far.values.shape[1]
        d_ap = torch.nn.functional.pad(-far.values[:, :limit], (0, max(0, missing)), value=-inf)
        positives = torch.nn.functional.pad(far.indices[:, :limit], (0, max(0, missing)), value=-1)
        positives = positives.masked_fill(d_ap == -inf, -1)
        distance = slab.distance.nan_to_num(nan=-most, posinf=inf)
        near = distance.masked_fill(~slab.negative, inf).sort(dim=1, stable=True)
        there = slab.negative.sum(1, keepdim=True)
        begin, end = _range(near.values, d_ap.contiguous(), violation, margin, there)
        # It violates whatever is asked for.
        begin = begin.masked_fill((d_ap == most) | (near.values[:, :1] == -most), 0)
        end = torch.where(d_ap == most, there, end)
        sizes = (end - begin).clamp(min=0).masked_fill(positives < 0, 0)
        yield _Candidates(slab.rows, positives, near.indices, begin, sizes)


def _range(
    near: Tensor, d_ap: Tensor, violation: str, margin: float, there: Tensor
) -> tuple[Tensor, Tensor]:
    """First and last candidate for each positive among the sorted negatives."""
    start, edge = torch.zeros_like(d_ap, dtype=torch.int64), d_ap + margin
    if violation == "violating":
        return start, torch.searchsorted(near, edge)
    if violation == "absolute":
        return torch.searchsorted(near, d_ap - margin), torch.searchsorted(near, edge, right=True)
    if violation == "easy":
        return torch.searchsorted(near, edge, right=True), there.expand(d_ap.shape)
    if violation == "hard":
        return start, torch.searchsorted(near, torch.minimum(d_ap, edge), right=True)
    if violation == "semihard":
        start = torch.searchsorted(near, d_ap, right=True)
    return start, torch.searchsorted(near, edge, right=True)
