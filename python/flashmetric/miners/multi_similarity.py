# SPDX-License-Identifier: Apache-2.0
"""The miner of the multi-similarity loss."""

import torch
from torch import Tensor

from flashmetric.checks import check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import largest
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, PairIndices, as_pairs, limit_of
from flashmetric.miners.slabs import RowSlab, listed
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import Kind

# Pairs up to which one look at all of them is cheaper than several sweeps that keep a few.
_FEW_PAIRS = 1 << 17
# Share of an anchor's pairs from which on its list is no shorter work than its row.
_LONG_LIST = 1 / 16


class MultiSimilarityMiner(Miner):
    r"""Positives and negatives that are not yet apart: pairs (a1, p, a2, n).

    Positives farther than the nearest negative, and negatives nearer than the farthest positive, up
    to an epsilon:

    .. math::
        \{p : d(a, p) + \epsilon > \min_n d(a, n)\}, \qquad
        \{n : d(a, n) - \epsilon < \max_p d(a, p)\}

    Anchors without positives or without negatives have no pairs.

    Args:
        epsilon: in units of the distance. Default: 0.1.
        max_positives: how many positives of an anchor are returned at most, the farthest. Default:
            as many as are found, which ``fixed_size`` does not allow.
        max_negatives: likewise for negatives, the nearest.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`. Default:
            ``"cosine"``, as the paper and pytorch-metric-learning.
        normalize: scale rows to unit length first, which "cosine" does anyway. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import MultiSimilarityMiner
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]])
        >>> MultiSimilarityMiner()(x, torch.tensor([0, 0, 1]))
        (tensor([0, 1]), tensor([1, 0]), tensor([0, 1]), tensor([2, 2]))

    Source:
        X. Wang et al.: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning,
        CVPR 2019.
    """

    def __init__(
        self,
        epsilon: float = 0.1,
        *,
        max_positives: int | None = None,
        max_negatives: int | None = None,
        distance: Distance | Metric = "cosine",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        check_number("epsilon", epsilon)
        check_max_positives(max_positives)
        check_max_positives(max_negatives)
        self.epsilon = float(epsilon)
        self.max_positives = max_positives
        self.max_negatives = max_negatives

    def mine(self, pairs: AllPairs, fixed_size: bool) -> PairIndices:
        """See :meth:`Miner.mine`."""
        unlimited = self.max_positives is None and self.max_negatives is None and not fixed_size
        if unlimited and pairs.anchors * pairs.references <= _FEW_PAIRS:
            return self._from_slabs(pairs)
        hardest = pairs.farthest("positive"), pairs.nearest("negative")
        complete = (hardest[0].valid & hardest[1].valid).squeeze(1)
        # Bounds that nothing is beyond keep anchors without the other kind out.
        low = (hardest[1].distance.squeeze(1) - self.epsilon).masked_fill(~complete, torch.inf)
        high = (hardest[0].distance.squeeze(1) + self.epsilon).masked_fill(~complete, -torch.inf)
        p = limit_of("max_positives", self.max_positives, fixed_size)
        n = limit_of("max_negatives", self.max_negatives, fixed_size)
        if p is None or n is None:
            kept = pairs.sum(bounds=(low, high))
            p = largest(kept.positives) if p is None else p
            n = largest(kept.negatives) if n is None else n
            if unlimited and max(p, n) > _LONG_LIST * pairs.references:
                return self._from_slabs(pairs)
        return as_pairs(_beyond(pairs, "positive", p, low), _beyond(pairs, "negative", n, high))

    def _from_slabs(self, pairs: AllPairs) -> PairIndices:
        """All pairs that are found, from explicit distances."""
        a1, p, a2, n = listed(pairs, self._chosen)
        valid = (torch.ones_like(others, dtype=torch.bool) for others in (p, n))
        return PairIndices(a1, p, a2, n, *valid)

    def _chosen(self, slab: RowSlab) -> tuple[Tensor, Tensor]:
        d = slab.distance
        low = d.masked_fill(~slab.negative, torch.inf).amin(1, keepdim=True) - self.epsilon
        high = d.masked_fill(~slab.positive, -torch.inf).amax(1, keepdim=True) + self.epsilon
        # NaN, of a pair or as the bound, keeps nothing out.
        return slab.positive & ~(d <= low), slab.negative & ~(d >= high)


def _beyond(pairs: AllPairs, kind: Kind, count: int, bound: Tensor) -> Tensor:
    """The first pairs of a kind beyond a bound [N]: those farther (positive), or nearer."""
    found = pairs.top(kind, count, farthest=kind == "positive")
    bound = bound.unsqueeze(1)
    d = found.distance
    # NaN, of a pair or as the bound, keeps nothing out.
    inside = ~(d <= bound) if kind == "positive" else ~(d >= bound)
    return found.other.masked_fill(~(found.valid & inside), -1)
