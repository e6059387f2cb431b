# SPDX-License-Identifier: Apache-2.0
"""Triplet margin loss with batch-hard mining, or over given triplets."""

from collections.abc import Callable
from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import (
    Batch,
    check_batch,
    check_choice,
    check_distance,
    check_flag,
    check_indices,
    check_number,
)
from flashmetric.functional.normalize import normalize_rows
from flashmetric.ops import Hardest, HardestTriplets, PairDistance
from flashmetric.ops.distance import Distance
from flashmetric.ops.hardest_triplets import reduce_triplets, triplet_hinge

Mining = Literal["batch_hard"]
Reduction = Literal["mean", "mean_nonzero", "sum", "none"]
Empty = Literal["skip", "keep"]
_MINING, _REDUCTION, _EMPTY = get_args(Mining), get_args(Reduction), get_args(Empty)
_hardest: Callable[..., tuple[Tensor, Tensor]] = Hardest.apply
_hardest_triplets: Callable[..., Tensor] = HardestTriplets.apply
_pair_distance: Callable[..., Tensor] = PairDistance.apply


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | None = None,
    *,
    margin: float = 0.2,
    distance: Distance = "euclidean",
    mining: Mining = "batch_hard",
    smooth: bool = False,
    swap: bool = False,
    reduction: Reduction = "mean",
    empty: Empty = "skip",
    normalize: bool = False,
    exact: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Triplet margin loss over the hardest positive and negative of every anchor.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels
        d_ap = d.masked_fill(~same | torch.eye(len(d), dtype=torch.bool), -torch.inf).amax(1)
        d_an = d.masked_fill(same, torch.inf).amin(1)
        valid = d_ap.isfinite() & d_an.isfinite()
        loss = (d_ap - d_an + margin)[valid].relu().mean()

    .. math::
        v_a = d(a, p_a) - d(a, n_a) + \text{margin}, \quad
        \ell_a = \max(v_a, 0) \ \text{ or, if smooth, } \ \log(1 + e^{v_a})

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool. May be None with
            ``indices_tuple``.
        margin: how much farther than the positive the negative should be, in the unit of the
            distance. Default: 0.2.
        distance: ``"euclidean"`` (default), ``"sqeuclidean"``, ``"cosine"`` (1 - cosine, rows are
            normalised first) or ``"dot"`` (minus the inner product).
        mining: ``"batch_hard"``, the farthest positive and the nearest negative of each anchor.
            Ignored with ``indices_tuple``.
        smooth: softplus in place of the hinge. Default: False.
        swap: use the distance of positive and negative where that is smaller than the distance of
            anchor and negative. Default: False.
        reduction: ``"mean"`` (default) over all valid anchors or given triplets;
            ``"mean_nonzero"`` over those with a loss above 0; ``"sum"``; ``"none"``.
        empty: ``"skip"`` (default) leaves out anchors without a positive or without a negative;
            ``"keep"`` counts every anchor: a missing positive has distance 0, a missing negative is
            as far as the positive.
        normalize: scale rows to unit length first, see :func:`normalize_rows`. Default: False.
        exact: compare every candidate by its exact distance, see Ties and Cost. Ignored with
            ``indices_tuple``. Default: False.
        ref_emb: rows to take positives and negatives from, shape [M, D], dtype of ``embeddings``.
            Default: the anchors themselves, a row being no pair with itself. Given references
            exclude no pair, whatever object they are.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: int64 row numbers that replace the mining: triplets (a, p, n), or pairs
            (a1, p, a2, n), whose positive and negative pairs are joined on equal anchors. ``a``
            indexes ``embeddings``, ``p`` and ``n`` index ``ref_emb`` if given, else ``embeddings``.

    Returns:
        A scalar; with ``reduction="none"`` shape [N] (0 for skipped anchors) or [T] for T given
        triplets. float32, or float64 for float64 embeddings. Without any valid triplet it is 0 and
        back-propagates zeros. NaN or infinite rows, and rows so long that four times the squared
        length overflows, make the mined loss NaN, also where only skipped anchors found a pair.
        There are no second derivatives.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties:
        Equal distances select the lowest row number. Candidates are compared by
        ``|r|^2 - 2 x.r`` in the dtype of the result: distances that differ by no more than its
        rounding count as equal. Those that enter the loss are recomputed from differences. With
        ``exact`` all candidates are: the selected rows are those that ``argmax`` and ``argmin``
        find among the distances of the differences (``"dot"``: among the inner products, each
        summed by itself) in the dtype of the result. It is for rows far from the origin
        compared with their spread, and for results that must not depend on how keys round.
        Coinciding rows have distance 0 and gradient 0. The hinge is active strictly above 0.

    Determinism:
        Bitwise reproducible from run to run, forward and backward: on the CPU for any number of
        threads, on CUDA for one kind of device. The kernels add no floats by atomics and satisfy
        ``torch.use_deterministic_algorithms``.

    Precision:
        float32 rows are compared in float32; on CUDA, with ``"high"`` or ``"medium"`` as
        ``torch.set_float32_matmul_precision``, with the 11 bits of TF32. float16 and bfloat16 rows
        are used as they are. Sums and what enters the loss are float32 (float64 for float64).

    Memory:
        O((N + M) D) besides a slab of fixed size. Joining pairs to triplets takes O(T) and its
        output shape depends on the data, so that alone does not compile to one graph.

    Cost:
        N M D multiply-adds for the mining, half of that without ``ref_emb``. With ``exact`` every
        pair is measured on its own, from both of its sides, which costs about eight times as much
        as in a product: mining on a CPU takes 5 to 12 times as long.

    Example:
        >>> import torch
        >>> from flashmetric.functional import triplet_margin_loss
        >>> x = torch.tensor([[0.0], [1.0], [3.0], [3.5]], requires_grad=True)
        >>> loss = triplet_margin_loss(x, torch.tensor([0, 0, 1, 1]), margin=1.5)
        >>> loss
        tensor(0.1250, grad_fn=<HardestTripletsBackward>)
        >>> loss.backward()

    Source:
        F. Schroff, D. Kalenichenko, J. Philbin: FaceNet, CVPR 2015, arXiv:1503.03832 (hinge on
        squared distances). A. Hermans, L. Beyer, B. Leibe: In Defense of the Triplet Loss for
        Person Re-Identification, 2017, arXiv:1703.07737 (batch-hard mining, softplus).
        V. Balntas et al.: Learning local feature descriptors with triplets and shallow
        convolutional neural networks, BMVC 2016 (swap).
    """
    check_triplet_options(
        margin, distance, mining, smooth, swap, reduction, empty, normalize, exact
    )
    margin = float(margin)
    batch = check_batch(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    if indices_tuple is not None:
        triplets = _as_triplets(check_indices(indices_tuple, embeddings, ref_emb))
    if normalize or distance == "cosine":
        refs = None if ref_emb is None else normalize_rows(ref_emb)
        batch = batch._replace(embeddings=normalize_rows(embeddings), ref_emb=refs)

    valid = None
    if indices_tuple is None:
        if not swap and reduction != "none":
            keep = empty == "keep"
            return _hardest_triplets(*batch, distance, margin, smooth, reduction, keep, exact)
        d_ap, d_an, valid = _mined(batch, distance, swap, empty, exact)
    else:
        d_ap, d_an = _given(batch, triplets, distance, swap)
    violation = d_ap - d_an + margin  # [N] or [T]
    loss = triplet_hinge(violation, smooth)
    return _reduce(loss, valid, reduction)


def check_triplet_options(
    margin: float,
    distance: str,
    mining: str,
    smooth: bool,
    swap: bool,
    reduction: str,
    empty: str,
    normalize: bool,
    exact: bool,
) -> None:
    """Raise unless the options of :func:`triplet_margin_loss` are valid."""
    check_number("margin", margin)
    check_distance(distance, normalize)
    check_choice("mining", mining, _MINING)
    check_flag("smooth", smooth)
    check_flag("swap", swap)
    check_choice("reduction", reduction, _REDUCTION)
    check_choice("empty", empty, _EMPTY)
    check_flag("exact", exact)


def _mined(
    batch: Batch, distance: str, swap: bool, empty: str, exact: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distances of the hardest pairs of each anchor, and which anchors count (None: all)."""
    index, values = _hardest(*batch, distance, exact)
    d_ap, d_an = values.unbind()
    found = index >= 0
    complete = found.all(0)
    if swap:
        refs = batch.embeddings if batch.ref_emb is None else batch.ref_emb
        d_pn = _pair_distance(refs, None, index[0], index[1], distance)
        d_an = torch.where((d_pn < d_an).logical_and_(complete), d_pn, d_an)
    if empty == "keep":
        return d_ap, torch.where(found[1], d_an, d_ap), None
    return d_ap, d_an, complete


