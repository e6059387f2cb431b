# SPDX-License-Identifier: Apache-2.0
"""Distances and kinds of all pairs, a slab of rows at a time, for miners that sample or sort.

Unlike the kernels' own sweeps these never wait for the device. Near pairs are not measured by
differences: the inner products are in float64 instead.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.miners.mined_pairs import not_finite
from flashmetric.ops.distance import (
    exact_u,
    has_unit_rows,
    is_difference,
    is_direct,
    slabs,
    squared_norms,
    value,
)
from flashmetric.ops.labels import pair_kinds


class RowSlab(NamedTuple):
    """The pairs of a few anchors with all references; matrices are [rows, M]."""

    rows: slice
    positive: Tensor
    """Which pairs are positives, bool."""
    negative: Tensor
    distance: Tensor
    """float64, NaN with rows that are not finite; of no meaning where none were asked for."""


def row_slabs(pairs: AllPairs, measured: bool = True) -> Iterator[RowSlab]:
    """All pairs in slabs, with their distances if ``measured``."""
    x = pairs.embeddings.double()
    r = x if pairs.ref_emb is None else pairs.ref_emb.double()
    bad_x = not_finite(pairs.embeddings)
    bad_r = bad_x if pairs.ref_emb is None else not_finite(pairs.ref_emb)
    if is_difference(pairs.distance) and not has_unit_rows(pairs.distance) and len(r):
        # A move changes no difference; near the origin products cancel less.
        centre = r.masked_fill(bad_r.unsqueeze(1), 0).mean(0)
        x, r = x - centre, r - centre
    labels = pairs.labels
    ref_labels = labels if pairs.ref_labels is None else pairs.ref_labels
    width = max(1, r.shape[0])
    elements = width * x.shape[1] if is_direct(pairs.distance) and measured else width
    for rows in slabs(x.shape[0] if r.shape[0] else 0, elements):
        positive, negative = pair_kinds(labels[rows], ref_labels, pairs.rule)
        if pairs.ref_emb is None:
            for mask in (positive, negative):
                mask.diagonal(rows.start).fill_(False)
        d = _distances(x[rows], r, pairs.distance) if measured else x.new_empty(0)
        if measured and pairs.anchor_scale is not None:
            d = d * pairs.anchor_scale[rows, None]
        if measured:
            d = d.masked_fill(bad_x[rows, None] | bad_r, torch.nan)
        yield RowSlab(rows, positive, negative, d)


def listed(
    pairs: AllPairs, choose: Callable[[RowSlab], tuple[Tensor, Tensor]]
) -> tuple[Tensor, ...]:
    """Pairs (a1, p, a2, n) that ``choose`` marks, in row order; waits for the device to count.

    Args:
        pairs: all pairs.
        choose: of a slab, which entries are chosen positives and which negatives, bool.
    """
    nothing = torch.empty(0, dtype=torch.int64, device=pairs.embeddings.device)
    found: tuple[list[Tensor], ...] = tuple([nothing] for _ in range(4))
    for slab in row_slabs(pairs):
        places = (torch.where(mask) for mask in choose(slab))
        parts = [part for rows, others in places for part in (rows + slab.rows.start, others)]
        for column, part in zip(found, parts, strict=True):
            column.append(part)
    return tuple(torch.cat(column) for column in found)


def _distances(x: Tensor, r: Tensor, distance: str) -> Tensor:
    if is_direct(distance):
        return value(exact_u(x.unsqueeze(1), r, distance), distance)
    u = torch.mm(x, r.T).mul_(-2)
    if is_difference(distance):
        sizes = squared_norms(x).unsqueeze(1) + squared_norms(r)
        u.add_(sizes)
        # Within the rounding of the products, so that duplicates of a row are at distance 0.
        u.masked_fill_(u < sizes.mul_(8 * torch.finfo(u.dtype).eps), 0)
        if has_unit_rows(distance):
            u.masked_fill_(~(x.any(1, keepdim=True) & r.any(1)), 2)
    return value(u, distance)


def nth(mask: Tensor, rank: Tensor) -> Tensor:
    """Columns of the entries of ``mask`` [rows, M] with the given ranks [rows, K], from 0 on."""
    return torch.searchsorted(mask.cumsum(1), rank + 1).clamp(max=mask.shape[1] - 1)


def uniform(pairs: AllPairs, shape: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
    """Numbers from 0 to 1, float64, which do not depend on how rows are split into slabs."""
    device = pairs.embeddings.device
    source = device if generator is None else generator.device
    numbers = torch.rand(shape, generator=generator, device=source, dtype=torch.float64)
    return numbers.to(device)


def random_rank(numbers: Tensor, count: Tensor) -> Tensor:
    """Ranks below ``count``, int64, from uniform numbers."""
    return torch.minimum((numbers * count).long(), count - 1).clamp(min=0)
