# SPDX-License-Identifier: Apache-2.0
"""The losses as a textbook writes them: the oracle that every fast path is tested against.

Nothing here is tuned. Distances come from explicit differences, so a batch of N rows with M
references and D features takes O(N M D) memory, and the gradients are those of plain autograd.
Use it to read what a loss means, or to check a result; use :mod:`flashmetric.functional` to train.

Float16 and bfloat16 rows are computed in float32, and their gradients come back in their own type.
"""

from typing import Literal

import torch
from torch import Tensor

from flashmetric.functional.dense_pairs import dense
from flashmetric.indices import PairIndices, TripletIndices

Distance = Literal["euclidean", "sqeuclidean", "cosine", "dot"]
TripletReduction = Literal["mean", "mean_nonzero", "sum", "none"]
ContrastiveReduction = Literal["mean", "mean_separate", "mean_nonzero", "sum", "none"]

__all__ = ["contrastive_loss", "dense", "pairwise_distance", "triplet_margin_loss"]


def pairwise_distance(x: Tensor, r: Tensor, distance: Distance = "euclidean") -> Tensor:
    r"""Distance of every row of ``x`` to every row of ``r``; smaller always means closer.

    .. math::
        d_\text{euclidean} = \lVert x_i - r_j \rVert, \quad
        d_\text{sqeuclidean} = \lVert x_i - r_j \rVert^2, \quad
        d_\text{cosine} = 1 - \hat x_i \cdot \hat r_j, \quad
        d_\text{dot} = - x_i \cdot r_j

    with :math:`\hat x = x / \lVert x \rVert`. The Euclidean distance has gradient 0 where it is 0.
    The cosine distance of a zero row is 1, with gradient 0.

    Args:
        x: rows, shape [N, D].
        r: references, shape [M, D].
        distance: ``"euclidean"``, ``"sqeuclidean"``, ``"cosine"`` or ``"dot"``.

    Returns:
        Distances, shape [N, M]: float64 for float64 rows, otherwise float32.

    Raises:
        ValueError: if ``distance`` is none of the four names.
    """
    x, r = _prepare(x, distance, False), _prepare(r, distance, False)
    return _row_distance(x[:, None, :], r[None, :, :], distance)


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    distance: Distance = "euclidean",
    mining: Literal["batch_hard"] = "batch_hard",
    smooth: bool = False,
    swap: bool = False,
    reduction: TripletReduction = "mean",
    empty: Literal["skip", "keep"] = "skip",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Triplet margin loss over the hardest pairs of each anchor, or over given triplets.

    .. math::
        v = d(a, p) - d(a, n) + \text{margin}, \qquad
        \ell = \max(v, 0) \quad\text{or, if smooth,}\quad \ell = \log(1 + e^v)

    ``mining="batch_hard"`` takes for each anchor the farthest row of its own label and the nearest
    row of any other label; equal distances go to the lowest index. If a row of the batch is not
    finite, or four times its squared length is not, every mined distance is NaN, and with it the
    loss, even where only anchors to skip have found a pair.

    Args:
        embeddings: anchors, shape [N, D].
        labels: their labels, shape [N]; may be None with ``indices_tuple``.
        margin: how much farther the negative should be than the positive.
        distance: see :func:`pairwise_distance`.
        mining: ``"batch_hard"``; unused with ``indices_tuple``.
        smooth: softplus in place of the hinge; the margin stays inside.
        swap: replace d(a, n) by d(p, n) where that is strictly smaller.
        reduction: ``"mean"`` over the valid anchors (or all given triplets), ``"mean_nonzero"``
            over those with a loss above 0, ``"sum"``, or ``"none"``.
        empty: ``"skip"`` leaves out anchors without a positive or without a negative. ``"keep"``
            counts them: a missing positive has distance 0, a missing negative is as far as the
            positive.
        normalize: scale every row to length 1 first; a zero row stays zero.
        ref_emb: rows that positives and negatives come from, shape [M, D]. Default: ``embeddings``
            itself, without the pair of a row with itself. Given references exclude nothing.
        ref_labels: their labels, shape [M].
        indices_tuple: triplets (a, p, n), or pairs (a1, p, a2, n) of which every positive pair
            meets every negative pair of the same anchor, positive pair by positive pair. ``a``
            indexes ``embeddings``, ``p`` and ``n`` index the references.

    Returns:
        A scalar; for ``"none"`` shape [N] with 0 for skipped anchors, or [T] for T given triplets.
        With nothing to average the loss is 0 and still back-propagates, a zero gradient.

    Raises:
        ValueError: for an unknown option, or labels or indices that are missing or malformed.
    """
    _check_option("mining", mining, ("batch_hard",))
    _check_option("reduction", reduction, ("mean", "mean_nonzero", "sum", "none"))
    _check_option("empty", empty, ("skip", "keep"))
    x = _prepare(embeddings, distance, normalize)
    r = x if ref_emb is None else _prepare(ref_emb, distance, normalize)

    if indices_tuple is not None:
        anchor, positive, negative = _as_triplets(indices_tuple)
        trusted = True
    else:
        same, different = _pair_masks(labels, ref_emb, ref_labels)
        anchor, positive, negative = _batch_hard(x, r, distance, same, different)
        trusted = _all_finite(x, r)
        if empty == "skip":
            # A NaN distance shows also if it is the only one that an anchor has.
            has_positive, has_negative = positive >= 0, negative >= 0
            valid = has_positive & has_negative if trusted else has_positive | has_negative
            anchor, positive, negative = anchor[valid], positive[valid], negative[valid]

    d_ap = _listed_distance(x, r, anchor, positive, distance, trusted)
    d_an = _listed_distance(x, r, anchor, negative, distance, trusted)
    d_an = torch.where(negative >= 0, d_an, d_ap)
    if swap:
        d_pn = _listed_distance(r, r, positive, negative, distance, trusted)
        complete = (positive >= 0) & (negative >= 0)
        d_an = torch.where(complete & (d_pn < d_an), d_pn, d_an)

    violation = d_ap - d_an + margin  # [T]
    # log(1 + e^v); torch's softplus is only approximate above its threshold.
    smoothed = torch.logaddexp(violation, torch.zeros_like(violation))
    loss = smoothed if smooth else torch.relu(violation)

    if reduction == "none":
        return loss if indices_tuple is not None else _sum_by_row(loss, anchor, len(x))
    if reduction == "sum":
        return loss.sum()
    count = (loss > 0).sum() if reduction == "mean_nonzero" else loss.numel()
    return _mean(loss, count)


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    distance: Distance = "euclidean",
    power: Literal[1, 2] = 1,
    scale: float = 1.0,
    reduction: ContrastiveReduction = "mean_nonzero",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss over all ordered pairs, or over given pairs.

    .. math::
        \ell_{ij} = \text{scale} \cdot \begin{cases}
            \max(d_{ij} - \text{pos\_margin},\, 0)^\text{power} & \text{same label} \\
            \max(\text{neg\_margin} - d_{ij},\, 0)^\text{power} & \text{other label}
        \end{cases}

    If a row of the batch is not finite, or four times its squared length is not, every pair taken
    from the labels is NaN.

    Args:
        embeddings: anchors, shape [N, D].
        labels: their labels, shape [N]; may be None with ``indices_tuple``.
        pos_margin: positives closer than this cost nothing.
        neg_margin: negatives farther than this cost nothing.
        distance: see :func:`pairwise_distance`.
        power: 1 for the hinge, 2 for the squared hinge.
        scale: factor on every pair.
        reduction: ``"mean"`` over all pairs together; ``"mean_separate"`` is the mean over the
            positives plus the mean over the negatives; ``"mean_nonzero"`` likewise, each over its
            pairs with a loss above 0; ``"sum"``; ``"none"`` is the sum over each anchor's pairs.
        normalize: scale every row to length 1 first; a zero row stays zero.
        ref_emb: rows that the anchors are paired with, shape [M, D]. Default: ``embeddings``
            itself, without the pair of a row with itself. Given references exclude nothing.
        ref_labels: their labels, shape [M].
        indices_tuple: pairs (a1, p, a2, n), or triplets (a, p, n) read as the pairs (a, p) and
            (a, n). Repeated pairs count as often as they occur.

    Returns:
        A scalar, or shape [N] for ``"none"``. Without any pair it is 0 and still back-propagates,
        a zero gradient.

    Raises:
        ValueError: for an unknown option, or labels or indices that are missing or malformed.
    """
    _check_option("power", power, (1, 2))
    _check_option("reduction", reduction, ("mean", "mean_separate", "mean_nonzero", "sum", "none"))
    x = _prepare(embeddings, distance, normalize)
    r = x if ref_emb is None else _prepare(ref_emb, distance, normalize)

    if indices_tuple is not None:
        a1, p, a2, n = _as_pairs(indices_tuple)
        trusted = True
    else:
        same, different = _pair_masks(labels, ref_emb, ref_labels)
        a1, p = same.nonzero(as_tuple=True)
        a2, n = different.nonzero(as_tuple=True)
        trusted = _all_finite(x, r)

    d_pos = _listed_distance(x, r, a1, p, distance, trusted)
    d_neg = _listed_distance(x, r, a2, n, distance, trusted)
    pos = torch.relu(d_pos - pos_margin) ** power  # [P]
    neg = torch.relu(neg_margin - d_neg) ** power  # [Q]

    if reduction == "none":
        return scale * (_sum_by_row(pos, a1, len(x)) + _sum_by_row(neg, a2, len(x)))
    if reduction == "sum":
        return scale * (pos.sum() + neg.sum())
    if reduction == "mean":
        return scale * _mean(torch.cat([pos, neg]), pos.numel() + neg.numel())
    if reduction == "mean_separate":
        return scale * (_mean(pos, pos.numel()) + _mean(neg, neg.numel()))
    return scale * (_mean(pos, (pos > 0).sum()) + _mean(neg, (neg > 0).sum()))


