# SPDX-License-Identifier: Apache-2.0
"""The slab engine with its kernels in the PTX interpreter: the host's part in numpy."""

from dataclasses import dataclass, field

import numpy as np

from pair_kernels import (
    DTYPES,
    accumulate,
    decode,
    distance_number,
    encode,
    number,
    plan,
    result,
    run,
    unwritten,
)
from ptx_interpreter import Struct, Uninitialised


def symbol(name: str, dtype: str, more: str = "") -> str:
    """Part of the symbol of the kernel for ``dtype``."""
    return f"{name}_kernelI{DTYPES[dtype][1]}{more}E"


def multiply(a: np.ndarray, b: np.ndarray, *, transposed: bool) -> Uninitialised:
    """The product a b or a b^T by the engine's own kernel."""
    (m, k), n = a.shape, b.shape[0 if transposed else 1]
    out = unwritten((m, n), a.dtype)
    grid = plan("product_plan", m, n)[:2]
    if 0 in grid:
        return out  # as the launcher, which has nothing to do
    arguments = Struct([a, b, out, np.int64(m), np.int64(n), np.int64(k)])
    kernel = symbol("product", a.dtype.name, f"Lb{int(transposed)}E")
    run("slab_product.cu", kernel, grid, number("product_threads"), arguments)
    return out


@dataclass
class Operand:
    """One side: rows as they came, and what slab_rows makes of them."""

    values: np.ndarray
    labels: np.ndarray
    dtype: str
    raw: np.ndarray = field(init=False)
    rows: np.ndarray = field(init=False)
    norms: np.ndarray = field(init=False)
    bad: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        """Widen the rows and find their norms."""
        self.labels = np.ascontiguousarray(self.labels, np.int64)
        self.raw = encode(self.values, self.dtype)
        self.values = decode(self.raw, self.dtype)
        n, d = self.raw.shape
        t, grid = accumulate(self.dtype), number("row_grid", n)
        widened = self.raw.dtype != t
        rows = unwritten((n, d), t) if widened else None
        norms, bad = unwritten(n, t), unwritten(grid, np.uint32)
        arguments = Struct([self.raw, np.int64(n), np.int64(d), rows, norms, bad])
        run("slab.cu", symbol("slab_rows", self.dtype), grid, number("row_threads"), arguments)
        self.rows = self.raw if rows is None else result(rows)
        self.norms, self.bad = result(norms), result(bad)

    def side(self) -> list:
        """The structure SlabSide."""
        return [self.rows, self.norms, self.labels, np.int64(len(self.rows))]


@dataclass
class Slabs:
    """A batch, or (``r`` is ``x``) a self-batch, in slabs of ``step`` rows."""

    x: Operand
    r: Operand
    distance: str
    step: int

    @property
    def alone(self) -> bool:
        """Whether it is a self-batch."""
        return self.x is self.r

    @property
    def wide(self) -> str:
        """Name of the accumulate type."""
        return np.dtype(accumulate(self.x.dtype)).name

    def problem(self, begin: int, x: Operand, r: Operand) -> Struct:
        """The structure SlabProblem."""
        bad = self.x.bad if self.alone else np.concatenate((self.x.bad, self.r.bad))
        kind = [distance_number(self.distance), np.bool_(self.alone), np.int64(begin)]
        d = np.int64(self.x.raw.shape[1])
        return Struct([x.side(), r.side(), d, *kind, bad, np.int32(bad.size)])

    def hardest(self, *, exact: bool = False, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
        """Index and distance, both [2, n]."""
        n = len(self.x.rows)
        index, distance = unwritten((2, n), np.int64), unwritten((2, n), self.wide)
        for begin in range(0, n, self.step):
            rows = self.x.rows[begin : begin + self.step].copy()
            products = None if exact else multiply(rows, self.r.rows, transposed=True)
            problem = self.problem(begin, self.x, self.r)
            arguments = Struct([problem, products, index, distance])
            kernel = symbol("slab_hardest", self.wide)
            run("slab.cu", kernel, len(rows), number("slab_threads"), arguments, seed)
        return result(index), result(distance)
