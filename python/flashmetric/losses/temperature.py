# SPDX-License-Identifier: Apache-2.0
"""A temperature that can be learned without ever reaching 0."""

import math

import torch
from torch import Tensor, nn

from flashmetric.checks import check_positive
from flashmetric.ops.distance import accumulate_dtype

__all__ = ["LearnedTemperature"]


class LearnedTemperature(nn.Module):
    r"""A temperature learned through its logarithm: ``temperature=`` of any softmax loss.

    .. math:: T = 1 / \min(e^{\text{logit\_scale}}, \text{max\_scale})

    A step of the optimiser may take a temperature that is a parameter itself to 0 and below, where
    the loss means nothing. This one stays above one over ``max_scale``, as CLIP's does; its
    gradient passes beyond the limit, so that it finds its way back.

    Args:
        start: the temperature at first.
        max_scale: limit of one over the temperature.

    Raises:
        TypeError: an argument is no number.
        ValueError: an argument is not above 0.

    Example:
        >>> import torch
        >>> from flashmetric import LearnedTemperature, SupConLoss
        >>> loss = SupConLoss(LearnedTemperature(0.1))
        >>> loss(torch.eye(3), torch.tensor([0, 0, 1])).backward()
        >>> [name for name, _ in loss.named_parameters()]
        ['temperature.logit_scale']

    Source:
        A. Radford et al.: Learning Transferable Visual Models From Natural Language Supervision,
        ICML 2021.
    """

    def __init__(self, start: float = 0.07, *, max_scale: float = 100.0) -> None:
        """Check and store the start and the limit."""
        super().__init__()
        check_positive("start", start)
        check_positive("max_scale", max_scale)
        self.logit_scale = nn.Parameter(torch.tensor(-math.log(start)))
        self.max_scale = float(max_scale)

    def forward(self) -> Tensor:
        """The temperature, shape []."""
        # Also of a module in half precision: the exponential would be rounded once more.
        scale = self.logit_scale.to(accumulate_dtype(self.logit_scale.dtype))
        excess = (scale - math.log(self.max_scale)).clamp(min=0).detach()
        return (excess - scale).exp()

    def extra_repr(self) -> str:
        """The limit."""
        return f"max_scale={self.max_scale}"
