# SPDX-License-Identifier: Apache-2.0
"""A small convolutional embedding network, applied alike to every image of a pair or triplet."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional

_WIDTHS = (16, 32, 64)
_EMBED_CHUNK = 1024


class EmbeddingNetwork(nn.Module):
    """Three convolution blocks and a linear layer onto the unit sphere.

    Args:
        height: Height of the images in pixels, at least 8.
        width: Width of the images in pixels, at least 8.
        dim: Number of features of an embedding.
        mean: Mean of the training pixels scaled to 0..1.
        std: Standard deviation of the training pixels scaled to 0..1.
    """

    pixel_mean: Tensor
    pixel_std: Tensor

    def __init__(self, height: int, width: int, dim: int, mean: float, std: float) -> None:
        """Build the layers; weights come from the current random state."""
        super().__init__()
        self.register_buffer("pixel_mean", torch.tensor(mean))
        self.register_buffer("pixel_std", torch.tensor(std))
        layers: list[nn.Module] = []
        channels = 1
        for block_width in _WIDTHS:
            layers += [
                nn.Conv2d(channels, block_width, 3, padding=1, bias=False),
                nn.BatchNorm2d(block_width),
                nn.ReLU(),
            ]
            channels = block_width
            # 8x8 images have no room for a third pooling step.
            if min(height, width) >= 4:
                layers.append(nn.MaxPool2d(2))
                height, width = height // 2, width // 2
        self.features = nn.Sequential(*layers)
        # Centred features spread over the sphere from the first step. Without it all rows start out
        # close together, where the batch-hard triplet loss tends to get stuck at its margin.
        self.project = nn.Sequential(
            nn.Linear(channels * height * width, dim, bias=False),
            nn.BatchNorm1d(dim, affine=False),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed images [N, 1, H, W] with values 0..255 as rows [N, dim] of length one."""
        pixels = (images.float() / 255 - self.pixel_mean) / self.pixel_std
        features = self.features(pixels.contiguous(memory_format=torch.channels_last))
        return functional.normalize(self.project(features.flatten(1)))

    def parameter_count(self) -> int:
        """Return the number of trained values."""
        return sum(parameter.numel() for parameter in self.parameters())


@torch.no_grad()
def embed(network: EmbeddingNetwork, images: Tensor) -> Tensor:
    """Embed any number of images in evaluation mode, a chunk at a time."""
    was_training = network.training
    network.eval()
    starts = range(0, len(images), _EMBED_CHUNK)
    rows = [cast(Tensor, network(images[start : start + _EMBED_CHUNK])) for start in starts]
    network.train(was_training)
    return torch.cat(rows)
