# SPDX-License-Identifier: Apache-2.0
"""A call of a loss or miner, translated: its rows, distance and pairs as the kernels know them."""

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.distances import (
    BaseDistance,
    CosineSimilarity,
    DotProductSimilarity,
    LpDistance,
    SNRDistance,
)
from pytorch_metric_learning.utils import loss_and_miner_utils
from torch import Tensor

from flashmetric.distances import SNR, Metric
from flashmetric.functional.all_pairs import pair_distance
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Pairs
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, accumulate_dtype
from flashmetric.pml.fallback import NotFusedError

__all__ = ["Batch", "EveryPairButOwn", "as_given", "translate"]

_LP: dict[tuple[float, float], Distance] = {
    (2, 1): "euclidean",
    (2, 2): "sqeuclidean",
    (1, 1): "cityblock",
}


class EveryPairButOwn(NamedTuple):
    """In place of an ``indices_tuple``: all labelled pairs but each anchor with its own copy."""

    own: Tensor
    """Number of the reference row that is a copy of the anchor, int64 [N]."""

    def listed(self, labels: Tensor, ref_labels: Tensor) -> tuple[Tensor, ...]:
        """The same as pairs (a1, p, a2, n)."""
        a1, p, a2, n = loss_and_miner_utils.get_all_pairs_indices(labels, ref_labels)
        other = p != self.own[a1]
        return a1[other], p[other], a2, n


def as_given(value: Tensor, embeddings: Tensor) -> Tensor:
    """A result in the dtype of the embeddings; under autocast, in that of the kernels' sums."""
    if torch.is_autocast_enabled(embeddings.device.type):
        return value.to(accumulate_dtype(embeddings.dtype))
    return value.to(embeddings.dtype)


def translate(distance: BaseDistance) -> tuple[Distance | Metric, int]:
    """The kernel's distance d of rows that are normalised already, and the sign of the peer's.

    The peer's value is d, or -d if it is a similarity.
    """
    kind = type(distance)
    if kind is LpDistance:
        name = _LP.get((distance.p, distance.power))
        if name is None:
            raise NotFusedError(
                f"LpDistance(p={distance.p}, power={distance.power}) has no kernel, only p=2 with "
                "power 1 or 2 and p=1 with power 1 have"
            )
        return name, 1
    if kind not in (CosineSimilarity, DotProductSimilarity, SNRDistance):
        raise NotFusedError(f"the distance {kind.__name__} has no kernel")
    if distance.power != 1:
        raise NotFusedError(f"{kind.__name__}(power={distance.power}) has no kernel")
    return (SNR(normalize=False), 1) if kind is SNRDistance else ("dot", -1)


