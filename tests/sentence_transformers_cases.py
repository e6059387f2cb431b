# SPDX-License-Identifier: Apache-2.0
"""Losses of flashmetric.sentence_transformers beside their parents: a model, batches, agreement."""

import copy
from typing import Any

import torch
from sentence_transformers.sentence_transformer import losses as peer
from torch import Tensor, nn

from flashmetric.sentence_transformers import losses

Features = list[dict[str, Tensor]]


class Encoder(nn.Sequential):
    """What the losses need of a SentenceTransformer: features in, ``sentence_embedding`` out."""

    def __init__(self, dimension: int = 6, dropout: float = 0.0) -> None:
        torch.manual_seed(4)
        super().__init__(
            nn.Embedding(50, 7), nn.Dropout(dropout), nn.Linear(7, dimension), nn.Tanh()
        )

    def forward(self, features: dict[str, Tensor]) -> dict[str, Tensor]:
        mask = features["attention_mask"].unsqueeze(2)
        words = self[0](features["input_ids"]) * mask
        return {"sentence_embedding": self[3](self[2](self[1](words.sum(1) / mask.sum(1))))}


def sentences(rows: int, columns: int = 1, seed: int = 0) -> Features:
    """Tokens of sentences of different lengths, in columns."""
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(columns):
        lengths = torch.randint(2, 6, (rows, 1), generator=generator)
        ids = torch.randint(0, 50, (rows, 5), generator=generator)
        found.append({"input_ids": ids, "attention_mask": (torch.arange(5) < lengths).long()})
    return found


def build(name: str, dtype: torch.dtype = torch.float64, **options: Any) -> tuple[Any, Any]:
    """Ours, and the parent's in float64, around equal models."""
    model = Encoder()
    return (
        getattr(losses, name)(copy.deepcopy(model).to(dtype), **options),
        getattr(peer, name)(model.double(), **options),
    )


def outcome(loss: nn.Module, features: Features, labels: Any = None) -> list[Tensor]:
    """The loss, and its gradients in the parameters of the model."""
    loss.zero_grad()
    value = loss(features, labels)
    value.backward()
    return [value.detach(), *(p.grad for p in loss.parameters() if p.grad is not None)]


def close(found: Tensor, truth: Tensor, tolerance: float) -> bool:
    """Whether the difference is small beside the norm of what it should be."""
    difference = (found.double() - truth.double()).norm()
    return bool(difference <= tolerance * truth.double().norm() + tolerance * 1e-3)


def assert_agree(ours: list[Tensor], truth: list[Tensor], tolerance: float | None = None) -> None:
    """Values and gradients are those of the parent in float64, up to rounding."""
    assert len(ours) == len(truth) > 1
    if tolerance is None:
        tolerance = 1e-10 if ours[1].dtype == torch.float64 else 1e-5
    for a, b in zip(ours, truth, strict=True):
        assert a.shape == b.shape
        assert close(a, b, tolerance), (a, b)
