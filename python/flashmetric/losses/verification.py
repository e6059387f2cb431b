# SPDX-License-Identifier: Apache-2.0
"""Verification losses as modules: learned decisions, and scores of a network of yours."""

import torch
from torch import Tensor, nn

from flashmetric.checks import check_number
from flashmetric.functional import verification
from flashmetric.functional.labelled_pairs import LabelConvention
from flashmetric.functional.pair_hinge import (
    HingeReduction,
    check_pair_hinge_options,
    pair_hinge_loss,
)
from flashmetric.functional.pair_reduction import PairReduction
from flashmetric.functional.similarity import Similarity
from flashmetric.losses.base import Loss


class SigmoidVerificationLoss(Loss):
    """Squared error of a learned logistic decision on the cosine, of DeepID2.

    The loss is :func:`flashmetric.functional.sigmoid_verification_loss`.

    Args:
        weight: what the cosine is multiplied by, at first; learned. It should begin above 0.
        bias: what is added to that, at first; learned.
        distance: ``"cosine"`` or ``"dot"``, which is minus the similarity.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import SigmoidVerificationLoss
        >>> SigmoidVerificationLoss(weight=5.0).weight.item()
        5.0
    """

    function = staticmethod(verification.sigmoid_verification_loss)
    check = staticmethod(verification.check_sigmoid_options)

    def __init__(
        self,
        weight: float = 1.0,
        bias: float = 0.0,
        *,
        distance: Similarity = "cosine",
        reduction: PairReduction = "mean",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        check_number("weight", weight)
        check_number("bias", bias)
        super().__init__(
            weight=nn.Parameter(torch.tensor(float(weight))),
            bias=nn.Parameter(torch.tensor(float(bias))),
            distance=distance,
            reduction=reduction,
            normalize=normalize,
        )


class VerificationLoss(Loss):
    """Cross-entropy of a learned logistic regression on the differences of two rows.

    The loss is :func:`flashmetric.functional.verification_loss`. The ``weight`` of every feature
    begins as one over their number, the ``bias`` as 0; both are learned.

    Args:
        features: D, the size of a row.
        distance: ``"cityblock"`` for magnitudes of differences, ``"chi2"`` for their squares over
            the sums, of features that are not negative.
        reduction: ``"mean"``, ``"mean_separate"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> from flashmetric import VerificationLoss
        >>> VerificationLoss(4).weight
        Parameter containing:
        tensor([0.2500, 0.2500, 0.2500, 0.2500], requires_grad=True)
    """

    function = staticmethod(verification.verification_loss)
    check = staticmethod(verification.check_verification_options)

    def __init__(
        self,
        features: int,
        *,
        distance: verification.Features = "cityblock",
        reduction: PairReduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        if not isinstance(features, int) or isinstance(features, bool) or features < 1:
            raise ValueError(f"features must be an integer from 1, got {features!r}")
        super().__init__(
            weight=nn.Parameter(torch.full((features,), 1 / features)),
            bias=nn.Parameter(torch.tensor(0.0)),
            distance=distance,
            reduction=reduction,
        )


class PairHingeLoss(Loss):
    """Hinge loss on the scores that a decision network gives pairs, of Zagoruyko and Komodakis.

    The loss is :func:`flashmetric.functional.pair_hinge_loss`; it is called with the scores and the
    labels of the pairs.

    Args:
        label_convention: ``"similar=0"``, ``"similar=1"`` or ``"similar=+1/-1"``; no default.
        margin: score that a similar pair should have, and a different one below 0.
        reduction: ``"mean"``, ``"mean_nonzero"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from flashmetric import PairHingeLoss
        >>> PairHingeLoss("similar=1")(torch.tensor([0.5]), torch.tensor([0])).item()
        1.5
    """

    function = staticmethod(pair_hinge_loss)
    check = staticmethod(check_pair_hinge_options)

    def __init__(
        self,
        label_convention: LabelConvention,
        margin: float = 1.0,
        *,
        reduction: HingeReduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters."""
        super().__init__(label_convention=label_convention, margin=margin, reduction=reduction)

    def forward(self, scores: Tensor, y: Tensor) -> Tensor:  # type: ignore[override]
        """See :func:`flashmetric.functional.pair_hinge_loss`."""
        return pair_hinge_loss(scores, y, **self._arguments())
