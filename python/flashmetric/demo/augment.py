# SPDX-License-Identifier: Apache-2.0
"""Small random distortions of the training images."""

import math

import torch
from torch import Tensor
from torch.nn import functional

_ROTATION = math.radians(12)
_STRETCH = 0.12
_SHIFT = 0.12


def distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Turn, stretch and move each image a little.

    Args:
        images: uint8 images [N, 1, H, W].
        generator: Source of the random numbers.

    Returns:
        float32 images [N, 1, H, W] with the same range of values, 0 beyond the border.
    """

    def draw(limit: float) -> Tensor:
        return (torch.rand(len(images), generator=generator) * 2 - 1) * limit

    angle, wide, high = draw(_ROTATION), 1 + draw(_STRETCH), 1 + draw(_STRETCH)
    rows = [
        angle.cos() * wide, -angle.sin() * high, draw(_SHIFT),
        angle.sin() * wide, angle.cos() * high, draw(_SHIFT),
    ]  # fmt: skip
    affine = torch.stack(rows, 1).reshape(-1, 2, 3)
    grid = functional.affine_grid(affine, list(images.shape), align_corners=False)
    return functional.grid_sample(images.float(), grid, align_corners=False)
