# SPDX-License-Identifier: Apache-2.0
"""For every row, the nearest pair beyond given distances, or the farthest one within them."""

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import full_precision
from flashmetric.ops.labels import KINDS
from flashmetric.ops.row_sum import PAIRS
from flashmetric.ops.sweep import Batch, Pairs, Slab, sweep

library.define(
    f"nearest_beyond({PAIRS}, str kind, bool farthest, Tensor thresholds) -> Tensor index"
)


def in_order(
    slab: Slab, kind: int, farthest: bool, spoiled: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """The candidates of each row from the nearest on, or from the farthest on; ties by index.

    In a batch with a row that is not finite all distances count as equal.

    Returns:
        Sorted keys [rows, M], the distance or minus the distance; their columns [rows, M]; numbers
        of candidates [rows, 1]. What is no candidate comes last.
    """
    mask = slab.kinds[kind]
    key = torch.where(spoiled.isnan(), 0, -slab.d if farthest else slab.d)
    key, column = key.masked_fill_(~mask, torch.inf).sort(dim=1, stable=True)
    return key, column, mask.sum(1, keepdim=True)


@full_precision
def nearest_beyond_fallback(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    farthest: bool,
    thresholds: Tensor,
) -> Tensor:
    """PyTorch implementation of ``flashmetric::nearest_beyond``.

    Thresholds [N, K] are in the dtype of distances.

    Returns:
        Reference indices, int64 [N, K]: the nearest of the kind with a distance above the
        threshold, or the farthest with one below; -1 if there is none. Ties go to the lowest
        index. If some row is not finite it is the first of the kind, for any threshold.
    """
    batch, at = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance)), KINDS.index(kind)
    index = labels.new_full(thresholds.shape, -1)
    spoiled = batch.poison()
    # Below minus the distance is beyond it, seen from the far end.
    limits = torch.where(spoiled.isnan(), -torch.inf, -thresholds if farthest else thresholds)
    for slab in sweep(batch):
        rows = slab.rows
        key, column, count = in_order(slab, at, farthest, spoiled)
        place = torch.searchsorted(key, limits[rows].contiguous(), right=True)
        found = column.gather(1, place.clamp(max=column.shape[1] - 1))
        index[rows] = found.masked_fill_(place >= count, -1)
    return index


library.impl("nearest_beyond", nearest_beyond_fallback, "CompositeExplicitAutograd")
nearest_beyond = torch.ops.flashmetric.nearest_beyond.default


@torch.library.register_fake("flashmetric::nearest_beyond", lib=library)
def _nearest_beyond_fake(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    farthest: bool,
    thresholds: Tensor,
) -> Tensor:
    return query.new_empty(thresholds.shape, dtype=torch.int64)
