# SPDX-License-Identifier: Apache-2.0
"""Triplet losses as modules, and the many losses of those names."""

from typing import Any

from torch import Tensor

from flashmetric.distances import SNR, Metric
from flashmetric.functional.batch_all import Types
from flashmetric.functional.lmnn import Reduction as LMNNReduction
from flashmetric.functional.lmnn import check_lmnn_options, lmnn_loss
from flashmetric.functional.triplet import (
    Empty,
    Mining,
    Reduction,
    check_margins,
    check_triplet_options,
    triplet_margin_loss,
)
from flashmetric.functional.triplet_ratio import Reduction as RatioReduction
from flashmetric.functional.triplet_ratio import (
    SelectedMining,
    check_quotient_options,
    check_ratio_options,
    triplet_quotient_loss,
    triplet_ratio_loss,
)
from flashmetric.labels import Labels
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance

_SQUARED: dict[str, Any] = {"distance": "sqeuclidean"}
_PML: dict[str, Any] = {"margin": 0.05, "normalize": True, "reduction": "mean_nonzero"}
_PRESETS: dict[str, dict[str, Any]] = {
    "pml": {**_PML, "mining": "batch_all"},
    "pml_batch_hard": _PML,
    "sentence_transformers": {"margin": 5.0, "empty": "keep"},
    "tensorflow_addons": {"margin": 1.0, "empty": "keep"},
    "tubui": {**_SQUARED, "margin": 1.0, "scale": 0.5},
    "tubui_scaled_anchor": {**_SQUARED, "margin": 1.0, "scale": 0.5, "anchor_scale": 2.0},
    "facenet": {**_SQUARED, "margin": 0.2, "normalize": True, "mining": "semi_hard"},
    "deep_ranking": {**_SQUARED, "margin": 1.0, "mining": "batch_all"},
    # Squared, the root of 1 - cosine is 1 - cosine.
    "sqrt_cosine": {"distance": "cosine", "margin": 1.0, "scale": 0.5},
    "wang_gupta": {"distance": "cosine", "margin": 0.5},
    "in_defense": {"margin": 0.2},
    "in_defense_soft": {"margin": 0.0, "smooth": True},
    "in_defense_none": {"margin": 0.0, "hinge": False},
    "cosine_softplus": {"distance": "cosine", "margin": 0.0, "smooth": True},
    "snr": {"distance": SNR, "margin": 0.2},
    "l1": {"distance": "cityblock", "margin": 0.2},
}


