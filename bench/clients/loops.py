# SPDX-License-Identifier: Apache-2.0
"""A training loop of pytorch-metric-learning; what is imported is an argument."""

import importlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

import flashmetric
from bench.clients.digits import Batches, network
from bench.clients.session import Job, trained
from flashmetric.miners import MultiSimilarityMiner

_CHUNK = 1024

# As users write them: losses and miners are modules, one library's or the other's.
RECIPES: dict[str, Callable[[Any, Any], tuple[Any, Any]]] = {
    "TripletMarginLoss, BatchHardMiner": lambda losses, miners: (
        losses.TripletMarginLoss(),
        miners.BatchHardMiner(),
    ),
    "TripletMarginLoss, all triplets": lambda losses, miners: (losses.TripletMarginLoss(), None),
    "ContrastiveLoss": lambda losses, miners: (losses.ContrastiveLoss(), None),
    "MultiSimilarityLoss, MultiSimilarityMiner": lambda losses, miners: (
        losses.MultiSimilarityLoss(),
        miners.MultiSimilarityMiner(),
    ),
    "NTXentLoss": lambda losses, miners: (losses.NTXentLoss(), None),
    "SupConLoss": lambda losses, miners: (losses.SupConLoss(), None),
}

# The same functions by this package's own names, for its own memory.
NATIVE: dict[str, Callable[[], tuple[flashmetric.losses.Loss, Any]]] = {
    "TripletMarginLoss, BatchHardMiner": lambda: (
        flashmetric.TripletMarginLoss.preset("pml_batch_hard"),
        None,
    ),
    "TripletMarginLoss, all triplets": lambda: (flashmetric.TripletMarginLoss.preset("pml"), None),
    "ContrastiveLoss": lambda: (flashmetric.ContrastiveLoss.preset("pml"), None),
    "MultiSimilarityLoss, MultiSimilarityMiner": lambda: (
        flashmetric.MultiSimilarityLoss.preset("pml"),
        MultiSimilarityMiner(),
    ),
    "SupConLoss": lambda: (flashmetric.SupConLoss(), None),
}


class Loop(Job):
    """Encoder, loss, optimiser, one batch of digits after another.

    Args:
        library: ``"pytorch_metric_learning"``, ``"flashmetric.pml"`` or, with a memory,
            ``"flashmetric"``.
        recipe: A key of ``RECIPES``.
        rows: Rows of a batch.
        features: Features of an embedding.
        memory: Rows of the cross-batch memory, which starts full; 0 for none.
        folder: Folder of IDX files; None for scikit-learn's digits.
        backwards: Rows of each batch in reverse order.
    """

    def __init__(
        self,
        library: str,
        recipe: str,
        rows: int,
        features: int,
        memory: int = 0,
        folder: str | None = None,
        backwards: bool = False,
    ) -> None:
        """Make all parts; the random state decides nothing but the weights."""
        views = recipe.startswith("NTXent")
        self.network = network(features, folder)
        self.batches = Batches(rows, folder, views, backwards)
        super().__init__(
            trained(self.network), torch.optim.Adam(self.network.parameters(), lr=1e-3)
        )
        self.miner = None
        if library == "flashmetric":
            if not memory:
                raise ValueError("memory must be above 0 with library 'flashmetric'; got 0")
            loss, miner = NATIVE[recipe]()
            self.loss: nn.Module = flashmetric.CrossBatchMemory(loss, memory, miner=miner)
        else:
            # The one line.
            losses, miners = (
                importlib.import_module(f"{library}.{name}") for name in ("losses", "miners")
            )
            self.loss, self.miner = RECIPES[recipe](losses, miners)
            if memory:
                self.loss = losses.CrossBatchMemory(self.loss, features, memory, self.miner)
                self.miner = None
        if memory:
            self.fill(*self.earlier_rows(memory, folder))

    @torch.no_grad()
    def earlier_rows(self, count: int, folder: str | None) -> tuple[Tensor, Tensor]:
        """Embeddings of other distorted digits by the network as it is, and their labels."""
        batches = Batches(_CHUNK, folder, seed=1)
        found = [(self.network(rows), labels) for rows, labels in _take(batches, count)]
        rows, labels = (torch.cat(parts)[:count] for parts in zip(*found, strict=True))
        return rows, labels

    def fill(self, rows: Tensor, labels: Tensor) -> None:
        """Makes the memory as full as it is after enough batches."""
        if isinstance(self.loss, flashmetric.CrossBatchMemory):
            self.loss.enqueue(rows, labels)
        else:
            self.loss.embedding_memory.copy_(rows)
            self.loss.label_memory.copy_(labels)
            self.loss.has_been_filled = True

    def backward(self) -> Tensor:  # noqa: D102
        images, labels = next(self.batches)
        rows = self.network(images)
        if self.miner is None:
            value = self.loss(rows, labels)
        else:
            value = self.loss(rows, labels, self.miner(rows, labels))
        value.backward()
        return value


def _take(batches: Batches, count: int) -> list[tuple[Tensor, Tensor]]:
    """Enough batches for ``count`` rows."""
    return [next(batches) for _ in range(-(-count // _CHUNK))]
