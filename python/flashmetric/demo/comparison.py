# SPDX-License-Identifier: Apache-2.0
"""The fused loss against plain PyTorch: same value, same gradient, then the time of each."""

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch
from torch import Tensor, nn
from torch.nn import functional

from flashmetric.demo import plain
from flashmetric.demo.errors import DemoError
from flashmetric.demo.options import Options

LARGE_DIM = 128
_LARGE_CLASS_SIZE = 16
_BUDGET_SECONDS = 6.0
_MAX_REPETITIONS = 30
_TOLERANCE = 1e-3

Loss = Callable[[Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Comparison:
    """Median milliseconds of forward and backward together.

    Attributes:
        rows: Rows of the batch.
        dim: Features of a row.
        fused_ms: Median of the fused loss.
        plain_ms: Median of the plain loss.
        repetitions: Measurements of each, taken in turns.
        gradient_difference: Norm of the difference of the gradients over the norm of the plain one.
    """

    rows: int
    dim: int
    fused_ms: float
    plain_ms: float
    repetitions: int
    gradient_difference: float

    @property
    def ratio(self) -> float:
        """How many times faster the fused loss is."""
        return self.plain_ms / self.fused_ms


def large_batch(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Return random unit rows [rows, 128] and labels in classes of sixteen."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(rows) // _LARGE_CLASS_SIZE
    centres = torch.randn(rows // _LARGE_CLASS_SIZE + 1, LARGE_DIM, generator=generator)
    noise = torch.randn(rows, LARGE_DIM, generator=generator)
    return functional.normalize(centres[labels] + noise), labels


def compare(fused: nn.Module, options: Options, embeddings: Tensor, labels: Tensor) -> Comparison:
    """Time the fused and the plain loss on one batch.

    Args:
        fused: The loss module of the run.
        options: Options of the run, for the plain loss.
        embeddings: Rows [N, D].
        labels: Labels [N].

    Returns:
        Medians over a number of repetitions that fits a few seconds, at least two.

    Raises:
        DemoError: If the two losses disagree, in which case no time is reported.
    """
    formula = plain.triplet_loss if options.loss == "triplet" else plain.contrastive_loss
    unfused: Loss = partial(formula, margin=options.effective_margin)
    fused_value, fused_gradient, _ = _measure(fused, embeddings, labels)
    plain_value, plain_gradient, seconds = _measure(unfused, embeddings, labels)
    difference = float(
        (fused_gradient - plain_gradient).norm() / plain_gradient.norm().clamp(1e-12)
    )
    if abs(fused_value - plain_value) > _TOLERANCE * max(plain_value, 1.0):
        raise DemoError(f"the fused loss is {fused_value}, plain PyTorch gives {plain_value}")
    repetitions = min(_MAX_REPETITIONS, max(2, round(_BUDGET_SECONDS / (2 * seconds))))
    fused_seconds, plain_seconds = [], []
    for _ in range(repetitions):
        fused_seconds.append(_measure(fused, embeddings, labels)[2])
        plain_seconds.append(_measure(unfused, embeddings, labels)[2])
    return Comparison(
        rows=len(labels),
        dim=embeddings.shape[1],
        fused_ms=median(fused_seconds) * 1e3,
        plain_ms=median(plain_seconds) * 1e3,
        repetitions=repetitions,
        gradient_difference=difference,
    )


def _measure(loss: Loss, embeddings: Tensor, labels: Tensor) -> tuple[float, Tensor, float]:
    leaf = embeddings.detach().clone().requires_grad_()
    start = time.perf_counter()
    value = loss(leaf, labels)
    torch.autograd.backward(value)
    seconds = time.perf_counter() - start
    assert leaf.grad is not None
    return float(value.detach()), leaf.grad, seconds
