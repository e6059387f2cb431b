# SPDX-License-Identifier: Apache-2.0
"""Cases that show whether the interpreter's idea of our PTX wrappers is right.

Each case is a kernel of kernels/prims.cu with its arguments and the result that the wrapper's
description promises, computed by plain numpy from matrices: fragment layouts are written down here
once more, in another form than in the interpreter.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from .dtypes import Array

SOURCE = Path(__file__).parent / "kernels" / "prims.cu"
LANE = np.arange(32)


@dataclass(frozen=True)
class Case:
    """A kernel, its arguments (the result is the last) and what they should become."""

    kernel: str
    name: str
    arguments: tuple[Array, ...]
    expected: Array
    smem_bytes: int = 0
    # Of the sum of the products' magnitudes; 0 asks for equal bits.
    tolerance: float = 0.0
    scale: Array | None = None

    def fresh(self) -> list[Array]:
        """Copies of the arguments, for one run."""
        return [array.copy() for array in self.arguments]

    def check(self, result: Array, expected: Array | None = None) -> None:
        """Raises AssertionError unless the result is as it should be."""
        expected = self.expected if expected is None else expected
        if self.tolerance == 0.0:
            same = result.view(np.uint32) == expected.view(np.uint32)
            assert same.all(), f"{self.kernel} ({self.name}): words {np.flatnonzero(~same)} differ"
            return
        assert self.scale is not None
        error = np.abs(result.astype(np.float64) - expected)
        assert (error <= self.tolerance * self.scale).all(), (
            f"{self.kernel} ({self.name}): off by {error.max():.3g}"
        )


def cases() -> Iterator[Case]:
    """All cases."""
    rng = np.random.default_rng(0)
    words = rng.integers(0, 2**32, 256, dtype=np.uint32)
    out = np.zeros(32, np.uint32)
    yield Case("smem_address", "", (words[:128], out), words[LANE ^ 5], 512)
    swapped = words.reshape(2, 32, 4)[:, LANE ^ 1].ravel()
    yield Case("cp_async", "", (words, np.zeros(256, np.uint32)), swapped, 1024)
    rows = words[:128]
    matrices = rows.view(np.uint16).reshape(4, 8, 8)
    for name, wanted in (
        ("ldmatrix_x4", matrices),
        ("ldmatrix_x4_trans", matrices.transpose(0, 2, 1)),
    ):
        yield Case(name, "", (rows, np.zeros(128, np.uint32)), _fragments(wanted), 512)
    yield from _mma_cases(rng)
    # Below the smallest normal float the result is 0.
    x = np.concatenate((np.linspace(-125, 127, 29), (0, -200, -np.inf))).astype(np.float32)
    wanted = np.where(x < -126, 0, 2.0 ** x.astype(np.float64)).astype(np.float32)
    arguments = (x, np.zeros(32, np.float32))
    yield Case("exp2_fast", "", arguments, wanted, tolerance=2.0**-22, scale=wanted)


def _fragments(matrices: Array) -> Array:
    """Each lane's two neighbouring elements of each 8 x 8 matrix: words [lane, matrix], flat."""
    pairs = matrices.reshape(len(matrices), 32, 2)
    return np.ascontiguousarray(pairs.transpose(1, 0, 2)).view(np.uint32).ravel()


def _mma_cases(rng: np.random.Generator) -> Iterator[Case]:
    draws: dict[str, Callable[[Any], Array]] = {
        "integers": lambda shape: rng.integers(-8, 9, shape).astype(np.float64),
        "random": lambda shape: rng.standard_normal(shape),
        "wide": lambda shape: rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 9, shape),
        # Subnormal halves are numbers like any other to the tensor core.
        "subnormal": lambda shape: rng.standard_normal(shape) * 2.0**-16,
    }
    for name, draw in draws.items():
        a, b = (draw(shape).astype(np.float16) for shape in ((16, 16), (16, 8)))
        c = draw((16, 8)).astype(np.float32)
        wide = a.astype(np.float64), b.astype(np.float64)
        # a: 8 x 8 blocks in the order top left, bottom left, top right, bottom right.
        blocks = a.reshape(2, 8, 2, 8).transpose(2, 0, 1, 3).reshape(4, 8, 8).view(np.uint16)
        columns = b.T.reshape(8, 2, 8).transpose(1, 0, 2).view(np.uint16)
        arguments = (
            _fragments(blocks),
            _fragments(columns),
            _accumulators(c),
            np.zeros(128, np.float32),
        )
        exact = name == "integers"
        yield Case(
            "mma_f16",
            name,
            arguments,
            _accumulators((wide[0] @ wide[1] + c).astype(np.float32)),
            # The tensor core may cut summands to 24 bits of the largest one.
            tolerance=0.0 if exact else 17 * 2.0**-23,
            scale=_accumulators(np.abs(wide[0]) @ np.abs(wide[1]) + np.abs(c)),
        )


def _accumulators(matrix: Array) -> Array:
    """[16, 8] as lane l holds it: (g, 2q) (g, 2q + 1) (g + 8, 2q) (g + 8, 2q + 1), flat."""
    return np.ascontiguousarray(matrix.reshape(2, 32, 2).transpose(1, 0, 2)).ravel()
