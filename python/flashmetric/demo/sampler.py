# SPDX-License-Identifier: Apache-2.0
"""Class-balanced batches: P classes with K images each."""

from collections.abc import Iterator

import torch
from torch import Tensor

from flashmetric.demo.errors import DemoError


def epoch_seed(seed: int, epoch: int) -> int:
    """Return the seed of one epoch's random numbers, the same in a resumed run."""
    return seed * 1_000_003 + epoch


class BalancedSampler:
    """Draws batches of P distinct classes with K distinct images of each.

    Within an epoch every class is dealt out like a shuffled pack of cards: no image comes twice
    before the class is used up. An epoch depends on the seed and its own number only, so a run
    that is resumed draws the batches that the uninterrupted run would have drawn.

    Args:
        labels: Labels [N] of the training images.
        classes: P, the number of classes in a batch.
        images: K, the number of images of each class in a batch.
        seed: Seed of the draws.

    Raises:
        DemoError: If there are fewer than P classes, or a class has fewer than K images.
    """

    def __init__(self, labels: Tensor, classes: int, images: int, seed: int) -> None:
        """Group the images by class."""
        self.classes, self.images, self.seed = classes, images, seed
        self.members = [
            torch.nonzero(labels == label).flatten() for label in sorted(set(labels.tolist()))
        ]
        if len(self.members) < classes:
            raise DemoError(
                f"--batch {classes}x{images}: the training images have "
                f"only {len(self.members)} classes"
            )
        smallest = min(len(group) for group in self.members)
        if smallest < images:
            raise DemoError(
                f"--batch {classes}x{images}: the smallest class has only {smallest} images"
            )

    def batches_per_pass(self) -> int:
        """Return how many batches come nearest to one pass over the images."""
        total = sum(len(group) for group in self.members)
        return max(1, round(total / (self.classes * self.images)))

    def epoch(self, number: int, batches: int) -> Iterator[Tensor]:
        """Yield the index tensors [P*K] of one epoch.

        Args:
            number: Number of the epoch, which selects the random stream.
            batches: How many batches to draw.
        """
        generator = torch.Generator().manual_seed(epoch_seed(self.seed, number))
        packs = [group[:0] for group in self.members]
        for _ in range(batches):
            chosen = torch.randperm(len(self.members), generator=generator)[: self.classes]
            hands = []
            for group in chosen.tolist():
                if len(packs[group]) < self.images:
                    members = self.members[group]
                    packs[group] = members[torch.randperm(len(members), generator=generator)]
                hands.append(packs[group][: self.images])
                packs[group] = packs[group][self.images :]
            yield torch.cat(hands)
