# SPDX-License-Identifier: Apache-2.0
"""The kernels on distances of slabs in the PTX interpreter: the host's part in numpy."""

from dataclasses import dataclass

import numpy as np
import torch

from flashmetric.ops.distance import DISTANCES, has_unit_rows, is_difference, is_direct
from flashmetric.ops.labels import KINDS
from flashmetric.ops.terms import Formula
from pair_kernels import DTYPES, number, plan, result, run, unwritten
from ptx_interpreter import Struct, Uninitialised
from slab_kernels import Operand, multiply, symbol

TERMS: tuple[str, ...] = Formula.__args__
LABEL_RULES = ("equal", "any", "group")
# In the order of label_rule.h; both is kBothKinds.
KIND_NUMBERS = {**{kind: k for k, kind in enumerate(KINDS)}, "both": 3}
DIRECT = {"cityblock": "NS_9Cityblock", "chi2": "NS_4Chi2"}


def words(labels: np.ndarray) -> int:
    """Label words of each row."""
    return 1 if labels.ndim == 1 else labels.shape[1]


@dataclass
class DistanceSlabs:
    """A batch, or (``r`` is ``x``) a self-batch, in slabs of ``step`` rows."""

    x: Operand
    r: Operand
    rule: str
    distance: str
    kind: str
    step: int
    seed: int = 0

    @property
    def alone(self) -> bool:
        """Whether it is a self-batch."""
        return self.x is self.r

    @property
    def type(self) -> np.dtype:
        """The accumulate type."""
        return self.x.norms.dtype

    @property
    def bad(self) -> np.ndarray:
        """Flags of rows that are not finite."""
        if not hasattr(self, "_bad"):
            alone = self.x.bad
            self._bad = alone if self.alone else np.concatenate((alone, self.r.bad))
        return self._bad

    def sides(self, swapped: bool) -> tuple[Operand, Operand]:
        """Rows and columns of a slab."""
        return (self.r, self.x) if swapped else (self.x, self.r)

    def problem(self, begin: int, swapped: bool) -> Struct:
        """The structure SlabProblem."""
        x, r = self.sides(swapped)
        kind = [np.int32(DISTANCES.index(self.distance)), np.bool_(self.alone), np.int64(begin)]
        d = np.int64(x.raw.shape[1])
        return Struct([x.side(), r.side(), d, *kind, self.bad, np.int32(self.bad.size)])

    def labelling(self) -> list:
        """The structure Labelling."""
        name, _, groups = self.rule.partition(":")
        each = [np.int32("asd".index(c)) for c in groups or "aa"]
        return [np.int32(LABEL_RULES.index(name)), np.int32(words(self.x.labels)), each]

    def launch(self, source: str, kernel: str, rows: int, arguments: Struct, more: int = 1) -> None:
        """One block a row, and ``more`` of each."""
        grid, threads = (rows, more), number("slab_threads")
        run(source, kernel, grid, threads, arguments, self.seed)

    def direct(self, name: str, arguments: list, m: int, n: int) -> None:
        """A kernel of slab_direct.cu."""
        kernel = f"{name}_kernelI{DTYPES[self.type.name][1]}{DIRECT[self.distance]}E"
        members = [*arguments, np.int32(DISTANCES.index(self.distance))]
        grid = tuple(plan("product_plan", m, n)[:2])
        if 0 in grid:
            return
        run("slab_direct.cu", kernel, grid, number("product_threads"), Struct(members), self.seed)

    def distances(
        self, begin: int, swapped: bool = False, with_near: bool = False
    ) -> tuple[Uninitialised, np.ndarray | None]:
        """Distances [rows, m] of a slab, and which are of near pairs."""
        x, r = self.sides(swapped)
        rows = x.rows[begin : begin + self.step].copy()
        n, m, d = len(rows), len(r.rows), rows.shape[1]
        if is_direct(self.distance):
            slab = unwritten((n, m), self.type)
            product = [rows, r.rows, slab, np.int64(n), np.int64(m), np.int64(d)]
            self.direct("direct", [product], n, m)
        else:
            slab = multiply(rows, r.rows, transposed=True)
        near = unwritten((n, number("slab_near_words", m)), np.uint32) if with_near else None
        problem = self.problem(begin, swapped)
        kind = np.int32(KIND_NUMBERS[self.kind])
        arguments = Struct([problem, self.labelling(), kind, slab, near])
        self.launch("slab_distance.cu", symbol("slab_distance", self.type.name), n, arguments)
        result(slab)
        return slab, None if near is None else result(near)

    def distance_rows(self, slab: Uninitialised, begin: int) -> list:
        """The structure DistanceRows."""
        m = np.int64(slab.array.shape[1])
        return [slab.array, m, np.int64(begin), self.bad, np.int32(self.bad.size)]

    def slabs(self, swapped: bool = False) -> range:
        """First rows."""
        return range(0, len(self.sides(swapped)[0].rows), self.step)

    def all_distances(self) -> np.ndarray:
        """Distances [n, m]; NaN for pairs not of the kind."""
        return np.concatenate([self.distances(begin)[0].array for begin in self.slabs()])

    def threshold_sum(
        self, formula: str, thresholds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Sums, counts and slopes."""
        n, count = len(self.x.rows), thresholds.shape[1]
        sums, slopes = unwritten((n, count), np.float64), unwritten((n, count), np.float64)
        counts = unwritten((n, count), np.int64)
        stride = np.int64(0 if len(thresholds) == 1 else count)
        swept = count <= number("swept_thresholds")
        name = "threshold_hinge" if formula == "hinge" and not swept else "threshold_sum"
        for begin in self.slabs():
            slab, _ = self.distances(begin)
            members = [self.distance_rows(slab, begin), np.int32(TERMS.index(formula))]
            members += [thresholds, stride, np.int64(count), sums, counts, slopes]
            kernel = symbol(name, self.type.name)
            self.launch("threshold_sum.cu", kernel, len(slab.array), Struct(members))
        return result(sums), result(counts), result(slopes)

    def threshold_sum_backward(
        self, grad: np.ndarray, formula: str, thresholds: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Gradients of the queries and (of a rectangular batch) of the references."""
        n, count = grad.shape
        limit = unwritten((count, len(thresholds)), self.type)
        weight = unwritten((count, n), self.type)
        table = [limit, weight, np.int64(len(thresholds)), np.int64(n), np.int64(count)]
        hinge = np.bool_(formula == "hinge")
        kernel = symbol("threshold_table", self.type.name)
        arguments = Struct([table, hinge, thresholds, grad])
        threads = number("row_threads")
        run("threshold_grad.cu", kernel, number("row_grid", n), threads, arguments, self.seed)
        table[:2] = result(limit), result(weight)
        of_query = self._gradient(formula, table, False)
        return of_query, None if self.alone else self._gradient(formula, table, True)

    def _gradient(self, formula: str, table: list, swapped: bool) -> np.ndarray:
        x, r = self.sides(swapped)
        (n, d), m, t = x.rows.shape, len(r.rows), self.type
        grad = unwritten((n, d), x.raw.dtype)
        for begin in self.slabs(swapped):
            slab, near = self.distances(begin, swapped, is_difference(self.distance))
            rows = len(slab.array)
            weight, total = unwritten((rows, m), t), unwritten(rows, np.float64)
            problem, term = self.problem(begin, swapped), np.int32(TERMS.index(formula))
            roles = [np.bool_(not swapped), np.bool_(swapped or self.alone)]
            arguments = Struct([problem, term, table, *roles, slab, near, weight, total])
            kernel = symbol("threshold_weigh", t.name)
            self.launch("threshold_grad.cu", kernel, rows, arguments)
            self.write_gradient(begin, swapped, slab, near, result(weight), result(total), grad)
        return result(grad)

    def write_gradient(
        self,
        begin: int,
        swapped: bool,
        slab: Uninitialised,
        near: np.ndarray | None,
        weight: np.ndarray,
        total: np.ndarray,
        grad: Uninitialised,
    ) -> None:
        """Rows of ``grad`` from weights of pairs; those of near pairs are in ``slab``."""
        x, r = self.sides(swapped)
        (rows, m), d, t = weight.shape, x.rows.shape[1], self.type
        if is_direct(self.distance):
            own = x.rows[begin : begin + rows].copy()
            pulled = unwritten((rows, d), t)
            product = [weight, r.rows, pulled, np.int64(rows), np.int64(d), np.int64(m)]
            self.direct("direct_pull", [product, own], rows, d)
        else:
            pulled = multiply(weight, r.rows, transposed=False)
        problem = self.problem(begin, swapped)
        arguments = Struct([problem, slab, near, total, result(pulled), grad])
        parts = number("gradient_parts", d)
        # Bits of bfloat16 are rows as they came; others say what they are.
        dtype = x.dtype if grad.array.dtype == x.raw.dtype else grad.array.dtype.name
        kernel = symbol("slab_gradient", dtype)
        self.launch("slab_distance.cu", kernel, rows, arguments, parts)

    def nearest_beyond(self, farthest: bool, thresholds: np.ndarray) -> np.ndarray:
        """Indices [n, count]."""
        return self._select("nearest", farthest, thresholds.shape[1], thresholds)

    def row_top_k(self, farthest: bool, k: int) -> np.ndarray:
        """Indices [n, k]."""
        return self._select("top_k", farthest, k)

    def _select(
        self, name: str, farthest: bool, count: int, thresholds: np.ndarray | None = None
    ) -> np.ndarray:
        index = unwritten((len(self.x.rows), count), np.int64)
        for begin in self.slabs():
            slab, _ = self.distances(begin)
            members = [self.distance_rows(slab, begin), np.bool_(farthest)]
            members += [] if thresholds is None else [thresholds]
            arguments = Struct([*members, np.int64(count), index])
            kernel = symbol(name, self.type.name)
            self.launch(f"{name}.cu", kernel, len(slab.array), arguments)
        return result(index)


def awkward_rows(rng: np.random.Generator, n: int, d: int, distance: str) -> np.ndarray:
    """Rows with a duplicate, a near-duplicate and a zero row, of the shape the distance wants."""
    x = rng.standard_normal((n, d))
    if distance == "chi2":
        x = np.abs(x)
    if distance == "rbf":
        x /= 2 * d**0.5
    if n > 4:
        x[n // 2] = x[0]
        x[n // 3] = x[1] * (1 + 1e-3)
        x[n - 1] = 0
    if has_unit_rows(distance):
        x /= np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-9)
    return x


def label_words(rng: np.random.Generator, n: int, rule: str, classes: int = 3) -> np.ndarray:
    """Labels for a rule, one of them missing."""
    if rule == "equal":
        labels = rng.integers(0, classes, n)
    elif rule == "any":
        labels = rng.integers(0, 2, (n, 2)) << rng.integers(0, 3, (n, 2))
    else:
        labels = rng.integers(0, 2, (n, 2))
    if n > 6:
        labels.reshape(n, -1)[n // 4, 0] = -(2**63)
    return labels


def make_slabs(
    rng: np.random.Generator,
    distance: str,
    n: int,
    m: int | None,
    d: int,
    step: int,
    *,
    dtype: str = "float32",
    rule: str = "equal",
    kind: str = "negative",
) -> DistanceSlabs:
    """A batch with some pairs in common between the sides."""
    x = Operand(awkward_rows(rng, n, d, distance), label_words(rng, n, rule), dtype)
    if m is None:
        return DistanceSlabs(x, x, rule, distance, kind, step)
    rows = awkward_rows(rng, m, d, distance)
    if n > 3 and m > 3:
        rows[2] = x.values[2]
    r = Operand(rows, label_words(rng, m, rule), dtype)
    return DistanceSlabs(x, r, rule, distance, kind, step)


def as_torch(slabs: DistanceSlabs) -> tuple:
    """The leading arguments of the ops, rows in float64."""
    x, r = slabs.x, slabs.r
    sides = [torch.from_numpy(x.values), torch.from_numpy(x.labels)]
    other = [None, None]
    if not slabs.alone:
        other = [torch.from_numpy(r.values), torch.from_numpy(r.labels)]
    return (*sides, *other, slabs.rule, slabs.distance)
