# SPDX-License-Identifier: Apache-2.0
"""Who is compared on a GPU: the forms of ``bench.contenders`` and the library's two engines."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from os import environ

import torch
from torch import Tensor

from bench import contenders as plain
from bench.contenders import BARE, OURS, Loss

ENGINE = "FLASHMETRIC_CUDA_ENGINE"
SLAB, TILE = f"{OURS} slab", f"{OURS} tile"
BEST, COMPILED = "torch best", "torch.compile best"
PML, ST = "pytorch-metric-learning", "sentence-transformers"

EVERYONE = (OURS, SLAB, TILE, BEST, PML, ST, BARE, COMPILED)
NO_COMPILE = EVERYONE[:-1]
OURS_AND_PEERS = (OURS, SLAB, BEST, PML)
SWEEP = (OURS, SLAB, BEST, PML, BARE)


@dataclass(frozen=True)
class GpuContender:
    """One way to compute a loss on a GPU.

    Attributes:
        name: As printed.
        build: Per kernel, a function of the margin that returns the loss.
        env: Environment of its calls. The library reads its engine at every call of an op.
        compiled: Whether the loss goes through torch.compile.
        widen: Whether half-precision rows are widened first, because it has no such path: autocast
            does the same for ``torch.cdist``.
        package: Distribution whose version the report names.
    """

    name: str
    build: dict[str, Callable[[float], Loss]]
    env: dict[str, str] = field(default_factory=dict)
    compiled: bool = False
    widen: bool = False
    package: str = ""

    @property
    def ours(self) -> bool:
        """Whether it is the library, in whatever engine."""
        return self.name in (OURS, SLAB, TILE)

    @property
    def judged(self) -> bool:
        """Whether there is a loss to judge."""
        return self.name != BARE

    def loss(self, kernel: str, margin: float, compile_backend: str = "inductor") -> Loss:
        """Makes the loss; ImportError means that the contender is not installed."""
        function = self.build[kernel](margin)
        if self.compiled:
            return torch.compile(function, dynamic=False, fullgraph=True, backend=compile_backend)
        if self.widen:
            return widened(function)
        return function


def widened(function: Loss) -> Loss:
    """The same loss of rows that are made float32 first."""
    return lambda x, labels: function(x.float(), labels)


FLASHMETRIC: dict[str, Callable[[float], Loss]] = {
    "triplet": plain.flashmetric_triplet,
    "contrastive": plain.flashmetric_contrastive,
    "hardest": plain.flashmetric_hardest,
}
PLAIN: dict[str, Callable[[float], Loss]] = {
    "triplet": plain.best_triplet,
    "contrastive": plain.plain_contrastive,
    "hardest": plain.best_hardest,
}
PEER: dict[str, Callable[[float], Loss]] = {
    "triplet": plain.pml_triplet,
    "contrastive": plain.pml_contrastive,
    "hardest": plain.pml_hardest,
}
CONTENDERS = {
    contender.name: contender
    for contender in (
        GpuContender(OURS, FLASHMETRIC),
        GpuContender(SLAB, FLASHMETRIC, env={ENGINE: "slab"}),
        GpuContender(TILE, FLASHMETRIC, env={ENGINE: "tile"}),
        GpuContender(BEST, PLAIN),
        GpuContender(COMPILED, PLAIN, compiled=True),
        GpuContender(PML, PEER, widen=True, package=PML),
        GpuContender(ST, {"triplet": plain.sentence_transformers_triplet}, package=ST),
        GpuContender(BARE, dict.fromkeys(PLAIN, plain.bare_product)),
    )
}


@contextmanager
def environment(values: dict[str, str]) -> Iterator[None]:
    """Sets environment variables, also for native code, and puts back what was there."""
    before = {key: environ.get(key) for key in values}
    environ.update(values)
    try:
        yield
    finally:
        for key, value in before.items():
            if value is None:
                environ.pop(key, None)
            else:
                environ[key] = value


class Problem:
    """A loss on its data, and the last result."""

    def __init__(self, loss: Loss, x: Tensor, labels: Tensor, differentiable: bool) -> None:
        """Takes an alias of the embeddings as a leaf of its own."""
        self.loss = loss
        self.x = x.detach().requires_grad_(differentiable)
        self.labels = labels
        self.result: Tensor | None = None
        self._seed: Tensor | None = None

    def reset(self) -> None:
        """Drops the last result and gradient, so that the next call allocates its own."""
        self.result = None
        self.x.grad = None

    def call(self) -> None:
        """One training step, or the result alone where there is no gradient.

        The gradient of the loss itself is kept from the first call: filling it anew would be a
        kernel launch that belongs to no contender.
        """
        if not self.x.requires_grad:
            with torch.no_grad():
                self.result = self.loss(self.x, self.labels)
            return
        loss = self.loss(self.x, self.labels)
        if self._seed is None:
            self._seed = torch.ones_like(loss)
        loss.backward(self._seed)
        self.result = loss.detach()
