# SPDX-License-Identifier: Apache-2.0
"""The losses as modules: hyper-parameters in the constructor, :mod:`functional` does the rest."""

from typing import Any, Literal

from torch import Tensor, nn

from flashmetric import functional as F
from flashmetric.checks import check_choice
from flashmetric.functional import contrastive, triplet
from flashmetric.ops.distance import Distance

Preset = Literal["pml", "sentence_transformers", "tensorflow_addons"]

_TRIPLET_PRESETS: dict[str, dict[str, Any]] = {
    "pml": {"margin": 0.05, "normalize": True, "reduction": "mean_nonzero"},
    "sentence_transformers": {"margin": 5.0, "empty": "keep"},
    "tensorflow_addons": {"margin": 1.0, "empty": "keep"},
}
_CONTRASTIVE_PRESETS: dict[str, dict[str, Any]] = {
    "pml": {"normalize": True},
    "sentence_transformers": {
        "distance": "cosine",
        "neg_margin": 0.5,
        "power": 2,
        "scale": 0.5,
        "reduction": "mean",
    },
    "tensorflow_addons": {"power": 2, "reduction": "mean"},
}


class TripletMarginLoss(nn.Module):
    """Triplet margin loss with batch-hard mining.

    The hyper-parameters are those of :func:`flashmetric.functional.triplet_margin_loss`, which
    defines the loss. They are plain attributes: nothing is learned, and the state dict is empty.

    Args:
        margin: how much farther than the positive the negative should be.
        distance: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        mining: ``"batch_hard"``.
        smooth: softplus in place of the hinge.
        swap: use the distance of positive and negative where that is smaller.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        empty: ``"skip"`` or ``"keep"`` anchors without a positive or without a negative.
        normalize: scale rows to unit length first.
        exact: mine by exact distances instead of keys that rounding may swap; slower.

    Example:
        >>> from flashmetric import TripletMarginLoss
        >>> TripletMarginLoss(0.5, swap=True).margin
        0.5
        >>> TripletMarginLoss.preset("pml", margin=0.1).reduction
        'mean_nonzero'
    """

    def __init__(
        self,
        margin: float = 0.2,
        *,
        distance: Distance = "euclidean",
        mining: triplet.Mining = "batch_hard",
        smooth: bool = False,
        swap: bool = False,
        reduction: triplet.Reduction = "mean",
        empty: triplet.Empty = "skip",
        normalize: bool = False,
        exact: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__()
        triplet.check_triplet_options(
            margin, distance, mining, smooth, swap, reduction, empty, normalize, exact
        )
        self.margin = float(margin)
        self.distance: Distance = distance
        self.mining: triplet.Mining = mining
        self.smooth = smooth
        self.swap = swap
        self.reduction: triplet.Reduction = reduction
        self.empty: triplet.Empty = empty
        self.normalize = normalize
        self.exact = exact

    @classmethod
    def preset(cls, name: Preset, **overrides: Any) -> "TripletMarginLoss":
        """The loss as another library defines it by default.

        Args:
            name: ``"pml"``, ``"sentence_transformers"`` or ``"tensorflow_addons"``.
            **overrides: hyper-parameters to set differently.

        Raises:
            ValueError: the preset is unknown.
        """
        check_choice("name", name, tuple(_TRIPLET_PRESETS))
        return cls(**{**_TRIPLET_PRESETS[name], **overrides})

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """See :func:`flashmetric.functional.triplet_margin_loss`."""
        return F.triplet_margin_loss(
            embeddings,
            labels,
            margin=self.margin,
            distance=self.distance,
            mining=self.mining,
            smooth=self.smooth,
            swap=self.swap,
            reduction=self.reduction,
            empty=self.empty,
            normalize=self.normalize,
            exact=self.exact,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
        )

    def extra_repr(self) -> str:
        """Hyper-parameters, as the constructor takes them."""
        return (
            f"{self.margin}, distance={self.distance!r}, mining={self.mining!r}, "
            f"smooth={self.smooth}, swap={self.swap}, reduction={self.reduction!r}, "
            f"empty={self.empty!r}, normalize={self.normalize}, exact={self.exact}"
        )


class ContrastiveLoss(nn.Module):
    """Contrastive loss over all pairs.

    The hyper-parameters are those of :func:`flashmetric.functional.contrastive_loss`, which defines
    the loss. They are plain attributes: nothing is learned, and the state dict is empty.

    Args:
        pos_margin: distance below which a positive pair costs nothing.
        neg_margin: distance above which a negative pair costs nothing.
        distance: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.
        power: 1 for the hinge, 2 for its square.
        scale: factor on every pair.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import ContrastiveLoss
        >>> ContrastiveLoss(neg_margin=0.5).neg_margin
        0.5
        >>> ContrastiveLoss.preset("sentence_transformers").distance
        'cosine'
    """

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        *,
        distance: Distance = "euclidean",
        power: contrastive.Power = 1,
        scale: float = 1.0,
        reduction: contrastive.Reduction = "mean_nonzero",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__()
        contrastive.check_contrastive_options(
            pos_margin, neg_margin, distance, power, scale, reduction, normalize
        )
        self.pos_margin = float(pos_margin)
        self.neg_margin = float(neg_margin)
        self.distance: Distance = distance
        self.power: contrastive.Power = power
        self.scale = float(scale)
        self.reduction: contrastive.Reduction = reduction
        self.normalize = normalize

    @classmethod
    def preset(cls, name: Preset, **overrides: Any) -> "ContrastiveLoss":
        """The loss as another library defines it by default.

        Args:
            name: ``"pml"``, ``"sentence_transformers"`` or ``"tensorflow_addons"``.
            **overrides: hyper-parameters to set differently.

        Raises:
            ValueError: the preset is unknown.
        """
        check_choice("name", name, tuple(_CONTRASTIVE_PRESETS))
        return cls(**{**_CONTRASTIVE_PRESETS[name], **overrides})

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | None = None,
        *,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
    ) -> Tensor:
        """See :func:`flashmetric.functional.contrastive_loss`."""
        return F.contrastive_loss(
            embeddings,
            labels,
            pos_margin=self.pos_margin,
            neg_margin=self.neg_margin,
            distance=self.distance,
            power=self.power,
            scale=self.scale,
            reduction=self.reduction,
            normalize=self.normalize,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
        )

    def extra_repr(self) -> str:
        """Hyper-parameters, as the constructor takes them."""
        return (
            f"{self.pos_margin}, {self.neg_margin}, distance={self.distance!r}, "
            f"power={self.power}, scale={self.scale}, reduction={self.reduction!r}, "
            f"normalize={self.normalize}"
        )
