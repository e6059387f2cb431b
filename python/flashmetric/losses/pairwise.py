# SPDX-License-Identifier: Apache-2.0
"""Losses that add up a function of the distance of each pair, as modules."""

from flashmetric.distances import Metric
from flashmetric.functional import cosine_pairs, deviance, distance_pairs, snr
from flashmetric.functional.pair_reduction import PairReduction
from flashmetric.functional.similarity import Similarity
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance


class ExponentialContrastiveLoss(Loss):
    """Contrastive loss with an exponential repulsion, of Chopra, Hadsell and LeCun.

    The loss is :func:`flashmetric.functional.exponential_contrastive_loss`.

    Args:
        q: upper bound of the distance; no default.
        distance: ``"cityblock"`` as in the paper, ``"euclidean"``, or another one.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import ExponentialContrastiveLoss
        >>> ExponentialContrastiveLoss(q=2.0).distance
        'cityblock'
    """

    function = staticmethod(distance_pairs.exponential_contrastive_loss)
    check = staticmethod(distance_pairs.check_exponential_options)

    def __init__(
        self,
        q: float,
        *,
        distance: Distance | Metric = "cityblock",
        reduction: PairReduction = "sum",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(q=q, distance=distance, reduction=reduction, normalize=normalize)


class LogisticDistanceLoss(Loss):
    """Logistic loss on squared distances, of discriminative deep metric learning (DDML).

    The loss is :func:`flashmetric.functional.logistic_distance_loss`.

    Args:
        tau: threshold on the distance, above 1.
        beta: sharpness.
        distance: ``"sqeuclidean"``, or another one.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import LogisticDistanceLoss
        >>> LogisticDistanceLoss(beta=2.0).tau
        3.0
    """

    function = staticmethod(distance_pairs.logistic_distance_loss)
    check = staticmethod(distance_pairs.check_logistic_options)

    def __init__(
        self,
        tau: float = 3.0,
        beta: float = 1.0,
        *,
        distance: Distance | Metric = "sqeuclidean",
        reduction: PairReduction = "sum",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            tau=tau, beta=beta, distance=distance, reduction=reduction, normalize=normalize
        )


class CosineTargetLoss(Loss):
    """Squared error of the cosine to a target of each kind of pair, after Bromley et al.

    The loss is :func:`flashmetric.functional.cosine_target_loss`.

    Args:
        pos_target: cosine of positive pairs.
        neg_target: cosine of negative pairs; 0 for more than two classes.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import CosineTargetLoss
        >>> CosineTargetLoss(neg_target=0.0).pos_target
        1.0
    """

    function = staticmethod(cosine_pairs.cosine_target_loss)
    check = staticmethod(cosine_pairs.check_cosine_target_options)

    def __init__(
        self,
        pos_target: float = 1.0,
        neg_target: float = -1.0,
        *,
        reduction: PairReduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(pos_target=pos_target, neg_target=neg_target, reduction=reduction)


class CosineEmbeddingLoss(Loss):
    """``torch.nn.CosineEmbeddingLoss`` over all pairs.

    The loss is :func:`flashmetric.functional.cosine_embedding_loss`.

    Args:
        margin: cosine below which a negative pair costs nothing.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import CosineEmbeddingLoss
        >>> CosineEmbeddingLoss().margin
        0.0
    """

    function = staticmethod(cosine_pairs.cosine_embedding_loss)
    check = staticmethod(cosine_pairs.check_cosine_margin_options)

    def __init__(self, margin: float = 0.0, *, reduction: PairReduction = "mean") -> None:
        """Check and store the hyper-parameters."""
        super().__init__(margin=margin, reduction=reduction)


class CosineContrastiveLoss(Loss):
    """Contrastive loss on cosines as HORDE and ABE use it.

    The loss is :func:`flashmetric.functional.cosine_contrastive_loss`.

    Args:
        margin: cosine below which a negative pair costs nothing.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import CosineContrastiveLoss
        >>> CosineContrastiveLoss().margin
        0.5
    """

    function = staticmethod(cosine_pairs.cosine_contrastive_loss)
    check = staticmethod(cosine_pairs.check_cosine_margin_options)

    def __init__(self, margin: float = 0.5, *, reduction: PairReduction = "mean_nonzero") -> None:
        """Check and store the hyper-parameters."""
        super().__init__(margin=margin, reduction=reduction)


class BinomialDevianceLoss(Loss):
    """Binomial deviance of cosines.

    The loss is :func:`flashmetric.functional.binomial_deviance_loss`.

    Args:
        alpha: steepness.
        beta: similarity that separates positives from negatives.
        cost: how much steeper negatives are.
        distance: ``"cosine"`` or ``"dot"``, which is minus the similarity.
        reduction: ``"mean_separate"``, ``"bier"``, ``"horde"``, ``"mean"``, ``"mean_nonzero"``,
            ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import BinomialDevianceLoss
        >>> BinomialDevianceLoss(cost=10.0).alpha
        2.0
    """

    function = staticmethod(deviance.binomial_deviance_loss)
    check = staticmethod(deviance.check_deviance_options)

    def __init__(
        self,
        alpha: float = 2.0,
        beta: float = 0.5,
        cost: float = 25.0,
        *,
        distance: Similarity = "cosine",
        reduction: deviance.DevianceReduction = "mean_separate",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            alpha=alpha,
            beta=beta,
            cost=cost,
            distance=distance,
            reduction=reduction,
            normalize=normalize,
        )


class SNRContrastiveLoss(Loss):
    """Contrastive loss on signal-to-noise ratios.

    The loss is :func:`flashmetric.functional.snr_contrastive_loss`.

    Args:
        pos_margin: ratio below which a positive pair costs nothing.
        neg_margin: ratio above which a negative pair costs nothing.
        regularization: weight of the mean magnitude of the rows' sums.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Presets:
        ``"pml"``, pytorch-metric-learning, which has no regulariser.

    Example:
        >>> from flashmetric import SNRContrastiveLoss
        >>> SNRContrastiveLoss.preset("pml").regularization
        0.0
    """

    function = staticmethod(snr.snr_contrastive_loss)
    check = staticmethod(snr.check_snr_options)
    presets = {"pml": {"regularization": 0.0}}

    def __init__(
        self,
        pos_margin: float = 0.0,
        neg_margin: float = 1.0,
        regularization: float = 0.005,
        *,
        reduction: PairReduction = "mean_nonzero",
        normalize: bool = True,
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(
            pos_margin=pos_margin,
            neg_margin=neg_margin,
            regularization=regularization,
            reduction=reduction,
            normalize=normalize,
        )