def _given(
    batch: Batch, triplets: tuple[Tensor, Tensor, Tensor], distance: str, swap: bool
) -> tuple[Tensor, Tensor]:
    a, p, n = triplets
    x, r = batch.embeddings, batch.ref_emb
    pairs = _pair_distance(x, r, torch.stack((a, a)), torch.stack((p, n)), distance)
    d_ap, d_an = pairs.unbind()
    if swap:
        d_pn = _pair_distance(x if r is None else r, None, p, n, distance)
        d_an = torch.where(d_pn < d_an, d_pn, d_an)
    return d_ap, d_an


def _as_triplets(indices: tuple[Tensor, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Triplets as given, or every positive pair with every negative pair of its anchor."""
    if len(indices) == 3:
        a, p, n = indices
        return a, p, n
    a1, p, a2, n = indices
    sorted_a2, order = a2.sort(stable=True)
    begin = torch.searchsorted(sorted_a2, a1)
    count = torch.searchsorted(sorted_a2, a1, right=True) - begin
    pair = torch.arange(len(a1), device=a1.device).repeat_interleave(count)
    # The numbers of a pair's partners, 0 to count - 1, after each other for all pairs.
    partner = torch.arange(len(pair), device=a1.device) - (count.cumsum(0) - count)[pair]
    return a1[pair], p[pair], n[order[begin[pair] + partner]]


def _reduce(loss: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss if valid is None else torch.where(valid.logical_or(loss.isnan()), loss, 0)
    return reduce_triplets(loss, valid, reduction)[0]
