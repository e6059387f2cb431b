# SPDX-License-Identifier: Apache-2.0
"""What the fused losses share: the try, the fallback, and sums that are reduced already."""

from typing import Any, NamedTuple

import torch
from pytorch_metric_learning.reducers import (
    AvgNonZeroReducer,
    DivisorReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
    ThresholdReducer,
)
from pytorch_metric_learning.utils import common_functions
from torch import Tensor

from flashmetric.indices import is_ascending
from flashmetric.pml.batch import Batch, EveryPairButOwn, as_given
from flashmetric.pml.fallback import NotFusedError, check_not_overridden, check_numbers, report

__all__ = ["FusedLoss", "FusedPairLoss", "LossDict", "Sum"]

LossDict = dict[str, dict[str, Any]]


class Sum(NamedTuple):
    """What a reducer makes its value from, in place of the losses themselves."""

    value: Tensor
    """Their sum, 0-d."""
    number: Tensor
    """How many there are."""
    active: Tensor | None
    """How many are above 0; None if that is not known."""
    divisor: Tensor | None = None
    """What a ``DivisorReducer`` divides by, if the loss has such a number."""


class FusedLoss:
    """Put before a loss of pytorch-metric-learning: tries :meth:`fused`, else leaves it to that.

    The loss dictionary goes to the reducer as always, so that regularisers, multiple reducers and
    subclasses of either work as they do there.
    """

    numbers: tuple[str, ...] = ()
    """Attributes that must not be tensors."""
    _summed: tuple[tuple[Any, Sum], ...] = ()
    """During a call: reducers that collect statistics, and the sums that they do not see."""

    distance: Any
    reducer: Any

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        indices_tuple: Any = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
    ) -> Any:
        """As the parent."""
        try:
            value = super().forward(  # type: ignore[misc]
                embeddings, labels, indices_tuple, ref_emb, ref_labels
            )
            for reducer, of in self._summed:
                _record_statistics(reducer, of)
        finally:
            self._summed = ()
        return value

    def fused(self, batch: Batch) -> LossDict:
        """The loss dictionary, or :class:`NotFusedError` before anything costly."""
        raise NotImplementedError

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        """See :meth:`fused`; the parent's own if that cannot be."""
        self.check_call(embeddings, labels, indices_tuple, ref_emb, ref_labels)
        try:
            check_not_overridden(self)
            check_numbers(self, *self.numbers)
            return self.fused(
                Batch(self.distance, embeddings, labels, indices_tuple, ref_emb, ref_labels)
            )
        except NotFusedError as reason:
            report(self, reason)
        if isinstance(indices_tuple, EveryPairButOwn):
            assert labels is not None and ref_labels is not None
            indices_tuple = indices_tuple.listed(labels, ref_labels)
        return self._parents(embeddings, labels, indices_tuple, ref_emb, ref_labels)

    def _parents(self, *call: Any) -> LossDict:
        loss_dict: LossDict = super().compute_loss(*call)  # type: ignore[misc]
        return loss_dict

    def check_call(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> None:
        """Raise what the parent raises."""
        common_functions.labels_or_indices_tuple_required(labels, indices_tuple)

    def reducer_of(self, name: str) -> Any:
        """The reducer of a sub-loss whose losses are not listed but summed in the kernel."""
        reducer = self.reducer
        if isinstance(reducer, MultipleReducers):
            known = name in reducer.reducers
            reducer = reducer.reducers[name] if known else reducer.default_reducer
        kind = type(reducer)
        if kind is ThresholdReducer and (reducer.low, reducer.high) == (0, None):
            kind = AvgNonZeroReducer
        if kind not in (MeanReducer, SumReducer, AvgNonZeroReducer, DivisorReducer):
            raise NotFusedError(
                f"{kind.__name__} wants the list of all losses, which the kernels only sum up"
            )
        return reducer

    def reduced(self, name: str, of: Sum, batch: Batch) -> dict[str, Any]:
        """The entry of a sub-loss in the loss dictionary, from sums."""
        reducer = self.reducer_of(name)
        divisor: Tensor | None = None
        if isinstance(reducer, DivisorReducer):
            divisor = of.divisor
            if divisor is None:
                raise NotFusedError(f"{name} has no divisor")
        elif isinstance(reducer, ThresholdReducer):
            divisor = of.active
            if divisor is None:
                raise NotFusedError(f"how many losses of {name} are above 0 is not known")
        elif not isinstance(reducer, SumReducer):
            divisor = of.number
        value = of.value if divisor is None else of.value / divisor.clamp(min=1)
        if reducer.collect_stats:
            self._summed = (*self._summed, (reducer, of))
        return {
            "losses": as_given(value, batch.given),
            "indices": None,
            "reduction_type": "already_reduced",
        }

    def by_anchor(self, losses: Tensor, batch: Batch, anchors: Tensor | None = None) -> LossDict:
        """The loss dictionary of one loss per anchor; any reducer takes these."""
        if anchors is None:
            anchors = torch.arange(len(losses), device=losses.device)
        return {
            "loss": {
                "losses": as_given(losses, batch.given),
                "indices": anchors,
                "reduction_type": "element",
            }
        }

    def by_pair(self, losses: Tensor, batch: Batch, *indices: Tensor) -> LossDict:
        """The loss dictionary of one loss per listed pair or triplet; any reducer takes these."""
        return {
            "loss": {
                "losses": as_given(losses, batch.given),
                "indices": indices,
                "reduction_type": "pos_pair" if len(indices) == 2 else "triplet",
            }
        }

    def nothing(self) -> LossDict:
        """The loss dictionary without any loss."""
        losses: LossDict = self.zero_losses()  # type: ignore[attr-defined]
        return losses


def _record_statistics(reducer: Any, of: Sum) -> None:
    """Set what the reducer would have found in the list of losses."""
    if not of.number:
        return
    reducer.losses_size = int(of.number)
    if isinstance(reducer, ThresholdReducer) and of.active is not None:
        reducer.num_past_filter = reducer.num_above_low = int(of.active)
    elif isinstance(reducer, DivisorReducer):
        reducer.divisor = of.divisor


class FusedPairLoss(FusedLoss):
    """The same before a ``GenericPairLoss``, to which one pair of each kind is none at all."""

    def compute_loss(
        self,
        embeddings: Tensor,
        labels: Tensor | None,
        indices_tuple: Any,
        ref_emb: Tensor,
        ref_labels: Tensor | None,
    ) -> LossDict:
        """As of all fused losses."""
        call = (embeddings, labels, indices_tuple, ref_emb, ref_labels)
        if indices_tuple is None and len(embeddings) * len(ref_emb) <= 2:
            # Possibly one of each kind; so few need no kernel.
            return self._parents(*call)
        plain = indices_tuple is not None and not isinstance(indices_tuple, EveryPairButOwn)
        if plain and all(len(index) <= 1 for index in indices_tuple):
            return self.nothing()
        return super().compute_loss(*call)

    def each_once(self, batch: Batch) -> tuple[Tensor, ...] | None:
        """The listed pairs without repetition, as a mask holds them; None for all pairs."""
        if batch.indices is None:
            return None
        a1, p, a2, n = (*batch.indices[:2], *batch.indices[-2:])
        if len(batch.indices) == 3:
            a2 = a1
        width = max(1, batch.references)
        a1, p, positive = _each_once(a1, p, width)
        a2, n, negative = _each_once(a2, n, width)
        few, many = sorted((positive, negative), key=len)
        # Both are sorted; torch.isin would sort them again.
        place = torch.searchsorted(many, few).clamp(max=len(many) - 1)
        both = len(many) > 0 and bool((many[place] == few).any())
        assert not both, "Each pair should be either be positive or negative"
        return a1, p, a2, n


def _each_once(anchor: Tensor, other: Tensor, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Pairs sorted and without repetition, and the numbers that they are sorted by."""
    key = anchor * width + other
    # As the miners leave them.
    if is_ascending(key):
        return anchor, other, key
    key = key.unique()
    return key // width, key % width, key
