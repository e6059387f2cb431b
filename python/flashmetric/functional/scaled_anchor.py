# SPDX-License-Identifier: Apache-2.0
"""Pairs of which the anchor is multiplied by a constant and the other row is not."""

import torch
from torch import Tensor

from flashmetric.checks import check_batch, check_distance
from flashmetric.distances import Metric
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Pairs
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, accumulate_dtype, has_unit_rows


def prepare_scaled_pairs(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    anchor_scale: float,
    *,
    distance: Distance | Metric,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Pairs:
    """As :func:`prepare_pairs`, of anchors ``anchor_scale`` times as long.

    Without ``ref_emb`` the batch is compared with its own rows, unscaled, and a row remains no pair
    with itself.
    """
    if anchor_scale != 1.0:
        check_distance(distance, normalize)
        if has_unit_rows(distance.kernel if isinstance(distance, Metric) else distance):
            raise ValueError(
                f"anchor_scale must be 1 with {distance!r}, which scales all rows to length 1; "
                f"got {anchor_scale}"
            )
        check_batch(embeddings, labels, ref_emb, ref_labels, indices_tuple)
        if normalize:
            embeddings, normalize = normalize_rows(embeddings), False
            ref_emb = None if ref_emb is None else normalize_rows(ref_emb)
        # Before they are scaled: half precision is widened once, and not rounded again.
        dtype = accumulate_dtype(embeddings.dtype)
        embeddings, ref_emb = embeddings.to(dtype), None if ref_emb is None else ref_emb.to(dtype)
        if ref_emb is None:
            ref_emb = embeddings
            if indices_tuple is None:
                assert labels is not None
                labels = ref_labels = _never_with_itself(labels)
        embeddings = embeddings * anchor_scale
    return prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )


def _never_with_itself(labels: Tensor | Labels) -> Labels:
    """Each row a group of its own, and positives only in other groups."""
    words, rule = labels if isinstance(labels, Labels) else (labels.long(), "equal")
    if rule != "equal" or words.ndim != 1:
        raise ValueError(
            "labels must be one class per row with anchor_scale, or come with ref_emb; "
            f"got rule {rule!r}"
        )
    rows = torch.arange(words.shape[0], device=words.device)
    return Labels(torch.stack((words, rows), 1), "group:da")
