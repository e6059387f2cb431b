# SPDX-License-Identifier: Apache-2.0
"""row_sum and row_lse of the slab engine in the PTX interpreter: the host's part in numpy."""

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from cuda_rows import Terms
from flashmetric.ops.distance import is_difference
from pair_kernels import number, result, unwritten
from ptx_interpreter import Struct
from select_kernels import DistanceSlabs, make_slabs
from slab_kernels import symbol

Role = dict[str, np.ndarray]


@dataclass
class RowSlabs(DistanceSlabs):
    """A batch whose pairs of both kinds are reduced row by row."""

    @property
    def parts(self) -> tuple[int, int]:
        """Rows of either side."""
        return len(self.x.rows), len(self.r.rows)

    def terms(self, terms: Terms) -> Terms:
        """Numbers in the accumulate type."""
        return replace(terms, type=self.type.type)

    def pairs(
        self,
        begin: int,
        swapped: bool,
        form: Struct,
        own: Struct | None,
        other: Struct | None,
    ) -> Struct:
        """The structure SlabRowPairs."""
        off = Terms(type=self.type.type).role(False, 0)
        return Struct(
            [self.problem(begin, swapped), self.labelling(), form, own or off, other or off]
        )

    def row_sum(self, terms: Terms, *, grad: bool = True) -> dict[str, np.ndarray]:
        """Statistics of the queries, and the gradients [2, rows, d] of their totals."""
        terms, n, t = self.terms(terms), self.parts[0], self.type
        out = {"sums": unwritten((2, n), t), "counts": unwritten((4, n), np.int64)}
        out["slopes"] = unwritten((4, n), t)
        form, own = terms.form(logits=False), terms.role(True, n)
        for begin in self.slabs():
            slab, _ = self.distances(begin)
            pairs = self.pairs(begin, False, form, own, None)
            arguments = Struct([pairs, slab.array, *out.values()])
            kernel = symbol("slab_row_sum", t.name)
            self.launch("slab_row_sum.cu", kernel, len(slab.array), arguments)
        found = {name: result(buffer) for name, buffer in out.items()}
        if grad:
            other = own if self.alone else None
            found["grad_query"] = self._totals(False, form, own, other)
            if not self.alone:
                found["grad_ref"] = self._totals(True, form, None, own)
        return found

    def row_sum_backward(
        self, terms: Terms, grad: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Gradients of weighted sums."""
        return self._weighted(terms, {"weight": grad}, None, logits=False)

    def row_lse(self, terms: Terms, *, of_refs: bool = False) -> dict[str, np.ndarray]:
        """Log-sum-exps of the queries or of the references."""
        terms, n, t = self.terms(terms), self.parts[of_refs], self.type
        out = {"lse": unwritten((2, n), t), "mean": unwritten((2, n), t)}
        out["counts"] = unwritten((2, n), np.int64)
        form, own = terms.form(logits=True), terms.role(True, n)
        for begin in self.slabs(of_refs):
            slab, _ = self.distances(begin, of_refs)
            pairs = self.pairs(begin, of_refs, form, own, None)
            arguments = Struct([pairs, slab.array, *out.values()])
            kernel = symbol("slab_row_lse", t.name)
            self.launch("slab_row_lse.cu", kernel, len(slab.array), arguments)
        return {name: result(buffer) for name, buffer in out.items()}

    def row_lse_backward(
        self, terms: Terms, of_query: Role, of_ref: Role | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        """Gradients of weighted log-sum-exps; roles hold weight and lse."""
        return self._weighted(terms, of_query, of_ref, logits=True)

    def _weighted(
        self, terms: Terms, of_query: Role, of_ref: Role | None, *, logits: bool
    ) -> tuple[np.ndarray, np.ndarray | None]:
        terms, (n, m) = self.terms(terms), self.parts

        def role(rows: int, numbers: Role) -> Struct:
            typed = {name: value.astype(self.type) for name, value in numbers.items()}
            return terms.role(True, rows, **typed)

        form, query = terms.form(logits=logits), role(n, of_query)
        ref = None if of_ref is None else role(m, of_ref)
        other = query if self.alone else ref
        grad = unwritten((n, self.x.rows.shape[1]), self.x.raw.dtype)
        self._gradient_of(False, form, (query, other), logits, (True, True), grad)
        if self.alone:
            return result(grad), None
        grad_ref = unwritten((m, self.x.rows.shape[1]), self.x.raw.dtype)
        self._gradient_of(True, form, (ref, query), logits, (True, True), grad_ref)
        return result(grad), result(grad_ref)

    def _totals(
        self, swapped: bool, form: Struct, own: Struct | None, other: Struct | None
    ) -> np.ndarray:
        n, d = len(self.sides(swapped)[0].rows), self.x.rows.shape[1]
        grads = [unwritten((n, d), self.type) for _ in range(2)]
        self._gradient_of(swapped, form, (own, other), False, None, *grads)
        return np.stack([result(grad) for grad in grads])

    def _gradient_of(
        self,
        swapped: bool,
        form: Struct,
        roles: tuple[Struct | None, Struct | None],
        logits: bool,
        wanted: tuple[bool, bool] | None,
        *grads: Any,
    ) -> None:
        """Weights and back-products; ``wanted`` None: one kind after the other from one slab."""
        m, t = len(self.sides(swapped)[1].rows), self.type
        for begin in self.slabs(swapped):
            slab, near = self.distances(begin, swapped, is_difference(self.distance))
            rows = len(slab.array)
            for k, grad in enumerate(grads):
                kinds = (k == 0, k == 1) if wanted is None else wanted
                weight, total = unwritten((rows, m), t), unwritten(rows, np.float64)
                chosen = None
                if near is not None:
                    chosen = unwritten((rows, number("slab_near_words", m)), np.uint32)
                pairs = self.pairs(begin, swapped, form, *roles)
                flags = [np.bool_(logits), [np.bool_(kind) for kind in kinds]]
                arguments = Struct([pairs, *flags, slab, near, chosen, weight, total])
                kernel = symbol("slab_row_weigh", t.name)
                self.launch("slab_row_grad.cu", kernel, rows, arguments)
                marks = None if chosen is None else result(chosen)
                self.write_gradient(
                    begin, swapped, slab, marks, result(weight), result(total), grad
                )


def make_row_slabs(*args: Any, **options: Any) -> RowSlabs:
    """As make_slabs, pairs of both kinds."""
    made = make_slabs(*args, **options)
    return RowSlabs(made.x, made.r, made.rule, made.distance, "both", made.step)
