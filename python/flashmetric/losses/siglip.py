# SPDX-License-Identifier: Apache-2.0
"""The sigmoid loss of two towers as a module."""

import math

import torch
from torch import nn

from flashmetric.checks import check_number, check_positive
from flashmetric.functional.siglip import SigLIPReduction, check_siglip_options, siglip_loss
from flashmetric.functional.similarity import Similarity
from flashmetric.losses.base import Loss


class SigLIPLoss(Loss):
    """Sigmoid loss of two towers, with learned ``log_scale`` and ``bias``.

    The loss is :func:`flashmetric.functional.siglip_loss`: call it with the rows of one tower and
    ``ref_emb``, those of the other.

    Args:
        scale: what the similarities are multiplied by, at first; its logarithm is learned.
        bias: what is added to that, at first.
        distance: ``"cosine"`` or ``"dot"``, which is minus the similarity.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        normalize: scale rows to unit length first.

    Example:
        >>> from flashmetric import SigLIPLoss
        >>> SigLIPLoss().bias.item()
        -10.0
    """

    function = staticmethod(siglip_loss)
    check = staticmethod(check_siglip_options)

    def __init__(
        self,
        scale: float = 10.0,
        bias: float = -10.0,
        *,
        distance: Similarity = "cosine",
        reduction: SigLIPReduction = "mean",
        normalize: bool = False,
    ) -> None:
        """Check and store the hyper-parameters."""
        check_positive("scale", scale)
        check_number("bias", bias)
        super().__init__(
            log_scale=nn.Parameter(torch.tensor(math.log(scale))),
            bias=nn.Parameter(torch.tensor(float(bias))),
            distance=distance,
            reduction=reduction,
            normalize=normalize,
        )
