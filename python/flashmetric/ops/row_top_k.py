# SPDX-License-Identifier: Apache-2.0
"""The k nearest, or the k farthest, pairs of a kind of every row."""

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import full_precision
from flashmetric.ops.labels import KINDS
from flashmetric.ops.nearest_beyond import in_order
from flashmetric.ops.row_sum import PAIRS
from flashmetric.ops.sweep import Batch, Pairs, sweep

library.define(f"row_top_k({PAIRS}, str kind, int k, bool farthest) -> Tensor index")


@full_precision
def row_top_k_fallback(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    k: int,
    farthest: bool,
) -> Tensor:
    """PyTorch implementation of ``flashmetric::row_top_k``.

    Returns:
        Reference indices, int64 [N, k]: those of the kind from the nearest (farthest) on, then -1.
        Of equal distances the lowest index comes first. If some row is not finite all distances
        count as equal.
    """
    batch, at = Batch.of(Pairs(query, labels, ref, ref_labels, rule, distance)), KINDS.index(kind)
    index = labels.new_full((batch.x.shape[0], k), -1)
    spoiled, place = batch.poison(), torch.arange(k, device=query.device)
    for slab in sweep(batch):
        # Not topk, which orders ties as it likes.
        _, column, count = in_order(slab, at, farthest, spoiled)
        best = column[:, :k]
        width = best.shape[1]
        index[slab.rows, :width] = best.masked_fill(place[:width] >= count, -1)
    return index


library.impl("row_top_k", row_top_k_fallback, "CompositeExplicitAutograd")
row_top_k = torch.ops.flashmetric.row_top_k.default


@torch.library.register_fake("flashmetric::row_top_k", lib=library)
def _row_top_k_fake(
    query: Tensor,
    labels: Tensor,
    ref: Tensor | None,
    ref_labels: Tensor | None,
    rule: str,
    distance: str,
    kind: str,
    k: int,
    farthest: bool,
) -> Tensor:
    return query.new_empty((query.shape[0], k), dtype=torch.int64)