def _prepare(x: Tensor, distance: Distance, normalize: bool) -> Tensor:
    """Rows in the type to compute in, scaled to unit length where the distance needs it."""
    _check_option("distance", distance, ("euclidean", "sqeuclidean", "cosine", "dot"))
    if x.ndim != 2:
        raise ValueError(f"embeddings must have shape [N, D], got {tuple(x.shape)}")
    x = x if x.dtype == torch.float64 else x.float()
    return _unit_rows(x) if normalize or distance == "cosine" else x


def _unit_rows(x: Tensor) -> Tensor:
    """Each row over its length; a zero row stays zero and gets no gradient."""
    # Dividing by the largest magnitude first keeps the squares of huge and tiny rows representable.
    # The result does not depend on that factor: it is a constant to autograd. The column of zeros
    # gives rows without features a largest magnitude as well.
    size = torch.nn.functional.pad(x.detach().abs(), (0, 1)).amax(dim=1, keepdim=True)
    zero = size == 0
    scaled = x / torch.where(zero, 1.0, size)
    length = torch.where(zero, 1.0, (scaled**2).sum(dim=1, keepdim=True)).sqrt()
    return torch.where(zero, 0.0, scaled / length)


def _row_distance(x: Tensor, r: Tensor, distance: Distance) -> Tensor:
    """Distance between matching rows of two tensors that broadcast, last dimension D."""
    if distance == "dot":
        return -(x * r).sum(dim=-1)
    squared = ((x - r) ** 2).sum(dim=-1)
    if distance == "sqeuclidean":
        return squared
    if distance == "cosine":
        # For unit rows 1 - x.r = |x - r|^2 / 2, which stays exact for nearly equal rows.
        zero_row = (x == 0).all(dim=-1) | (r == 0).all(dim=-1)
        return torch.where(zero_row, 1.0, squared / 2)
    # The square root has an infinite slope at 0, and 0 * inf would be NaN: the root is taken of 1
    # there instead, which the outer `where` then replaces, gradient included.
    coincide = squared == 0
    return torch.where(coincide, 0.0, torch.where(coincide, 1.0, squared).sqrt())


