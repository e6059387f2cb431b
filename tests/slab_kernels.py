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

FORMULAS = ("hinge", "squared_hinge")


def symbol(name: str, dtype: str, more: str = "") -> str:
    """Part of the symbol of the kernel for ``dtype``."""
    return f"{name}_kernelI{DTYPES[dtype][1]}{more}E"


def multiply(a: np.ndarray, b: np.ndarray, *, transposed: bool) -> Uninitialised:
    """The product a b or a b^T by the engine's own kernel."""
    (m, k), n = a.shape, b.shape[0 if transposed else 1]
    out = unwritten((m, n), a.dtype)
    grid = plan("product_plan", m, n)[:2]
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

    def pair_sum(
        self,
        formula: str,
        margins: tuple[float, float],
        *,
        weight: np.ndarray | None = None,
        merged: bool = False,
        with_grad: bool = True,
        swapped: bool = False,
        seed: int = 0,
    ) -> tuple[np.ndarray | None, np.ndarray | None, np.ndarray | None]:
        """Sums, counts and gradient of one pass over the rows of x (``swapped``: of r)."""
        x, r = (self.r, self.x) if swapped else (self.x, self.r)
        (n, d), m, t = x.rows.shape, len(r.rows), np.dtype(self.wide)
        weights = [None, None] if weight is None else [row.astype(t) for row in weight]
        with_sums = not merged and not swapped
        sums = unwritten((2, n), t) if with_sums else None
        counts = unwritten((4, n), np.int64) if with_sums else None
        kinds = 1 if merged else 2
        out_dtype = x.dtype if merged else self.wide
        shape = (n, d) if merged else (2, n, d)
        grad = unwritten(shape, x.raw.dtype if merged else t) if with_grad else None
        grid = plan("slab_finish_plan", d, with_grad, merged)[:2]
        for begin in range(0, n, self.step):
            part = x.rows[begin : begin + self.step].copy()
            rows = len(part)
            products = multiply(part, r.rows, transposed=True)
            positive = unwritten((rows, m), t) if with_grad and not merged else None
            near = unwritten((rows, number("slab_near_words", m)), np.uint32)
            parts = unwritten(2 * rows * number("slab_part_bytes"), np.uint8)
            common = [
                self.problem(begin, x, r),
                np.int32(FORMULAS.index(formula)),
                [np.float64(margin) for margin in margins],
                weights,
                np.bool_(swapped),
                np.bool_(merged),
                products,
                positive,
                np.bool_(with_grad),
                near,
                parts,
            ]
            first = Struct([*common, [None, None], sums, counts, grad])
            kernel = symbol("slab_weigh", self.wide)
            run("slab_sum.cu", kernel, rows, number("slab_threads"), first, seed)
            pulled: list = [None, None]
            if with_grad:
                weighed = [products] if merged else [positive, products]
                for k, h in enumerate(weighed):
                    pulled[k] = multiply(result(h), r.rows, transposed=False)
            second = Struct([*common, pulled, sums, counts, grad])
            kernel = symbol("slab_sum_finish", out_dtype)
            run("slab_sum.cu", kernel, (rows, *grid), number("slab_threads"), second, seed)
        assert kinds == (grid[1] if with_grad or with_sums else kinds)
        return tuple(None if out is None else result(out) for out in (sums, counts, grad))
