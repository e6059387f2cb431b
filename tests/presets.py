# SPDX-License-Identifier: Apache-2.0
"""One loss, three ways in: what the comparisons with other libraries run on."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

import flashmetric
from flashmetric import functional, reference

SUBJECTS = ("reference", "functional", "module")
# Labels, by what is particular about them.
BATCHES = {
    "regular": [0, 1, 2] * 6,
    "some-without-positive": [0, 0, 0, 1, 2, 3, 4, 4],
    "one-class": [5] * 6,
    "all-distinct": [3, 1, 4, 5, 9],
    "one-row": [2],
    "two-rows": [2, 2],
}

TRIPLET = {
    "pml_batch_hard": {"margin": 0.05, "normalize": True, "reduction": "mean_nonzero"},
    "sentence_transformers": {"margin": 5.0, "empty": "keep"},
    "tensorflow_addons": {"margin": 1.0, "empty": "keep"},
}
CONTRASTIVE = {
    "pml": {"normalize": True},
    "sentence_transformers": {
        "distance": "cosine",
        "neg_margin": 0.5,
        "power": 2,
        "scale": 0.5,
        "reduction": "mean",
    },
    "tensorflow_addons": {"power": 2, "reduction": "mean"},
}


def triplet(subject: str, preset: str, **overrides) -> Callable[..., Tensor]:
    """The triplet loss of a preset; only the module knows presets by name."""
    if subject == "module":
        return flashmetric.TripletMarginLoss.preset(preset, **overrides)
    home = reference if subject == "reference" else functional
    return partial(home.triplet_margin_loss, **{**TRIPLET[preset], **overrides})


def contrastive(subject: str, preset: str, **overrides) -> Callable[..., Tensor]:
    """The contrastive loss of a preset; only the module knows presets by name."""
    if subject == "module":
        return flashmetric.ContrastiveLoss.preset(preset, **overrides)
    home = reference if subject == "reference" else functional
    return partial(home.contrastive_loss, **{**CONTRASTIVE[preset], **overrides})


def labelled_rows(n: int, d: int, classes: int, dtype=torch.float64, seed=0):
    """Rows in loose clusters, so that some hinges are active and some are not."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    centres = torch.randn(classes, d, dtype=torch.float64, generator=generator)
    noise = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return (centres[labels] + 0.8 * noise).to(dtype), labels


def value_and_grads(loss: Callable[..., Tensor], *rows: Tensor) -> list[Tensor]:
    """``loss(*rows)`` and its gradient to each of the rows."""
    leaves = [x.detach().clone().requires_grad_() for x in rows]
    value = loss(*leaves)
    value.backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def assert_same(ours: list[Tensor], theirs: list[Tensor]) -> None:
    """Values and gradients agree as closely as the Gram-form distances of a peer allow."""
    for a, b in zip(ours, theirs, strict=True):
        exact = b.dtype == torch.float64
        torch.testing.assert_close(
            a, b, rtol=1e-9 if exact else 1e-4, atol=1e-10 if exact else 2e-6
        )