def _listed_distance(
    x: Tensor, r: Tensor, i: Tensor, j: Tensor, distance: Distance, trusted: bool
) -> Tensor:
    """Distances of the pairs (i, j); an index of -1 gives 0. NaN unless ``trusted``."""
    present = (i >= 0) & (j >= 0)
    found = _row_distance(x[i[present]], r[j[present]], distance)
    result = found.new_zeros(j.shape)
    result[present] = found if trusted else found * torch.nan
    return result


def _all_finite(x: Tensor, r: Tensor) -> bool:
    """Whether all rows are finite, and short enough that no squared distance overflows."""
    return all(bool((4 * (rows.detach() ** 2).sum(dim=1)).isfinite().all()) for rows in (x, r))


def _pair_masks(
    labels: Tensor | None, ref_emb: Tensor | None, ref_labels: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Boolean masks [N, M] of the positive and of the negative pairs."""
    if labels is None:
        raise ValueError("labels are required unless indices_tuple is given")
    if (ref_emb is None) != (ref_labels is None):
        raise ValueError("ref_emb and ref_labels must be given together")
    if ref_labels is not None:
        same = labels[:, None] == ref_labels[None, :]
        return same, ~same
    same = labels[:, None] == labels[None, :]
    return same & ~torch.eye(len(labels), dtype=torch.bool, device=labels.device), ~same


@torch.no_grad()
def _batch_hard(
    x: Tensor, r: Tensor, distance: Distance, same: Tensor, different: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Every anchor with its farthest positive and nearest negative, -1 for a missing one."""
    anchor = torch.arange(len(x), device=x.device)
    if len(r) == 0:
        return anchor, torch.full_like(anchor, -1), torch.full_like(anchor, -1)
    d = _row_distance(x[:, None, :], r[None, :, :], distance)
    # argmax and argmin return the first of equal entries, which is the rule for ties.
    positive = torch.where(same, d, -torch.inf).argmax(dim=1)
    negative = torch.where(different, d, torch.inf).argmin(dim=1)
    positive = torch.where(same.any(dim=1), positive, -1)
    return anchor, positive, torch.where(different.any(dim=1), negative, -1)


def _as_triplets(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    if isinstance(indices, (TripletIndices, PairIndices)):
        indices = indices.indices()
    if len(indices) == 3:
        anchor, positive, negative = indices
        return anchor, positive, negative
    a1, positive, a2, negative = _as_pairs(indices)
    i, j = (a1[:, None] == a2[None, :]).nonzero(as_tuple=True)
    return a1[i], positive[i], negative[j]


def _as_pairs(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    if isinstance(indices, (TripletIndices, PairIndices)):
        indices = indices.indices()
    if len(indices) == 3:
        anchor, positive, negative = indices
        return anchor, positive, anchor, negative
    if len(indices) == 4:
        a1, positive, a2, negative = indices
        return a1, positive, a2, negative
    raise ValueError(f"indices_tuple must hold 3 or 4 tensors, got {len(indices)}")


def _sum_by_row(values: Tensor, row: Tensor, rows: int) -> Tensor:
    return values.new_zeros(rows).index_add(0, row, values)


def _mean(values: Tensor, count: Tensor | int) -> Tensor:
    """Sum over ``count``, and 0 where there is nothing to count. A NaN among them shows."""
    return values.sum() / (count.clamp(min=1) if isinstance(count, Tensor) else max(count, 1))


def _check_option(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name} must be one of {allowed}, got {value!r}")
