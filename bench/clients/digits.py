# SPDX-License-Identifier: Apache-2.0
"""Batches of handwritten digits and the encoders that embed them."""

from functools import cache
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashmetric.demo.augment import distort
from flashmetric.demo.data import load_split
from flashmetric.demo.network import EmbeddingNetwork


@cache
def images(folder: str | None) -> tuple[Tensor, Tensor, float, float]:
    """Training images and labels of the demo, with mean and deviation of their pixels."""
    split = load_split(Path(folder) if folder else None)
    return split.train.images, split.train.labels, *split.pixel_statistics()


class Batches:
    """Endless random batches of distorted digits, the same ones for the same seed.

    Args:
        rows: Rows of a batch.
        folder: Folder of IDX files; None for scikit-learn's digits.
        views: Two distorted views of each image, whose own number is the label.
        backwards: Rows of each batch in reverse order: the same batch, other rounding.
        seed: Of the random numbers.
    """

    def __init__(
        self,
        rows: int,
        folder: str | None = None,
        views: bool = False,
        backwards: bool = False,
        seed: int = 0,
    ) -> None:
        """Start at the first batch."""
        self.images, self.labels, *_ = images(folder)
        self.rows, self.views, self.backwards = rows, views, backwards
        self.generator = torch.Generator().manual_seed(seed)

    def __next__(self) -> tuple[Tensor, Tensor]:
        """Images [rows, 1, H, W] and labels [rows]."""
        count = self.rows // 2 if self.views else self.rows
        # Batches may be larger than the data: the distortions make all images different.
        chosen = torch.randint(len(self.images), (count,), generator=self.generator)
        labels = self.labels[chosen]
        if self.views:
            chosen, labels = chosen.repeat(2), torch.arange(count).repeat(2)
        rows = distort(self.images[chosen], self.generator)
        return (rows.flip(0), labels.flip(0)) if self.backwards else (rows, labels)


def network(features: int, folder: str | None, seed: int = 0) -> EmbeddingNetwork:
    """The demo's convolutional network with the initial weights of a seed."""
    torch.manual_seed(seed)
    rows, _, mean, deviation = images(folder)
    return EmbeddingNetwork(rows.shape[2], rows.shape[3], features, mean, deviation)


class WideNetwork(nn.Module):
    """A network whose activations are large: convolutions on images of 32 x 32.

    It has no batch normalisation, under which chunks of a batch are another function.

    Args:
        features: Features of an embedding.
    """

    def __init__(self, features: int) -> None:
        """Make the layers; weights come from the current random state."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(16, 32, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 64, 3, stride=2, padding=1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(1024, features),
        )

    def forward(self, rows: Tensor) -> Tensor:
        """Embeddings [N, D] of length one."""
        wide = functional.interpolate(rows / 255, size=(32, 32), mode="bilinear")
        return functional.normalize(self.layers(wide))
