# SPDX-License-Identifier: Apache-2.0
"""A miner that combines easy, semi-hard and hard positives and negatives."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import PairLists, largest
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, PairIndices, all_positives, as_pairs, limit_of
from flashmetric.ops.distance import Distance, accumulate_dtype
from flashmetric.ops.labels import Kind

Strategy = Literal["hard", "semihard", "easy", "all"]
Range = tuple[float, float] | None


class BatchEasyHardMiner(Miner):
    """One positive and one negative per anchor by given strategies: pairs (a1, p, a2, n).

    Args:
        pos_strategy: ``"easy"`` (default) the nearest, ``"hard"`` the farthest, ``"semihard"`` the
            farthest that is nearer than the negative, ``"all"``.
        neg_strategy: ``"hard"`` the nearest, ``"easy"`` the farthest, ``"semihard"`` (default) the
            nearest that is farther than the positive, ``"all"``. "semihard" goes only with "hard"
            or "easy" on the other side.
        allowed_pos_range: smallest and largest distance of positives; not for ``"all"``. Default:
            any.
        allowed_neg_range: likewise for negatives.
        max_positives: how many positives an anchor has at most, for ``"all"``; the farthest are
            used. Default: they are counted, which ``fixed_size`` does not allow.
        max_negatives: likewise for negatives, of which the nearest are used.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True, as pytorch-metric-learning.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Anchors for which either strategy finds nothing are left out, unless the other is ``"all"``.

    Example:
        >>> import torch
        >>> from flashmetric.miners import BatchEasyHardMiner
        >>> x = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
        >>> BatchEasyHardMiner(normalize=False)(x, torch.tensor([0, 0, 1, 2]))
        (tensor([0]), tensor([1]), tensor([0]), tensor([3]))

    Source:
        H. Xuan, A. Stylianou, R. Pless: Improved Embeddings with Easy Positive Triplet Mining,
        WACV 2020.
    """

    def __init__(
        self,
        pos_strategy: Strategy = "easy",
        neg_strategy: Strategy = "semihard",
        allowed_pos_range: Range = None,
        allowed_neg_range: Range = None,
        *,
        max_positives: int | None = None,
        max_negatives: int | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        check_choice("pos_strategy", pos_strategy, get_args(Strategy))
        check_choice("neg_strategy", neg_strategy, get_args(Strategy))
        both = {pos_strategy, neg_strategy}
        if "semihard" in both and both <= {"semihard", "all"}:
            raise ValueError(
                "neg_strategy must be 'hard' or 'easy' where the other is 'semihard', or the "
                f"other way round; got {neg_strategy!r} with {pos_strategy!r}"
            )
        for name, limits in (
            ("allowed_pos_range", allowed_pos_range),
            ("allowed_neg_range", allowed_neg_range),
        ):
            if limits is not None:
                for limit in limits:
                    check_number(name, limit)
        check_max_positives(max_positives)
        check_max_positives(max_negatives)
        self.pos_strategy: Strategy = pos_strategy
        self.neg_strategy: Strategy = neg_strategy
        self.allowed_pos_range = allowed_pos_range
        self.allowed_neg_range = allowed_neg_range
        self.max_positives = max_positives
        self.max_negatives = max_negatives

    def mine(self, pairs: AllPairs, fixed_size: bool) -> PairIndices:
        """See :meth:`Miner.mine`."""
        if "all" in (self.pos_strategy, self.neg_strategy):
            return as_pairs(self._positives(pairs, fixed_size), self._negatives(pairs, fixed_size))
        limits = self.allowed_pos_range, self.allowed_neg_range
        if self.pos_strategy == "semihard":
            negative = _extreme(pairs, "negative", self.neg_strategy == "easy", limits[1])
            positive = _extreme(pairs, "positive", True, limits[0], negative.distance)
        else:
            positive = _extreme(pairs, "positive", self.pos_strategy == "hard", limits[0])
            beyond = positive.distance if self.neg_strategy == "semihard" else None
            farthest = self.neg_strategy == "easy"
            negative = _extreme(pairs, "negative", farthest, limits[1], beyond)
        complete = positive.valid & negative.valid
        return as_pairs(
            positive.other.masked_fill(~complete, -1), negative.other.masked_fill(~complete, -1)
        )

    def _positives(self, pairs: AllPairs, fixed_size: bool) -> Tensor:
        if self.pos_strategy == "all":
            return all_positives(pairs, self.max_positives, fixed_size).other
        farthest = self.pos_strategy == "hard"
        return _valid_only(_extreme(pairs, "positive", farthest, self.allowed_pos_range))

    def _negatives(self, pairs: AllPairs, fixed_size: bool) -> Tensor:
        if self.neg_strategy != "all":
            farthest = self.neg_strategy == "easy"
            return _valid_only(_extreme(pairs, "negative", farthest, self.allowed_neg_range))
        limit = limit_of("max_negatives", self.max_negatives, fixed_size)
        if limit is None:
            limit = largest(pairs.counts()[1])
        return pairs.top("negative", limit).other


def _valid_only(found: PairLists) -> Tensor:
    return found.other.masked_fill(~found.valid, -1)


def _extreme(
    pairs: AllPairs, kind: Kind, farthest: bool, limits: Range, bound: Tensor | None = None
) -> PairLists:
    """The farthest (nearest) pair of each anchor within limits, and strictly within the bound."""
    dtype = accumulate_dtype(pairs.embeddings.dtype)
    # One number beyond the limit, which itself is allowed.
    edge = pairs.embeddings.new_full((), torch.inf if farthest else -torch.inf, dtype=dtype)
    if limits is not None:
        edge = torch.full_like(edge, limits[1] if farthest else limits[0]).nextafter(edge)
    start = edge.expand(pairs.anchors, 1)
    if bound is not None:
        start = torch.minimum(start, bound) if farthest else torch.maximum(start, bound)
    start = start.contiguous()
    found = pairs.farthest(kind, start) if farthest else pairs.nearest(kind, start)
    if limits is None:
        return found
    d = found.distance
    # NaN is outside of nothing.
    inside = ~(d < limits[0]) if farthest else ~(d > limits[1])
    return found._replace(valid=found.valid & inside)
