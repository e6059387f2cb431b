# SPDX-License-Identifier: Apache-2.0
"""Losses on log-sum-exps over each anchor's positives and negatives."""

from flashmetric.distances import Metric
from flashmetric.functional import (
    adaptive_triplet,
    lifted_structure,
    multi_similarity,
    nca,
    ranked_list,
)
from flashmetric.functional.anchor_reduction import Reduction
from flashmetric.functional.normalize import L2Power
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance


class MultiSimilarityLoss(Loss):
    """A soft maximum over positives and one over negatives per anchor.

    See :func:`flashmetric.functional.multi_similarity_loss`.

    Args:
        alpha: steepness for positives.
        beta: steepness for negatives.
        base: similarity at which a pair begins to cost.
        mining: keep only pairs that are not much easier than the hardest of the other kind.
        epsilon: slack of the mining.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"official"``, the authors' configuration; ``"pml"``, pytorch-metric-learning.

    Example:
        >>> from flashmetric import MultiSimilarityLoss
        >>> MultiSimilarityLoss.preset("official").beta
        40.0
    """

    function = staticmethod(multi_similarity.multi_similarity_loss)
    check = staticmethod(multi_similarity.check_multi_similarity_options)
    presets = {"official": {"beta": 40.0, "mining": True}, "pml": {"beta": 50.0}}

    def __init__(
        self,
        alpha: float = 2.0,
        *,
        beta: float = 50.0,
        base: float = 0.5,
        mining: bool = False,
        epsilon: float = 0.1,
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            alpha=alpha,
            beta=beta,
            base=base,
            mining=mining,
            epsilon=epsilon,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class LiftedStructureLoss(Loss):
    """Each positive pair against the negatives of both of its rows.

    See :func:`flashmetric.functional.lifted_structure_loss`.

    Args:
        neg_margin: margin of the negatives.
        pos_margin: margin of the positives.
        max_positives: how many positives of an anchor take part; None for all.
        l2: weight of the regulariser on the lengths of rows.
        l2_power: 2 for squared lengths, or 1.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"pml"``, pytorch-metric-learning: rows of unit length.

    Example:
        >>> from flashmetric import LiftedStructureLoss
        >>> LiftedStructureLoss.preset("pml").normalize
        True
    """

    function = staticmethod(lifted_structure.lifted_structure_loss)
    check = staticmethod(lifted_structure.check_lifted_structure_options)
    presets = {"pml": {"normalize": True}}

    def __init__(
        self,
        neg_margin: float = 1.0,
        *,
        pos_margin: float = 0.0,
        max_positives: int | None = None,
        l2: float = 0.0,
        l2_power: L2Power = 2,
        distance: Distance | Metric = "euclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            neg_margin=neg_margin,
            pos_margin=pos_margin,
            max_positives=max_positives,
            l2=l2,
            l2_power=l2_power,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class GeneralizedLiftedStructureLoss(Loss):
    """All positives of an anchor against all of its negatives.

    See :func:`flashmetric.functional.generalized_lifted_structure_loss`.

    Args:
        neg_margin: margin of the negatives.
        pos_margin: margin of the positives.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"pml"``, pytorch-metric-learning: rows of unit length.

    Example:
        >>> from flashmetric import GeneralizedLiftedStructureLoss
        >>> GeneralizedLiftedStructureLoss(0.5).neg_margin
        0.5
    """

    function = staticmethod(lifted_structure.generalized_lifted_structure_loss)
    check = staticmethod(lifted_structure.check_generalized_lifted_structure_options)
    presets = {"pml": {"normalize": True}}

    def __init__(
        self,
        neg_margin: float = 1.0,
        *,
        pos_margin: float = 0.0,
        distance: Distance | Metric = "euclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            neg_margin=neg_margin,
            pos_margin=pos_margin,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class AdaptiveWeightedTripletLoss(Loss):
    """Triplet loss between softmax-weighted mean distances of an anchor's pairs.

    See :func:`flashmetric.functional.adaptive_weighted_triplet_loss`.

    Args:
        margin: how much farther than the positives the negatives should be.
        smooth: softplus in place of the hinge.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import AdaptiveWeightedTripletLoss
        >>> AdaptiveWeightedTripletLoss(0.3).margin
        0.3
    """

    function = staticmethod(adaptive_triplet.adaptive_weighted_triplet_loss)
    check = staticmethod(adaptive_triplet.check_adaptive_weighted_triplet_options)

    def __init__(
        self,
        margin: float = 1.0,
        *,
        smooth: bool = False,
        distance: Distance | Metric = "euclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            margin=margin,
            smooth=smooth,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class RankedListLoss(Loss):
    """Positives within ``alpha - margin``, negatives beyond ``alpha``.

    See :func:`flashmetric.functional.ranked_list_loss`.

    Args:
        margin: width of the gap between positives and negatives.
        alpha: distance that negatives should have; None for 1 + margin / 2.
        neg_temperature: how strongly near negatives weigh more; 0 for alike.
        pos_temperature: how strongly far positives weigh more; 0 for alike.
        imbalance: share of the negatives, from 0 to 1.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import RankedListLoss
        >>> RankedListLoss(0.4, alpha=1.2).neg_temperature
        10.0
    """

    function = staticmethod(ranked_list.ranked_list_loss)
    check = staticmethod(ranked_list.check_ranked_list_options)

    def __init__(
        self,
        margin: float = 0.4,
        *,
        alpha: float | None = None,
        neg_temperature: float = 10.0,
        pos_temperature: float = 0.0,
        imbalance: float = 0.5,
        distance: Distance | Metric = "euclidean",
        normalize: bool = True,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            margin=margin,
            alpha=alpha,
            neg_temperature=neg_temperature,
            pos_temperature=pos_temperature,
            imbalance=imbalance,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )


class NCALoss(Loss):
    """Neighbourhood components analysis.

    See :func:`flashmetric.functional.nca_loss`.

    Args:
        softmax_scale: one over the temperature.
        form: ``"log"``, or ``"probability"`` as in the paper.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Presets:
        ``"pml"``, pytorch-metric-learning: rows of unit length.

    Example:
        >>> from flashmetric import NCALoss
        >>> NCALoss(form="probability").form
        'probability'
    """

    function = staticmethod(nca.nca_loss)
    check = staticmethod(nca.check_nca_options)
    presets = {"pml": {"normalize": True}}

    def __init__(
        self,
        softmax_scale: float = 1.0,
        *,
        form: nca.Form = "log",
        distance: Distance | Metric = "sqeuclidean",
        normalize: bool = False,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            softmax_scale=softmax_scale,
            form=form,
            distance=distance,
            normalize=normalize,
            reduction=reduction,
        )
