# SPDX-License-Identifier: Apache-2.0
"""The nearest negatives of different clusters."""

import torch
from torch import Tensor

from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, PairIndices, all_positives, as_pairs
from flashmetric.miners.slabs import row_slabs
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import words


class ClusterNegativeMiner(Miner):
    """Of each anchor the k nearest negatives, no two of one class: pairs (a1, p, a2, n).

    So that a query meets different hard negatives, and not several views of one. All positives are
    returned.

    Args:
        k: negatives per anchor. Default: 5.
        max_positives: how many positives an anchor has at most; the farthest are used. Default:
            they are counted, which ``fixed_size`` does not allow.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import ClusterNegativeMiner
        >>> x = torch.tensor([[0.0], [1.0], [2.0], [3.0]])
        >>> a1, p, a2, n = ClusterNegativeMiner(2, normalize=False)(x, torch.tensor([0, 1, 1, 2]))
        >>> n[a2 == 0]
        tensor([1, 3])

    Source:
        F. Radenovic, G. Tolias, O. Chum: CNN Image Retrieval Learns from BoW: Unsupervised
        Fine-Tuning with Hard Examples, ECCV 2016.
    """

    def __init__(
        self,
        k: int = 5,
        *,
        max_positives: int | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        if not isinstance(k, int) or isinstance(k, bool):
            raise TypeError(f"k must be an integer, got {type(k).__name__}")
        if k < 1:
            raise ValueError(f"k must be at least 1, got {k}")
        check_max_positives(max_positives)
        self.k = k
        self.max_positives = max_positives

    def mine(self, pairs: AllPairs, fixed_size: bool) -> PairIndices:
        """See :meth:`Miner.mine`."""
        positive = all_positives(pairs, self.max_positives, fixed_size).other
        clusters = words(pairs.labels if pairs.ref_labels is None else pairs.ref_labels)
        if pairs.rule.startswith("group"):
            clusters = clusters[:, :1]
        negative = torch.full((pairs.anchors, self.k), -1, device=positive.device)
        for slab in row_slabs(pairs):
            d = slab.distance.masked_fill(~slab.negative, torch.inf)
            for place in range(self.k):
                nearest, column = d.min(1)
                negative[slab.rows, place] = column.masked_fill(nearest == torch.inf, -1)
                d.masked_fill_(_same(clusters[column], clusters), torch.inf)
        return as_pairs(positive, negative)


def _same(chosen: Tensor, clusters: Tensor) -> Tensor:
    """Which references [rows, M] are of the cluster chosen in each row."""
    same = chosen[:, :1] == clusters[:, 0]
    for word in range(1, clusters.shape[1]):
        same &= chosen[:, word, None] == clusters[:, word]
    return same
