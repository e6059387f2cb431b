# SPDX-License-Identifier: Apache-2.0
"""Miners of the hardest and of semi-hard triplets."""

from typing import Any, Literal, get_args

import torch

from flashmetric.checks import check_choice, check_flag
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.triplet import check_max_positives
from flashmetric.miners.base import Miner, TripletIndices, all_positives, as_triplets
from flashmetric.ops.distance import Distance

Per = Literal["positive", "anchor"]


class BatchHardMiner(Miner):
    """Of each anchor the farthest positive and the nearest negative: triplets (a, p, n).

    Args:
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True, as pytorch-metric-learning.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import BatchHardMiner
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [3.5]])
        >>> BatchHardMiner(normalize=False)(x, torch.tensor([0, 0, 1, 1]))
        (tensor([0, 1, 2, 3]), tensor([1, 0, 3, 2]), tensor([2, 2, 1, 1]))

    Source:
        A. Hermans, L. Beyer, B. Leibe: In Defense of the Triplet Loss for Person Re-Identification,
        2017, arXiv:1703.07737.
    """

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        return as_triplets(pairs.farthest("positive").other, pairs.nearest("negative").other)


class SemiHardMiner(Miner):
    """Negatives that are farther than the positive, but as near as possible: triplets (a, p, n).

    Args:
        per: ``"positive"`` (default), every positive pair with the nearest negative farther than
            it, as FaceNet, tensorflow-addons and sentence-transformers have it; ``"anchor"``, only
            the farthest positive of each anchor, as pytorch-metric-learning's
            ``BatchEasyHardMiner("hard", "semihard")``. What that library's ``TripletMarginMiner``
            calls semi-hard is :class:`TripletMarginMiner` here too.
        fallback: use the farthest negative where none is farther than the positive. Default: True;
            pytorch-metric-learning leaves such triplets out.
        max_positives: how many positives an anchor has at most; the farthest are used. Default:
            they are counted, which ``fixed_size`` does not allow.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first. Default: True.
        anchor_scale: factor on the anchors before they are compared. Default: 1.

    Example:
        >>> import torch
        >>> from flashmetric.miners import SemiHardMiner
        >>> x = torch.tensor([[0.0], [2.0], [1.0], [3.0]])
        >>> SemiHardMiner(normalize=False)(x, torch.tensor([0, 0, 1, 2]))
        (tensor([0, 1]), tensor([1, 0]), tensor([3, 2]))

    Source:
        F. Schroff, D. Kalenichenko, J. Philbin: FaceNet, CVPR 2015, arXiv:1503.03832.
    """

    def __init__(
        self,
        per: Per = "positive",
        *,
        fallback: bool = True,
        max_positives: int | None = None,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__(distance=distance, normalize=normalize, anchor_scale=anchor_scale)
        check_choice("per", per, get_args(Per))
        check_flag("fallback", fallback)
        check_max_positives(max_positives)
        self.per: Per = per
        self.fallback = fallback
        self.max_positives = max_positives

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "SemiHardMiner":
        """The miner as another library defines it.

        Args:
            name: ``"tensorflow_addons"`` and ``"sentence_transformers"``: per positive, with the
                fallback, rows as they are; ``"pml"``: per anchor, without it, rows of unit length.
            **overrides: options to set differently.

        Raises:
            ValueError: the preset is unknown.
        """
        as_they_are = {"normalize": False}
        presets: dict[str, dict[str, Any]] = {
            "pml": {"per": "anchor", "fallback": False},
            "sentence_transformers": as_they_are,
            "tensorflow_addons": as_they_are,
        }
        check_choice("name", name, tuple(presets))
        return cls(**{**presets[name], **overrides})

    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices:
        """See :meth:`Miner.mine`."""
        if self.per == "anchor":
            positive = pairs.farthest("positive")
        else:
            positive = all_positives(pairs, self.max_positives, fixed_size)
        negative = pairs.nearest("negative", positive.distance).other
        if self.fallback:
            farthest = pairs.farthest("negative").other
            negative = torch.where(negative >= 0, negative, farthest)
        return as_triplets(positive.other, negative)
