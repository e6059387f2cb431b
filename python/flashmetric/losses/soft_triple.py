# SPDX-License-Identifier: Apache-2.0
"""SoftTriple loss with its centres."""

import torch
from torch import Tensor, nn

from flashmetric import functional as F
from flashmetric.functional import soft_triple
from flashmetric.functional.softmax_rows import Reduction
from flashmetric.losses.base import Loss


class SoftTripletLoss(Loss):
    """SoftTriple loss, see :func:`flashmetric.functional.soft_triple_loss`.

    The centres are learned along with the network, by the authors 100 times as fast. They begin in
    random directions.

    Args:
        num_classes: C; labels are 0 to C - 1.
        embedding_size: D, the size of a row.
        centers_per_class: K.
        la: scale of the logits.
        gamma: temperature of the softmax over the centres of a class.
        margin: what the similarity to the own class is reduced by.
        tau: weight of the regulariser; pytorch-metric-learning has none by default.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.

    Example:
        >>> import torch
        >>> from flashmetric import SoftTripletLoss
        >>> loss = SoftTripletLoss(num_classes=5, embedding_size=8, centers_per_class=3)
        >>> loss(torch.randn(4, 8), torch.tensor([0, 4, 4, 2])).backward()
        >>> loss.centers.grad.shape
        torch.Size([5, 3, 8])
    """

    function = staticmethod(F.soft_triple_loss)
    check = staticmethod(soft_triple.check_soft_triple_options)

    centers: Tensor

    def __init__(
        self,
        num_classes: int,
        embedding_size: int,
        *,
        centers_per_class: int = 10,
        la: float = 20.0,
        gamma: float = 0.1,
        margin: float = 0.01,
        tau: float = 0.2,
        reduction: Reduction = "mean",
    ) -> None:
        """Check and store the hyper-parameters, and draw the centres."""
        for name, size in (
            ("num_classes", num_classes),
            ("embedding_size", embedding_size),
            ("centers_per_class", centers_per_class),
        ):
            if not isinstance(size, int) or isinstance(size, bool):
                raise TypeError(f"{name} must be an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name} must be above 0, got {size}")
        super().__init__(
            centers=nn.Parameter(torch.randn(num_classes, centers_per_class, embedding_size)),
            la=la,
            gamma=gamma,
            margin=margin,
            tau=tau,
            reduction=reduction,
        )


SoftTripleLoss = SoftTripletLoss
"""The name that the paper uses."""
