# SPDX-License-Identifier: Apache-2.0
"""The contrastive loss as a module, and the many losses of that name."""

from typing import Any

from torch import Tensor

from flashmetric.distances import Metric
from flashmetric.functional.contrastive import Power, check_contrastive_options, contrastive_loss
from flashmetric.functional.pair_reduction import PairReduction
from flashmetric.labels import Labels
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance

_HALF_SQUARES: dict[str, Any] = {"power": 2, "scale": 0.5, "reduction": "mean"}
_PRESETS: dict[str, dict[str, Any]] = {
    "pml": {"normalize": True},
    "sentence_transformers": {**_HALF_SQUARES, "distance": "cosine", "neg_margin": 0.5},
    "tensorflow_addons": {"power": 2, "reduction": "mean"},
    "hadsell": _HALF_SQUARES,
    "caffe_legacy": {"distance": "sqeuclidean", "scale": 0.5, "reduction": "mean"},
    "tum": {"distance": "sqeuclidean", "reduction": "mean"},
    "carlevaris": {"distance": "sqeuclidean", "reduction": "mean"},
    "fracking": {"neg_margin": 4.0, "reduction": "mean"},
    "hoffer": {"power": 2, "reduction": "mean"},
    "deepid2": _HALF_SQUARES,
    "deepid2_l1": {**_HALF_SQUARES, "distance": "cityblock"},
    "radenovic": {**_HALF_SQUARES, "neg_margin": 0.7, "reduction": "sum"},
}


class ContrastiveLoss(Loss):
    """Contrastive loss over all pairs.

    The hyper-parameters are those of :func:`flashmetric.functional.contrastive_loss`, which defines
    the loss. They are plain attributes: nothing is learned, and the state dict is empty.

    Args:
        pos_margin: distance below which a positive pair costs nothing.
        neg_margin: distance above which a negative pair costs nothing.
        distance: a name or a distance with parameters, see :mod:`flashmetric.distances`.
        power: 1 for the hinge, 2 for its square.
        scale: factor on every pair.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Presets:
        With D the distance, m the margin, ``+`` for positive and ``-`` for negative pairs. Means
        are over all pairs, and m is 1, unless told. Of squared distances m is given squared.

        - ``"pml"``, pytorch-metric-learning: + D, - (m - D)₊ of unit rows, means over pairs above 0
        - ``"sentence_transformers"``: + D²/2, - (m - D)₊²/2 of the cosine distance, m = 0.5
        - ``"tensorflow_addons"``: + D², - (m - D)₊²
        - ``"hadsell"``, Hadsell, Chopra, LeCun, CVPR 2006, and Caffe: + D²/2, - (m - D)₊²/2
        - ``"caffe_legacy"``, Caffe's ``legacy_version``, the "alternative form" of Bui et al., who
          credit it to Chopra: + D²/2, - (m - D²)₊/2
        - ``"tum"``, lectures of Leal-Taixe and Niessner: + D², - (m² - D²)₊; ``neg_margin`` is m²
        - ``"carlevaris"``, Carlevaris-Bianco and Eustice, IROS 2014: + s D², - (1 - D²)₊; pass
          weights s of the anchors as ``pos_weight``, of single pairs by
          :func:`flashmetric.functional.labelled_pairs`
        - ``"fracking"``, Simo-Serra et al., ICCV 2015: + D, - (m - D)₊, m = 4
        - ``"hoffer"``, the Siamese baseline of Hoffer and Ailon: + D², - (m - D)₊²
        - ``"deepid2"``, Sun et al., NIPS 2014: "hadsell"; multiply by its weight beside the
          identification loss
        - ``"deepid2_l1"``: the same of the L1 norm
        - ``"radenovic"``, Radenović et al., ECCV 2016: "hadsell" as a sum, m = 0.7, for unit rows

    Example:
        >>> from flashmetric import ContrastiveLoss
        >>> ContrastiveLoss(neg_margin=0.5).neg_margin
        0.5
        >>> ContrastiveLoss.preset("sentence_transformers").distance
        'cosine'
    """

    function = staticmethod(contrastive_loss)
    check = staticmethod(check_contrastive_options)
    presets = _PRESETS

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        *,
        distance: Distance | Metric = "euclidean",
        power: Power = 1,
        scale: float = 1.0,
        reduction: PairReduction = "mean_nonzero",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            pos_margin=pos_margin,
            neg_margin=neg_margin,
            distance=distance,
            power=power,
            scale=scale,
            reduction=reduction,
            normalize=normalize,
        )
        self.pos_margin = float(pos_margin)
        self.neg_margin = float(neg_margin)
        self.scale = float(scale)

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
        *,
        pos_weight: float | Tensor = 1.0,
    ) -> Tensor:
        """See :func:`flashmetric.functional.contrastive_loss`."""
        return contrastive_loss(
            embeddings,
            labels,
            pos_weight=pos_weight,
            ref_emb=ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
            **self._arguments(),
        )

    def extra_repr(self) -> str:
        """Hyper-parameters, as the constructor takes them."""
        return (
            f"{self.pos_margin}, {self.neg_margin}, distance={self.distance!r}, "
            f"power={self.power}, scale={self.scale}, reduction={self.reduction!r}, "
            f"normalize={self.normalize}"
        )