class Batch:
    """Rows, labels and listed pairs of a call.

    Args:
        distance: that of the loss or miner.
        embeddings: anchors, shape [N, D].
        labels: of the anchors, of any dtype, or None with ``indices``.
        indices: pairs or triplets, or None for all labelled pairs.
        ref_emb: the anchors themselves (the same object) or other rows, shape [M, D].
        ref_labels: their labels. All pairs leave out the diagonal if these are ``labels``
            themselves (the same object), whatever ``ref_emb`` is.
    """

    def __init__(
        self,
        distance: BaseDistance,
        embeddings: Tensor,
        labels: Tensor | None,
        indices: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> None:
        """Normalise the rows as the distance says, and record its statistics."""
        self.distance, self.sign = translate(distance)
        self.given, self.given_refs = embeddings, ref_emb
        distance.check_shapes(embeddings, ref_emb)
        if ref_emb.dtype != embeddings.dtype or ref_emb.device != embeddings.device:
            raise NotFusedError("embeddings and ref_emb differ in dtype or device")
        self.alone = ref_emb is embeddings
        self.embeddings = _rows(distance, embeddings)
        self.refs = self.embeddings if self.alone else _rows(distance, ref_emb)
        self.bounded = bool(distance.normalize_embeddings)
        if distance.collect_stats:
            distance.reset_stats()
            distance.set_default_stats(embeddings, ref_emb, self.embeddings, self.refs)
        self._labels, self._ref_labels = labels, ref_labels
        self.own = indices.own if isinstance(indices, EveryPairButOwn) else None
        self.indices: tuple[Tensor, ...] | None = None
        if indices is not None and self.own is None:
            self.indices = tuple(i.to(embeddings.device, torch.int64) for i in indices)

    @property
    def anchors(self) -> int:
        """N."""
        return self.embeddings.shape[0]

    @property
    def references(self) -> int:
        """M."""
        return self.refs.shape[0]

    def pairs(self, indices: tuple[Tensor, ...] | None = None) -> Pairs:
        """The pairs of the call, or those listed."""
        indices = self.indices if indices is None else indices
        refs = None if self.alone else self.refs
        if indices is not None:
            return prepare_pairs(
                self.embeddings, None, distance=self.distance, ref_emb=refs, indices_tuple=indices
            )
        return self.labelled(*self._with_identity())

    def labelled(self, labels: Tensor | Labels, ref_labels: Tensor | Labels | None) -> Pairs:
        """All pairs by these labels; a self-batch if ``ref_labels`` is None."""
        return prepare_pairs(
            self.embeddings,
            labels,
            distance=self.distance,
            ref_emb=None if ref_labels is None else self.refs,
            ref_labels=ref_labels,
        )

    def _with_identity(self) -> tuple[Tensor | Labels, Tensor | Labels | None]:
        """Labels that leave out what the peer leaves out, by its rule of one object."""
        own, same = self.own, self.one_object_of_labels
        x, r = self.classes()
        if same and self.alone and own is None:
            return x, None
        if same and own is None:
            own = torch.arange(len(x), device=x.device)
        return (x, r) if own is None else except_own(x, r, own, "a")

    def classes(self) -> tuple[Tensor, Tensor]:
        """Labels of anchors and references as int64; equal where the peer's are."""
        labels, ref_labels = self._labels, self._ref_labels
        assert labels is not None
        if ref_labels is None:
            raise NotFusedError("ref_emb came without ref_labels")
        kinds = {labels.dtype, ref_labels.dtype}
        if any(kind.is_floating_point or kind.is_complex for kind in kinds):
            codes = torch.unique(torch.cat((labels, ref_labels)), return_inverse=True)[1]
            return codes[: len(labels)], codes[len(labels) :]
        return labels.long(), ref_labels.long()

    @property
    def one_object_of_labels(self) -> bool:
        """Whether the labels of anchors and references are the same object."""
        return self._ref_labels is self._labels

    def labels_as_given(self) -> tuple[Tensor, Tensor | None]:
        """Labels of anchors and references as they came."""
        if self._labels is None:
            raise NotFusedError("labels are missing")
        return self._labels, self._ref_labels

    def weights(self, using_ref: bool = False) -> Tensor:
        """Weight of each anchor: how often the listed tuples hold it, the most often being 1."""
        weights: Tensor = loss_and_miner_utils.convert_to_weights(
            self.indices, self.labels_as_given()[0], self.given.dtype, using_ref
        )
        return weights

    def between(self, anchors: Tensor, others: Tensor) -> Tensor:
        """Distances [P] of the listed anchors and references."""
        refs = None if self.alone else self.refs
        return _between(self.distance, self.embeddings, refs, anchors, others)

    def between_references(self, first: Tensor, second: Tensor) -> Tensor:
        """Distances [P] of references to each other."""
        return _between(self.distance, self.refs, None, first, second)


def except_own(x: Tensor, r: Tensor, own: Tensor, negatives: str) -> tuple[Labels, Labels]:
    """Labels under which a row is no positive of its own copy, with "d" no negative either."""
    rows = torch.arange(len(r), device=r.device)
    rule = f"group:d{negatives}"
    return Labels(torch.stack((x, own), 1), rule), Labels(torch.stack((r, rows), 1), rule)


def _rows(distance: BaseDistance, rows: Tensor) -> Tensor:
    if not distance.normalize_embeddings:
        return rows
    if distance.p == 2:
        return normalize_rows(rows)
    normalized: Tensor = distance.maybe_normalize(rows)
    return normalized


def _between(
    distance: Distance | Metric, x: Tensor, refs: Tensor | None, first: Tensor, second: Tensor
) -> Tensor:
    if not isinstance(distance, Metric):
        return pair_distance(x, refs, first, second, distance)
    x, refs = distance.rows(x), None if refs is None else distance.rows(refs)
    values = pair_distance(x, refs, first, second, distance.kernel)
    scale = distance.anchor_scale(x)
    return values if scale is None else values * scale[first]
