# SPDX-License-Identifier: Apache-2.0
"""The pointwise functions of a pair for the PyTorch implementations: every formula once.

A pair contributes f(z) with z = scale * distance + offset. The native library has the same
functions in ``formula.h``.
"""

from typing import Literal

import torch
from torch import Tensor

Formula = Literal[
    "none",
    "linear",
    "square",
    "hinge",
    "squared_hinge",
    "softplus",
    "exp",
    "squared_sigmoid",
]
Logit = Literal["none", "affine", "circle"]


def term(z: Tensor, formula: str) -> tuple[Tensor, Tensor]:
    """f(z) and its derivative; NaN where z is NaN."""
    if formula == "linear":
        return z, torch.ones_like(z).masked_fill_(z.isnan(), torch.nan)
    if formula == "square":
        return z * z, 2 * z
    if formula == "hinge":
        return z.relu(), (z > 0).to(z.dtype).masked_fill_(z.isnan(), torch.nan)
    if formula == "squared_hinge":
        hinge = z.relu()
        return hinge * hinge, 2 * hinge
    if formula == "softplus":
        # Not torch's softplus, which is only approximate above its threshold.
        return torch.logaddexp(z, torch.zeros_like(z)), z.sigmoid()
    if formula == "exp":
        value = z.exp()
        return value, value
    if formula == "squared_sigmoid":
        sigmoid = z.sigmoid()
        square = sigmoid * sigmoid
        return square, 2 * square * (1 - sigmoid)
    return torch.zeros_like(z), torch.zeros_like(z)


def logit(z: Tensor, form: str, shape: float) -> tuple[Tensor, Tensor]:
    """l(z) of a log-sum-exp and its derivative.

    The weight of a circle logit counts as a constant in the derivative, by definition.
    """
    if form == "circle":
        weight = (z + shape).relu()
        return weight * (z - shape), weight
    return z, torch.ones_like(z)
