# SPDX-License-Identifier: Apache-2.0
"""Sweeps over all pairs of a batch for the PyTorch implementations, a slab of rows at a time.

:func:`sweep` yields the distances of a few query rows to all references; :class:`BackProduct` turns
weights on such slabs into gradients of the rows. No more than a slab of the matrix exists at once.
"""

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmetric.ops.distance import (
    NEAR,
    accumulate_dtype,
    du_dx,
    exact_u,
    has_unit_rows,
    is_difference,
    is_direct,
    poison,
    slabs,
    slope,
    squared_norms,
    value,
)
from flashmetric.ops.labels import pair_kinds
from flashmetric.ops.ordered_sum import add_product


class Pairs(NamedTuple):
    """What every op on all pairs begins with, as it was passed."""

    query: Tensor
    labels: Tensor
    ref: Tensor | None
    ref_labels: Tensor | None
    rule: str
    distance: str


class Batch(NamedTuple):
    """Both sides of a batch in the accumulation dtype."""

    pairs: Pairs
    x: Tensor
    x_moved: Tensor
    """Rows for products: for differences, near the origin, where the products cancel less."""
    x_norms: Tensor
    r: Tensor
    r_moved: Tensor
    r_norms: Tensor
    alone: bool
    """One self-batch: r is x, and a row is no pair with itself."""

    @classmethod
    def of(cls, pairs: Pairs) -> "Batch":
        """Widen the rows, and move them to their mean."""
        x = pairs.query.to(accumulate_dtype(pairs.query.dtype))
        alone = pairs.ref is None
        r = x if pairs.ref is None else pairs.ref.to(x.dtype)
        x_moved, r_moved = x, r
        if is_difference(pairs.distance) and r.shape[0]:
            # Any point will do: a move changes no difference.
            centre = r.mean(0)
            x_moved = x - centre
            r_moved = x_moved if alone else r - centre
        x_norms = squared_norms(x)
        r_norms = x_norms if alone else squared_norms(r)
        return cls(pairs, x, x_moved, x_norms, r, r_moved, r_norms, alone)

    def has_pairs(self) -> bool:
        """Whether there is any pair, of whatever kind."""
        return self.x.shape[0] > self.alone and self.r.shape[0] > 0

    def poison(self) -> Tensor:
        """0-d tensor: NaN if some row is not finite and there is any pair to show it, else 0."""
        return poison(self.x_norms, self.r_norms) if self.has_pairs() else self.x.new_zeros(())


class Slab(NamedTuple):
    """The pairs of a few query rows with all reference rows; matrices are [rows, M]."""

    rows: slice
    kinds: tuple[Tensor, Tensor]
    """Which pairs are positives and which are negatives."""
    d: Tensor
    """Distances."""
    near: tuple[Tensor, Tensor]
    """Row and column numbers of the pairs measured by exact differences."""
    apart: Tensor | None
    """Pairs with a zero row where rows have unit length: at a constant distance."""


def sweep(batch: Batch) -> Iterator[Slab]:
    """Distances of all pairs, in slabs that fit the caches."""
    pairs, distance = batch.pairs, batch.pairs.distance
    n, m = batch.x.shape[0], batch.r.shape[0]
    ref_labels = pairs.labels if pairs.ref_labels is None else pairs.ref_labels
    x_norms, r_norms = squared_norms(batch.x_moved), squared_norms(batch.r_moved)
    # Direct distances need the features of all pairs of a slab at once.
    row_elements = m * batch.x.shape[1] if is_direct(distance) else m
    for rows in slabs(n if batch.has_pairs() else 0, row_elements):
        kinds = pair_kinds(pairs.labels[rows], ref_labels, pairs.rule)
        if batch.alone:
            for mask in kinds:
                mask[:, rows].fill_diagonal_(False)
        x = batch.x[rows]
        near = kinds[0].new_empty((0, 2), dtype=torch.int64)
        apart = None
        if is_direct(distance):
            u = exact_u(x.unsqueeze(1), batch.r, distance)
        else:
            x_moved = batch.x_moved[rows]
            u = add_product(x.new_zeros((x.shape[0], m)), x_moved, batch.r_moved.T, -2)
        if is_difference(distance):
            sizes = x_norms[rows, None] + r_norms
            u.add_(sizes)
            close = u < sizes.mul_(NEAR)
            if distance == "angular":
                # The angle is as sensitive to u at pi as at 0, and has no slope there, either.
                close |= u > 4 - 2 * NEAR
            near = close.logical_and_(kinds[0] | kinds[1]).nonzero()
        i, j = near.unbind(1)
        for part in slabs(len(i), x.shape[1]):
            u[i[part], j[part]] = exact_u(x[i[part]], batch.r[j[part]], distance)
        if has_unit_rows(distance):
            apart = (batch.x_norms[rows, None] == 0).logical_or(batch.r_norms == 0)
            u.masked_fill_(apart, 2)
        yield Slab(rows, kinds, value(u, distance), (i, j), apart)


class BackProduct:
    """Gradients in the rows of a weighted sum of distances, gathered slab by slab."""

    def __init__(self, batch: Batch, grad_query: Tensor, grad_ref: Tensor | None) -> None:
        """Gradients are added to ``grad_query`` [N, D] and, if given, ``grad_ref`` [M, D]."""
        self._batch, self._grad_query, self._grad_ref = batch, grad_query, grad_ref

    def add(self, slab: Slab, weight: Tensor) -> None:
        """Add the gradients of sum(weight * d), weight [rows, M]; weights must be finite."""
        batch, distance = self._batch, self._batch.pairs.distance
        weight = weight * slope(slab.d, distance)
        if slab.apart is not None:
            weight.masked_fill_(slab.apart, 0)
        if is_direct(distance):
            self._add_direct(slab.rows, weight)
            return
        rows, (i, j) = slab.rows, slab.near
        x, r, out, grad_ref = batch.x_moved[rows], batch.r_moved, self._grad_query[rows], None
        near_weight = weight[i, j].unsqueeze(1)
        if len(i):
            weight = weight.index_put((i, j), weight.new_zeros(()))
        add_product(out, weight, r, -2)
        if self._grad_ref is not None:
            grad_ref = self._grad_ref
            add_product(grad_ref, weight.T, x, -2)
        if is_difference(distance):
            out.addcmul_(weight.sum(1, keepdim=True), x, value=2)
            if grad_ref is not None:
                grad_ref.addcmul_(weight.sum(0).unsqueeze(1), r, value=2)
        for part in slabs(len(i), x.shape[1]):
            step = du_dx(batch.x[rows][i[part]], batch.r[j[part]], distance)
            step.mul_(near_weight[part])
            out.index_add_(0, i[part], step)
            if grad_ref is not None:
                grad_ref.index_add_(0, j[part], step, alpha=-1)

    def _add_direct(self, rows: slice, weight: Tensor) -> None:
        x, r, distance = self._batch.x[rows], self._batch.r, self._batch.pairs.distance
        step = du_dx(x.unsqueeze(1), r, distance)
        self._grad_query[rows].add_(torch.einsum("nm,nmd->nd", weight, step))
        if self._grad_ref is not None:
            step = du_dx(r, x.unsqueeze(1), distance)
            self._grad_ref.add_(torch.einsum("nm,nmd->md", weight, step))
