# SPDX-License-Identifier: Apache-2.0
"""Miners of the hardest share of all pairs of a batch."""

import math

import torch
from torch import Tensor

from flashmetric.checks import check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.miners.base import Miner, PairIndices
from flashmetric.miners.slabs import row_slabs
from flashmetric.ops.distance import SLAB_ELEMENTS, Distance

# Less than any ratio that makes a difference, more than the rounding of one.
_SLACK = 1e-9


class TopRatioMiner(Miner):
    """The farthest share of all positive and the nearest of all negative pairs: (a1, p, a2, n).

    Of P positive pairs in the batch, not of each anchor, the ceil(ratio P) farthest are chosen, in
    that order; likewise of the negative pairs the nearest. Ties go to the lowest anchor, then to
    the lowest row.

    Args:
        ratio: above 0, at most 1. Default: 0.5.
        negative_ratio: that of the negative pairs. Default: the same.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True, as pytorch-metric-learning.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Memory is O(ratio N M), which is what is returned; with ``fixed_size`` as if all pairs were of
    that kind.

    Example:
        >>> import torch
        >>> from flashmetric.miners import TopRatioMiner
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
        >>> TopRatioMiner(0.25, normalize=False)(x, torch.tensor([0, 0, 1, 1]))
        (tensor([0]), tensor([1]), tensor([1, 2]), tensor([2, 1]))

    Source:
        Y. Yuan, K. Yang, C. Zhang: Hard-Aware Deeply Cascaded Embedding, ICCV 2017.
    """

    def __init__(
        self,
        ratio: float = 0.5,
        negative_ratio: float | None = None,
        *,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        negative_ratio = ratio if negative_ratio is None else negative_ratio
        for name, value in (("ratio", ratio), ("negative_ratio", negative_ratio)):
            check_number(name, value)
            if not 0 < value <= 1:
                raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
        self.ratio = float(ratio)
        self.negative_ratio = float(negative_ratio)

    def mine(self, pairs: AllPairs, fixed_size: bool) -> PairIndices:
        """See :meth:`Miner.mine`."""
        return _hardest_pairs(pairs, self.ratio, self.negative_ratio, fixed_size)


class FrackingMiner(Miner):
    """The hardest 1/r of all positive and of all negative pairs: pairs (a1, p, a2, n).

    Args:
        positive_factor: r of the positive pairs, at least 1. Default: 8.
        negative_factor: r of the negative pairs. Default: 8.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`. Default:
            ``"euclidean"``.
        normalize: scale rows to unit length first. Default: False, as the authors.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import FrackingMiner
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
        >>> FrackingMiner(4, 8)(x, torch.tensor([0, 0, 1, 1]))
        (tensor([0]), tensor([1]), tensor([1]), tensor([2]))

    Source:
        E. Simo-Serra et al.: Fracking Deep Convolutional Image Descriptors, 2014, arXiv:1412.6537.
    """

    def __init__(
        self,
        positive_factor: float = 8,
        negative_factor: float = 8,
        *,
        distance: Distance | Metric = "euclidean",
        normalize: bool = False,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        factors = (("positive_factor", positive_factor), ("negative_factor", negative_factor))
        for name, value in factors:
            check_number(name, value)
            if value < 1:
                raise ValueError(f"{name} must be at least 1, got {value}")
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        self.positive_factor = float(positive_factor)
        self.negative_factor = float(negative_factor)

    def mine(self, pairs: AllPairs, fixed_size: bool) -> PairIndices:
        """See :meth:`Miner.mine`."""
        return _hardest_pairs(pairs, 1 / self.positive_factor, 1 / self.negative_factor, fixed_size)


def _hardest_pairs(
    pairs: AllPairs, ratio: float, negative_ratio: float, fixed_size: bool
) -> PairIndices:
    a1, p, positive_valid = _hardest(pairs, True, ratio, fixed_size)
    a2, n, negative_valid = _hardest(pairs, False, negative_ratio, fixed_size)
    return PairIndices(a1, p, a2, n, positive_valid, negative_valid)


def _hardest(
    pairs: AllPairs, positive: bool, ratio: float, fixed_size: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Anchors and references of the hardest pairs of a kind, and which of them are valid."""
    count = pairs.counts()[0 if positive else 1].sum()
    # A ratio such as 0.28 is a little more than that as a binary number.
    wanted = (count.double() * (ratio - _SLACK)).ceil().long()
    width = max(1, pairs.references)
    capacity = math.ceil((ratio - _SLACK) * pairs.anchors * width) if fixed_size else int(wanted)

    device = pairs.embeddings.device
    key = torch.empty(0, dtype=torch.float64, device=device)
    index = torch.empty(0, dtype=torch.int64, device=device)
    keys, indices = [key], [index]
    # Merged no sooner than as many have come as are kept: so the sorting stays O(N M log).
    pending = 0
    for slab in row_slabs(pairs):
        mask, d = (slab.positive, -slab.distance) if positive else (slab.negative, slab.distance)
        d = d.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        keys.append(d.masked_fill(~mask, torch.inf).flatten())
        begin = slab.rows.start * width
        indices.append(torch.arange(begin, begin + mask.numel(), device=device))
        pending += mask.numel()
        if pending >= max(capacity, SLAB_ELEMENTS):
            key, index = _merged(keys, indices, capacity)
            keys, indices, pending = [key], [index], 0
    _, index = _merged(keys, indices, capacity)
    valid = torch.arange(len(index), device=device) < wanted
    anchors = index.div(width, rounding_mode="floor")
    return anchors, (index % width).masked_fill(~valid, -1), valid


def _merged(keys: list[Tensor], indices: list[Tensor], capacity: int) -> tuple[Tensor, Tensor]:
    key, order = torch.cat(keys).sort(stable=True)
    return key[:capacity], torch.cat(indices)[order[:capacity]]
