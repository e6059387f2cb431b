# SPDX-License-Identifier: Apache-2.0
"""What is compared: contenders that take training steps, and the terms of a comparison."""

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

Options = dict[str, Any]


class Session(ABC):
    """A contender inside its process, ready to take training steps."""

    @abstractmethod
    def step(self) -> float:
        """Takes the next training step and returns the loss it began with."""

    @abstractmethod
    def gradient(self) -> Tensor:
        """The gradient of the last step, all parts in one row [P]."""


class Job(Session):
    """A session that is a function of its next batch, with an optimiser or without.

    Args:
        parameters: What the gradient is taken of.
        optimizer: Takes a step after each backward pass; None to leave the weights alone.
    """

    def __init__(
        self, parameters: list[Tensor], optimizer: torch.optim.Optimizer | None = None
    ) -> None:
        """Begin without gradients."""
        self.parameters = parameters
        self.optimizer = optimizer

    @abstractmethod
    def backward(self) -> Tensor:
        """Computes the loss of the next batch and leaves the gradients in ``.grad``."""

    def step(self) -> float:  # noqa: D102
        for parameter in self.parameters:
            parameter.grad = None
        value = float(self.backward().detach())
        if self.optimizer is not None:
            self.optimizer.step()
        return value

    def gradient(self) -> Tensor:  # noqa: D102
        return flat_gradient(self.parameters)


def flat_gradient(parameters: list[Tensor]) -> Tensor:
    """All gradients in one row; zeros where a parameter has none."""
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in parameters]
    return torch.cat([grad.flatten() for grad in grads])


def trained(*modules: nn.Module) -> list[Tensor]:
    """The parameters that learn, each once."""
    found = {id(p): p for module in modules for p in module.parameters() if p.requires_grad}
    return list(found.values())


@dataclass(frozen=True)
class Contender:
    """One side of a comparison.

    Attributes:
        name: Its column in the report.
        options: What its builder is given besides the options of the comparison.
        ours: Whether it computes with this package, which then has to pass the gate.
    """

    name: str
    options: Options = field(default_factory=dict)
    ours: bool = False


@dataclass(frozen=True)
class Comparison:
    """Contenders that do the same work from the same seed.

    Attributes:
        section: Heading of the report that it belongs to.
        kernel: What it is called there.
        builder: ``module:function`` that makes a :class:`Session` of the options.
        n: Rows of a batch.
        d: Features of a row.
        contenders: The first is what the others are held against.
        options: What the builder of every contender is given.
        gate: Options in place of these for the gate, which needs a small case.
        steps: Most steps to take; all of them belong to the loss curve.
        curve: Whether loss curves are compared; if not, every step repeats the first.
        note: Printed in the table.
    """

    section: str
    kernel: str
    builder: str
    n: int
    d: int
    contenders: tuple[Contender, ...]
    options: Options = field(default_factory=dict)
    gate: Options = field(default_factory=dict)
    steps: int = 10
    curve: bool = False
    note: str = ""

    def task_options(self, contender: Contender, gate: bool) -> Options:
        """The options of one contender."""
        return {**self.options, **contender.options, **(self.gate if gate else {})}

    @property
    def title(self) -> str:
        """What is printed while it runs."""
        return f"{self.section}: {self.kernel}, N = {self.n}"
