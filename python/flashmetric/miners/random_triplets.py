# SPDX-License-Identifier: Apache-2.0
"""Miners that draw positives or negatives at random."""

from typing import Literal

import torch
from torch import Tensor

from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.miners.base import Miner, TripletIndices, as_triplets
from flashmetric.miners.slabs import nth, random_rank, row_slabs, uniform
from flashmetric.ops.distance import Distance


def random_pairs(
    pairs: AllPairs,
    kind: Literal["positive", "negative"],
    count: int,
    generator: torch.Generator | None,
) -> Tensor:
    """Row numbers [N, count] of random pairs of a kind, with replacement; -1 for none."""
    numbers = uniform(pairs, (pairs.anchors, count), generator)
    index = torch.full(numbers.shape, -1, dtype=torch.int64, device=numbers.device)
    for slab in row_slabs(pairs, measured=False):
        mask = slab.positive if kind == "positive" else slab.negative
        there = mask.sum(1, keepdim=True)
        column = nth(mask, random_rank(numbers[slab.rows], there))
        index[slab.rows] = column.masked_fill_(there == 0, -1)
    return index


class RandomTripletMiner(Miner):
    """Random positives and negatives of each anchor, with replacement: triplets (a, p, n).

    Args:
        triplets_per_anchor: how many. Default: 1.
        generator: source of random numbers, best on the device of the embeddings. Default: that of
            the device.

    Example:
        >>> import torch
        >>> from flashmetric.miners import RandomTripletMiner
        >>> x, labels = torch.zeros(3, 2), torch.tensor([0, 0, 1])
        >>> RandomTripletMiner(2)(x, labels)
        (tensor([0, 0, 1, 1]), tensor([1, 1, 0, 0]), tensor([2, 2, 2, 2]))
    """

    def __init__(
        self, triplets_per_anchor: int = 1, *, generator: torch.Generator | None = None
    ) -> None:
        """Check and store the options."""
        super().__init__(normalize=False)
        if not isinstance(triplets_per_anchor, int) or isinstance(triplets_per_anchor, bool):
            raise TypeError(
                f"triplets_per_anchor must be an integer, got {type(triplets_per_anchor).__name__}"
            )
        if triplets_per_anchor < 1:
            raise ValueError(f"triplets_per_anchor must be at least 1, got {triplets_per_anchor}")
        self.triplets_per_anchor = triplets_per_anchor
        self.generator = generator

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        positive = random_pairs(pairs, "positive", self.triplets_per_anchor, self.generator)
        negative = random_pairs(pairs, "negative", self.triplets_per_anchor, self.generator)
        return as_triplets(positive, negative)


class HardNegativeMiner(Miner):
    """Of each anchor the nearest negative, with a random positive: triplets (a, p, n).

    Args:
        generator: source of random numbers, best on the device of the embeddings. Default: that of
            the device.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import HardNegativeMiner
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
        >>> HardNegativeMiner(normalize=False)(x, torch.tensor([0, 0, 1, 1]))
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]), tensor([2, 2, 1, 1]))
    """

    def __init__(
        self,
        *,
        generator: torch.Generator | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        self.generator = generator

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        positive = random_pairs(pairs, "positive", 1, self.generator)
        return as_triplets(positive, pairs.nearest("negative").other)


class HardPositiveMiner(HardNegativeMiner):
    """Of each anchor the farthest positive, with a random negative: triplets (a, p, n).

    Args:
        generator: source of random numbers, best on the device of the embeddings. Default: that of
            the device.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import HardPositiveMiner
        >>> x = torch.tensor([[0.0], [1.0], [3.0]])
        >>> HardPositiveMiner(normalize=False)(x, torch.tensor([0, 0, 1]))
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))
    """

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        negative = random_pairs(pairs, "negative", 1, self.generator)
        return as_triplets(pairs.farthest("positive").other, negative)
