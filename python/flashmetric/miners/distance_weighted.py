# SPDX-License-Identifier: Apache-2.0
"""Negatives sampled so that all distances are equally likely."""

import torch
from torch import Tensor

from flashmetric.checks import check_number
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, TripletIndices, all_positives, as_triplets
from flashmetric.miners.slabs import RowSlab, row_slabs, uniform


class DistanceWeightedMiner(Miner):
    r"""For every positive pair one random negative, by distance: triplets (a, p, n).

    A negative at the distance d on the unit sphere of D dimensions has the weight of one over the
    density of distances there:

    .. math::
        \log w = (2 - D) \log d - \frac{D - 3}{2} \log(1 - d^2 / 4), \qquad d \ge \text{cutoff}

    and 0 beyond ``nonzero_loss_cutoff``. Where an anchor has no other negatives, all have the same
    weight. Rows are compared by their Euclidean distance at unit length.

    Args:
        cutoff: negatives nearer than that have the weight of that distance. Default: 0.5.
        nonzero_loss_cutoff: negatives as far as that are not drawn. Default: 1.4.
        max_positives: how many positives an anchor has at most; the farthest are used. Default:
            they are counted, which ``fixed_size`` does not allow.
        generator: source of random numbers, best on the device of the embeddings. Default: that of
            the device.

    Example:
        >>> import torch
        >>> from flashmetric.miners import DistanceWeightedMiner
        >>> x = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.6, 0.8], [0.0, -1.0]])
        >>> DistanceWeightedMiner()(x, torch.tensor([0, 0, 1, 2]))
        (tensor([0, 1]), tensor([1, 0]), tensor([2, 2]))

    Source:
        C.-Y. Wu et al.: Sampling Matters in Deep Embedding Learning, ICCV 2017.
    """

    def __init__(
        self,
        cutoff: float = 0.5,
        nonzero_loss_cutoff: float = 1.4,
        *,
        max_positives: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        for name, value in (("cutoff", cutoff), ("nonzero_loss_cutoff", nonzero_loss_cutoff)):
            check_number(name, value)
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        check_max_positives(max_positives)
        self.cutoff = float(cutoff)
        self.nonzero_loss_cutoff = float(nonzero_loss_cutoff)
        self.max_positives = max_positives
        self.generator = generator

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        positive = all_positives(pairs, self.max_positives, fixed_size).other
        numbers = uniform(pairs, tuple(positive.shape), self.generator)
        negative = torch.full_like(positive, -1)
        for slab in row_slabs(pairs):
            negative[slab.rows] = self._draw(slab, pairs.embeddings.shape[1], numbers[slab.rows])
        return as_triplets(positive, negative)

    def _draw(self, slab: RowSlab, features: int, numbers: Tensor) -> Tensor:
        """Columns of random negatives, one per number; -1 where there are none."""
        total = self.weights(slab, features).cumsum(1)
        last = total[:, -1:].contiguous()
        column = torch.searchsorted(total, numbers * last, right=True)
        # Rounding up to the whole must not draw what comes after the last weight.
        column = torch.minimum(column, torch.searchsorted(total, last))
        return column.masked_fill_(last == 0, -1)

    def weights(self, slab: RowSlab, features: int) -> Tensor:
        """Weights [rows, M] of the negatives, the largest of each row 1."""
        distance = slab.distance.nan_to_num(nan=0.0, posinf=torch.inf)
        d = distance.clamp(min=self.cutoff)
        # Opposite rows have no finite weight, and are beyond any sensible cutoff.
        drawn = slab.negative & (distance < self.nonzero_loss_cutoff) & (d < 2)
        d = d.masked_fill(~drawn, 1)
        log_weight = (2.0 - features) * d.log() - (features - 3) / 2 * (1 - d.square() / 4).log()
        # Exponents reach hundreds in high dimensions: only relative to the largest do they fit.
        log_weight.masked_fill_(~drawn, -torch.inf)
        top = log_weight.amax(1, keepdim=True)
        weight = (log_weight - top.masked_fill(top == -torch.inf, 0)).exp()
        return torch.where(top == -torch.inf, slab.negative.to(weight.dtype), weight)
