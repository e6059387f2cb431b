# SPDX-License-Identifier: Apache-2.0
"""The margin loss as a module, with a boundary that may be learned."""

import torch
from torch import Tensor, nn

from flashmetric.checks import check_count, check_flag, check_number
from flashmetric.distances import Metric
from flashmetric.functional.margin import MarginReduction, check_margin_options, margin_loss
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance


class MarginLoss(Loss):
    """Margin loss of Wu, Manmatha, Smola and Krähenbühl.

    The loss is :func:`flashmetric.functional.margin_loss`.

    Args:
        margin: half the width of the gap.
        nu: weight of the regulariser of a learned beta; needs ``learn_beta``.
        beta: the boundary between positives and negatives, or where it begins.
        learn_beta: make beta a parameter. Give it a learning rate of its own (5e-4 is common).
        num_classes: learn one beta per class; labels then number the classes from 0. Needs
            ``learn_beta``.
        distance: ``"euclidean"``, or another one.
        reduction: ``"mean_nonzero"``, ``"mean"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import MarginLoss
        >>> MarginLoss(learn_beta=True, num_classes=3).beta.shape
        torch.Size([3])
    """

    function = staticmethod(margin_loss)
    check = staticmethod(check_margin_options)

    def __init__(
        self,
        margin: float = 0.2,
        nu: float = 0.0,
        beta: float = 1.2,
        *,
        learn_beta: bool = False,
        num_classes: int | None = None,
        distance: Distance | Metric = "euclidean",
        reduction: MarginReduction = "mean_nonzero",
        normalize: bool = True,
    ) -> None:
        """Check and store the hyper-parameters."""
        check_number("beta", beta)
        check_flag("learn_beta", learn_beta)
        check_number("nu", nu)
        if num_classes is not None:
            check_count("num_classes", num_classes)
        if not learn_beta and (num_classes is not None or nu != 0):
            name, got = ("num_classes", num_classes) if num_classes is not None else ("nu", nu)
            raise ValueError(
                f"learn_beta must be True with {name}, which is of a learned beta; got {name}={got}"
            )
        boundary: float | Tensor = float(beta)
        if learn_beta:
            shape = () if num_classes is None else (num_classes,)
            boundary = nn.Parameter(torch.full(shape, float(beta)))
        super().__init__(
            margin=margin,
            nu=nu,
            beta=boundary,
            distance=distance,
            reduction=reduction,
            normalize=normalize,
        )
