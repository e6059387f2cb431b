# SPDX-License-Identifier: Apache-2.0
"""Losses on the ranking of each anchor's pairs, and on the hardest of them."""

from flashmetric.distances import Metric
from flashmetric.functional import fast_ap, quadruplet
from flashmetric.functional.anchor_reduction import Reduction
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance


class FastAPLoss(Loss):
    """One minus the average precision, from soft histograms of squared distances.

    See :func:`flashmetric.functional.fast_ap_loss`.

    Args:
        bins: number of bins that divide the squared distances, 0 to 4.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import FastAPLoss
        >>> FastAPLoss(16).bins
        16
    """

    function = staticmethod(fast_ap.fast_ap_loss)
    check = staticmethod(fast_ap.check_fast_ap_options)

    def __init__(
        self,
        bins: int = 10,
        *,
        reduction: fast_ap.Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            bins=bins,
            reduction=reduction,
        )


class QuadrupletLoss(Loss):
    """A triplet loss, and positives nearer than pairs of two other classes.

    See :func:`flashmetric.functional.quadruplet_loss`.

    Args:
        margin: of the triplets.
        pair_margin: of positives against pairs of other classes.
        class_size: largest number of rows of one class; None to count.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"rdml"``, distances and margins of Revisiting Deep Metric Learning.

    Example:
        >>> from flashmetric import QuadrupletLoss
        >>> QuadrupletLoss.preset("rdml").distance
        'euclidean'
    """

    function = staticmethod(quadruplet.quadruplet_loss)
    check = staticmethod(quadruplet.check_quadruplet_options)
    presets = {"rdml": {"distance": "euclidean", "normalize": True}}

    def __init__(
        self,
        margin: float = 0.2,
        *,
        pair_margin: float = 0.2,
        class_size: int | None = None,
        distance: Distance | Metric = "sqeuclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            margin=margin,
            pair_margin=pair_margin,
            class_size=class_size,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )
