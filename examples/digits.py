# SPDX-License-Identifier: Apache-2.0
"""What the examples share: images of digits, an encoder, class-balanced batches, a fair score.

The images are scikit-learn's 1797 handwritten digits of 8x8 pixels, which come with that package.
Of each class the last 30 % are held out: no example trains on them, and all are scored on them.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from flashmetric.demo.data import ImageSet, Split, load_digits
from flashmetric.demo.evaluation import retrieval_scores
from flashmetric.demo.network import EmbeddingNetwork, embed
from flashmetric.demo.sampler import BalancedSampler

__all__ = ["BalancedBatches", "Scores", "arguments", "encoder", "evaluate", "load_digits"]
__all__ += ["loader", "require_better"]


def arguments(description: str | None) -> argparse.ArgumentParser:
    """Return the options that every example has; give it the script's ``__doc__``."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="train for a few seconds only")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def encoder(split: Split, dim: int = 64) -> EmbeddingNetwork:
    """Return a small convolutional network: uint8 images [N, 1, 8, 8] to unit rows [N, dim]."""
    height, width = split.train.images.shape[2:]
    return EmbeddingNetwork(height, width, dim, *split.pixel_statistics())


class BalancedBatches:
    """Batches of P classes with K images each: a ``batch_sampler``. Each pass draws others.

    Args:
        data: what to draw from.
        classes: P.
        images: K.
        batches: how many batches make a pass.
        seed: seed of the draws.
    """

    def __init__(self, data: ImageSet, classes: int, images: int, batches: int, seed: int) -> None:
        """Group the images by class."""
        self.sampler = BalancedSampler(data.labels, classes, images, seed)
        self.batches = batches
        self.passes = 0

    def __len__(self) -> int:
        """Return how many batches make a pass."""
        return self.batches

    def __iter__(self) -> Iterator[list[int]]:
        """Yield the positions of a pass."""
        drawn = self.sampler.epoch(self.passes, self.batches)
        self.passes += 1
        return (index.tolist() for index in drawn)


def loader(
    data: ImageSet, *, batches: int, seed: int, classes: int = 10, images: int = 16
) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Return a loader of class-balanced batches (images, labels)."""
    sampler = BalancedBatches(data, classes, images, batches, seed)
    return DataLoader(TensorDataset(data.images, data.labels), batch_sampler=sampler)


class Scores(NamedTuple):
    """Recall@1 and MAP@R of held-out images that query each other, both from 0 to 1."""

    recall_at_1: float
    map_at_r: float

    def __str__(self) -> str:
        """Return both as a line of a report shows them."""
        return f"recall@1 {self.recall_at_1:.4f}  MAP@R {self.map_at_r:.4f}"


def evaluate(model: nn.Module, data: ImageSet, device: str | torch.device = "cpu") -> Scores:
    """Score a model that embeds images, in evaluation mode."""
    rows = embed(model, data.images.to(device)).float().cpu()
    recall_at_1, _, map_at_r = retrieval_scores(rows, data.labels)
    return Scores(recall_at_1, map_at_r)


def require_better(before: Scores, after: Scores) -> None:
    """Report both scores, and exit with an error unless training has raised them.

    Recall@1 of such easy images begins near its limit, so MAP@R is what must rise well.
    """
    print(f"before  {before}\nafter   {after}")
    if not (after.recall_at_1 >= before.recall_at_1 and after.map_at_r > before.map_at_r + 0.1):
        sys.exit("training did not raise the scores of the held-out images")
