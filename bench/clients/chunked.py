# SPDX-License-Identifier: Apache-2.0
"""Large batches through encoders whose activations matter: chunked (GradCache) and plain."""

import importlib
from typing import Any, Literal

import torch
from torch import Tensor, nn

import flashmetric
from bench.clients.digits import Batches, WideNetwork
from bench.clients.session import Job, trained
from bench.clients.texts import attention_model, draw_texts

Method = Literal["grad_cache", "fused chunked", "peer chunked", "fused plain", "peer plain"]
_PEER = "sentence_transformers.sentence_transformer.losses"
_FUSED = "flashmetric.sentence_transformers.losses"
TEMPERATURE = 0.05


class Tower(nn.Module):
    """A SentenceTransformer that takes keyword arguments and returns embeddings.

    Args:
        model: The model.
    """

    def __init__(self, model: Any) -> None:
        """Keep the model."""
        super().__init__()
        self.model = model

    def forward(self, **features: Tensor) -> Tensor:
        """Embeddings [N, D]."""
        return self.model(features)["sentence_embedding"]


class Ranking(Job):
    """InfoNCE of sentences and names, both through one model.

    Args:
        method: How.
        rows: Pairs of a batch.
        chunk: Rows of a chunk.
    """

    def __init__(self, method: Method, rows: int, chunk: int = 64) -> None:
        """Make the model and tokenise the batch."""
        self.method, self.chunk = method, chunk
        self.model = attention_model()
        super().__init__(trained(self.model))
        texts = draw_texts(rows)
        sides = [text.sentence for text in texts], [text.name for text in texts]
        self.features = [self.tensors(side) for side in sides]
        self.tower = Tower(self.model)
        self.fused = flashmetric.InfoNCELoss(TEMPERATURE)
        self.module: Any = None
        if method in ("peer chunked", "fused chunked", "peer plain"):
            losses = importlib.import_module(_FUSED if method.startswith("fused") else _PEER)
            kind, more = losses.MultipleNegativesRankingLoss, {}
            if method != "peer plain":
                kind, more = losses.CachedMultipleNegativesRankingLoss, {"mini_batch_size": chunk}
            self.module = kind(self.model, scale=1 / TEMPERATURE, **more)

    def tensors(self, side: list[str]) -> dict[str, Tensor]:
        """What the model takes; the tokeniser adds things that are no tensors."""
        found = self.model.preprocess(side)
        return {name: part for name, part in found.items() if torch.is_tensor(part)}

    def towers_loss(self, queries: Tensor, documents: Tensor) -> Tensor:
        """The fused loss."""
        return self.fused(queries, ref_emb=documents)

    def backward(self) -> Tensor:  # noqa: D102
        if self.method == "grad_cache":
            towers = (self.tower, self.tower)
            return flashmetric.grad_cache(
                towers, self.towers_loss, *self.features, chunk_size=self.chunk
            )
        if self.module is not None:
            # A model may write its results into the dictionary it is given.
            value = self.module([dict(side) for side in self.features], None)
        else:
            value = self.towers_loss(*(self.tower(**side) for side in self.features))
        value.backward()
        return value


class Supervised(Job):
    """The supervised contrastive loss of digits by the network of large activations.

    Args:
        method: How.
        rows: Rows of a batch.
        features: Features of an embedding.
        chunk: Rows of a chunk.
        folder: Folder of IDX files; None for scikit-learn's digits.
    """

    def __init__(
        self, method: Method, rows: int, features: int, chunk: int = 256, folder: str | None = None
    ) -> None:
        """Make the network and the batch."""
        torch.manual_seed(0)
        self.network = WideNetwork(features)
        super().__init__(trained(self.network))
        self.method, self.chunk = method, chunk
        self.images, self.labels = next(Batches(rows, folder))
        if method.startswith("peer"):
            losses = importlib.import_module("pytorch_metric_learning.losses")
            self.loss = losses.SupConLoss(TEMPERATURE)
        else:
            self.loss = flashmetric.SupConLoss(TEMPERATURE)

    def backward(self) -> Tensor:  # noqa: D102
        if self.method == "grad_cache":
            return flashmetric.grad_cache(
                self.network, self.loss, self.images, chunk_size=self.chunk, labels=self.labels
            )
        if self.method == "peer chunked":
            return self.by_hand()
        value = self.loss(self.network(self.images), self.labels)
        value.backward()
        return value

    def by_hand(self) -> Tensor:
        """What users of a library without chunks write."""
        parts = self.images.split(self.chunk)
        with torch.no_grad():
            rows = torch.cat([self.network(part) for part in parts])
        rows.requires_grad_()
        value = self.loss(rows, self.labels)
        value.backward()
        for part, grad in zip(parts, rows.grad.split(self.chunk), strict=True):
            self.network(part).backward(grad)
        return value
