# SPDX-License-Identifier: Apache-2.0
"""The training loop, with the time of the encoder and of the loss measured apart."""

import math
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Protocol, cast

import torch
from torch import Tensor, nn

from flashmetric.demo.augment import distort
from flashmetric.demo.data import ImageSet
from flashmetric.demo.errors import DemoError
from flashmetric.demo.network import EmbeddingNetwork


class Progress(Protocol):
    """The part of a tqdm bar that training uses."""

    def update(self, n: int = 1) -> object:
        """Advance the bar."""

    def set_postfix_str(self, s: str) -> object:
        """Show a text behind the bar."""


@dataclass
class StepTimes:
    """Seconds of each step."""

    encoder: list[float] = field(default_factory=list)
    loss: list[float] = field(default_factory=list)

    def medians_ms(self) -> tuple[float, float]:
        """Return the medians of encoder and loss in milliseconds."""
        return median(self.encoder) * 1e3, median(self.loss) * 1e3


def cosine_rate(lr: float, step: int, total: int) -> float:
    """Return the learning rate of a step: half a cosine wave from ``lr`` down to zero."""
    return lr * 0.5 * (1 + math.cos(math.pi * step / total))


def train_epoch(
    network: EmbeddingNetwork,
    loss_function: nn.Module,
    optimizer: torch.optim.Optimizer,
    data: ImageSet,
    batches: Iterator[Tensor],
    rates: Iterator[float],
    generator: torch.Generator,
    times: StepTimes,
    progress: Progress,
) -> float:
    """Train on the given batches.

    Args:
        network: The network, changed in place.
        loss_function: Maps embeddings and labels to a scalar.
        optimizer: Optimizer of the network's parameters.
        data: Training images.
        batches: Index tensors into ``data``.
        rates: Learning rate of each step.
        generator: Source of the distortions.
        times: Receives the time of each step; drawing and distorting the images is not in it.
        progress: Bar to advance.

    Returns:
        Mean loss over the batches.

    Raises:
        DemoError: If the loss is not finite any more.
    """
    network.train()
    values = []
    for index, rate in zip(batches, rates, strict=True):
        for group in optimizer.param_groups:
            group["lr"] = rate
        images = distort(data.images[index], generator)
        start = time.perf_counter()
        embeddings = cast(Tensor, network(images))
        encoded = time.perf_counter()
        # Cutting the graph here gives the same gradients and lets the loss be timed by itself.
        leaf = embeddings.detach().requires_grad_()
        loss = loss_function(leaf, data.labels[index])
        torch.autograd.backward(loss)
        scored = time.perf_counter()
        optimizer.zero_grad()
        torch.autograd.backward(embeddings, leaf.grad)
        optimizer.step()
        done = time.perf_counter()
        value = float(loss.detach())
        if not math.isfinite(value):
            raise DemoError(f"the loss became {value}; try a smaller --lr")
        values.append(value)
        times.encoder.append(encoded - start + done - scored)
        times.loss.append(scored - encoded)
        progress.update()
        progress.set_postfix_str(f"loss {value:.4f}")
    return sum(values) / len(values)