class TripletMarginLoss(Loss):
    """Triplet margin loss with the selections of the literature, or over all triplets.

    The hyper-parameters are those of :func:`flashmetric.functional.triplet_margin_loss`, which
    defines the loss. They are plain attributes: nothing is learned, and the state dict is empty
    (unless the distance learns).

    Args:
        margin: how much farther than the positive the negative should be; for ``"batch_all"`` also
            a tensor [C, C], of the classes of anchor and negative: a buffer, or a parameter.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        mining: ``"batch_hard"``, ``"batch_all"``, ``"semi_hard"``, ``"semi_hard_anchor"``,
            ``"easy_positive"`` or ``"easy_positive_semi_hard"``.
        type_of_triplets: of ``"batch_all"`` mining, ``"all"``, ``"hard"``, ``"semihard"`` or
            ``"easy"``.
        smooth: softplus in place of the hinge.
        hinge: False for the bare difference.
        swap: use the distance of positive and negative where that is smaller.
        scale: factor on every triplet.
        anchor_scale: factor on the anchors before they are compared.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        empty: ``"skip"`` or ``"keep"`` anchors without a positive or without a negative.
        max_positives: most positives of an anchor for ``"batch_all"`` and ``"semi_hard"``.
        normalize: scale rows to unit length first.
        exact: mine by exact distances instead of keys that rounding may swap; slower.

    Presets:
        - ``"pml"``, pytorch-metric-learning without a miner: all triplets, rows of unit length,
          margin 0.05, mean over the triplets with a loss; ``"pml_batch_hard"``, the same of the
          triplets that its ``BatchHardMiner`` chooses
        - ``"sentence_transformers"`` and ``"tensorflow_addons"``, batch-hard; with
          ``mining="semi_hard"`` their semi-hard losses
        - ``"tubui"``, half the hinge of squared distances; ``"tubui_scaled_anchor"``, the same of
          doubled anchors; ``"sqrt_cosine"``, the same with the root of 1 - cosine
        - ``"facenet"``; ``"deep_ranking"``; ``"wang_gupta"``; ``"cosine_softplus"``; ``"snr"``;
          ``"l1"``
        - ``"in_defense"``, ``"in_defense_soft"``, ``"in_defense_none"``: hinge, softplus, neither

    Example:
        >>> from flashmetric import TripletMarginLoss
        >>> TripletMarginLoss(0.5, swap=True).margin
        0.5
        >>> TripletMarginLoss.preset("pml", margin=0.1).mining
        'batch_all'
    """

    function = staticmethod(triplet_margin_loss)
    check = staticmethod(check_triplet_options)
    presets = _PRESETS

    def __init__(
        self,
        margin: float | Tensor = 0.2,
        *,
        distance: Distance | Metric = "euclidean",
        mining: Mining = "batch_hard",
        type_of_triplets: Types = "all",
        smooth: bool = False,
        hinge: bool = True,
        swap: bool = False,
        scale: float = 1.0,
        anchor_scale: float = 1.0,
        reduction: Reduction = "mean",
        empty: Empty = "skip",
        max_positives: int | None = None,
        normalize: bool = False,
        exact: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        if isinstance(margin, Tensor):
            # One per triplet goes with the triplets of one call: the function takes it.
            check_margins(margin, None, mining, type_of_triplets)
        super().__init__(
            margin=margin,
            distance=distance,
            mining=mining,
            type_of_triplets=type_of_triplets,
            smooth=smooth,
            hinge=hinge,
            swap=swap,
            scale=scale,
            anchor_scale=anchor_scale,
            reduction=reduction,
            empty=empty,
            max_positives=max_positives,
            normalize=normalize,
            exact=exact,
        )
        # Plain numbers: compilers do not take those of NumPy.
        if not isinstance(margin, Tensor):
            self.margin = float(margin)
        self.scale = float(scale)
        self.anchor_scale = float(anchor_scale)


class TripletRatioLoss(Loss):
    """Squared softmax of the two distances of a triplet, as in Hoffer's triplet network.

    See :func:`flashmetric.functional.triplet_ratio_loss`, which defines the loss.

    Args:
        const: factor; 1 as the authors' code, 2 as the squared norm is printed.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        mining: as for :class:`TripletMarginLoss`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        max_positives: most positives of an anchor.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric.losses import TripletRatioLoss
        >>> TripletRatioLoss(2.0).const
        2.0
    """

    function = staticmethod(triplet_ratio_loss)
    check = staticmethod(check_ratio_options)

    def __init__(
        self,
        const: float = 1.0,
        *,
        distance: Distance | Metric = "euclidean",
        mining: Mining = "batch_all",
        reduction: RatioReduction = "mean",
        max_positives: int | None = None,
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            const=const,
            distance=distance,
            mining=mining,
            reduction=reduction,
            max_positives=max_positives,
            normalize=normalize,
        )
        self.const = float(const)


class TripletQuotientLoss(Loss):
    """Hinge on the quotient of the two distances of a triplet.

    See :func:`flashmetric.functional.triplet_quotient_loss`, which defines the loss.

    Args:
        margin: how much farther than the positive the negative should be; above 0.
        scale: factor on every triplet.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        mining: as for :class:`TripletMarginLoss`, except ``"batch_all"``.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        max_positives: most positives of an anchor.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric.losses import TripletQuotientLoss
        >>> TripletQuotientLoss(0.5).scale
        0.5
    """

    function = staticmethod(triplet_quotient_loss)
    check = staticmethod(check_quotient_options)

    def __init__(
        self,
        margin: float = 1.0,
        *,
        scale: float = 0.5,
        distance: Distance | Metric = "sqeuclidean",
        mining: SelectedMining = "batch_hard",
        reduction: RatioReduction = "mean",
        max_positives: int | None = None,
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            margin=margin,
            scale=scale,
            distance=distance,
            mining=mining,
            reduction=reduction,
            max_positives=max_positives,
            normalize=normalize,
        )
        self.margin = float(margin)
        self.scale = float(scale)


class LMNNLoss(Loss):
    """Loss of large margin nearest neighbour classification.

    See :func:`flashmetric.functional.lmnn_loss`, which defines the loss. Target neighbours that
    stay fixed are passed to the call.

    Args:
        n_neighbors: how many nearest positives are target neighbours where none are given.
        margin: how much farther than a target neighbour a negative should be.
        pull_weight: factor on the distances of target neighbours.
        push_weight: factor on the hinges.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        reduction: ``"sum"``, ``"mean"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> import torch
        >>> from flashmetric.functional.lmnn import target_neighbors
        >>> from flashmetric.losses import LMNNLoss
        >>> x, labels = torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 0, 1])
        >>> fixed = target_neighbors(x, labels, 1)
        >>> LMNNLoss(1)(2 * x, labels, target_neighbors=fixed).item()
        6.0
    """

    function = staticmethod(lmnn_loss)
    check = staticmethod(check_lmnn_options)

    def __init__(
        self,
        n_neighbors: int = 3,
        *,
        margin: float = 1.0,
        pull_weight: float = 0.5,
        push_weight: float = 0.5,
        distance: Distance | Metric = "sqeuclidean",
        reduction: LMNNReduction = "sum",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            n_neighbors=n_neighbors,
            margin=margin,
            pull_weight=pull_weight,
            push_weight=push_weight,
            distance=distance,
            reduction=reduction,
            normalize=normalize,
        )
        self.margin = float(margin)
        self.pull_weight = float(pull_weight)
        self.push_weight = float(push_weight)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
        *,
        target_neighbors: Tensor | None = None,
    ) -> Tensor:
        """See :func:`flashmetric.functional.lmnn_loss`."""
        return lmnn_loss(
            embeddings,
            labels,
            target_neighbors=target_neighbors,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
            **self._arguments(),
        )
