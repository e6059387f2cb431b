# SPDX-License-Identifier: Apache-2.0
"""What miners share: the call, the two forms of the result, the lists they are made from."""

import inspect
from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor, nn

from flashmetric.checks import check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.pairs import PairLists
from flashmetric.functional.scaled_anchor import prepare_scaled_pairs
from flashmetric.indices import PairIndices, TripletIndices
from flashmetric.labels import Labels
from flashmetric.miners.mined_pairs import MinedPairs
from flashmetric.ops.distance import Distance

__all__ = [
    "Miner",
    "PairIndices",
    "TripletIndices",
    "all_positives",
    "as_pairs",
    "as_triplets",
    "limit_of",
]


class Miner(nn.Module, ABC):
    """Chooses pairs or triplets of a batch, without gradients.

    A subclass overrides :meth:`mine`.

    Args:
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        normalize: scale rows to unit length first; the peers' miners do.
        anchor_scale: factor on the anchors before they are compared.
    """

    def __init__(
        self,
        *,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        anchor_scale: float = 1.0,
    ) -> None:
        """Check and store the options."""
        super().__init__()
        check_distance(distance, normalize)
        check_number("anchor_scale", anchor_scale)
        self.distance = distance
        self.normalize = normalize
        self.anchor_scale = float(anchor_scale)

    @abstractmethod
    def mine(self, pairs: AllPairs, fixed_size: bool) -> TripletIndices | PairIndices:
        """Choose from the pairs of a batch; without host synchronisation if ``fixed_size``."""

    @torch.no_grad()
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
        *,
        fixed_size: bool = False,
    ) -> Any:
        """Choose pairs or triplets.

        Args:
            embeddings: anchors, shape [N, D].
            labels: class of each anchor, shape [N], or :class:`Labels`.
            ref_emb: rows to take positives and negatives from, shape [M, D]. Default: the anchors
                themselves, a row being no pair with itself. Given references exclude no pair.
            ref_labels: classes of ``ref_emb``, shape [M].
            fixed_size: return tensors whose size does not depend on what is found, with masks of
                what is valid: no waiting for the device, no graph break. Default: False.

        Returns:
            int64 tensors (a, p, n) or (a1, p, a2, n) for ``indices_tuple=`` of any loss; with
            ``fixed_size`` a :class:`TripletIndices` or a :class:`PairIndices`, which every loss of
            this package takes likewise, and whose ``indices()`` are the same.
            A pair with a row that is not finite counts as the hardest of its kind, so that the loss
            of what is chosen is NaN and not merely wrong.
        """
        pairs = prepare_scaled_pairs(
            embeddings,
            labels,
            self.anchor_scale,
            distance=self.distance,
            normalize=self.normalize,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
        )
        assert isinstance(pairs, AllPairs)
        found = self.mine(MinedPairs.of(pairs), fixed_size)
        return found if fixed_size else found.indices()

    def extra_repr(self) -> str:
        """Options, as the constructor takes them."""
        names = inspect.signature(type(self)).parameters
        shown = (name for name in names if name != "generator" and name in self.__dict__)
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in shown)


def limit_of(name: str, limit: int | None, fixed_size: bool) -> int | None:
    """The option ``name``, which a result of fixed size cannot do without."""
    if limit is None and fixed_size:
        raise ValueError(f"{name} must be given for fixed_size; got None")
    return limit


def all_positives(pairs: AllPairs, max_positives: int | None, fixed_size: bool) -> PairLists:
    """The positives of each anchor, farthest first."""
    return pairs.positives(limit_of("max_positives", max_positives, fixed_size))


def as_triplets(positives: Tensor, negatives: Tensor) -> TripletIndices:
    """Triplets from row numbers [N, K], -1 for none."""
    anchors = torch.arange(positives.shape[0], device=positives.device).unsqueeze(1)
    columns = torch.broadcast_tensors(anchors, positives, negatives)
    a, p, n = (column.reshape(-1) for column in columns)
    return TripletIndices(a, p, n, (p >= 0) & (n >= 0))


def as_pairs(positives: Tensor, negatives: Tensor) -> PairIndices:
    """Pairs from row numbers [N, K] and [N, L], -1 for none."""
    sides = []
    for others in (positives, negatives):
        rows = torch.arange(others.shape[0], device=others.device).unsqueeze(1)
        sides.append((rows.expand(others.shape).reshape(-1), others.reshape(-1)))
    (a1, p), (a2, n) = sides
    return PairIndices(a1, p, a2, n, p >= 0, n >= 0)
