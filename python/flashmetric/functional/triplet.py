# SPDX-License-Identifier: Apache-2.0
"""Triplet margin loss over mined triplets, over all triplets of a batch, or over given ones."""

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
    check_number,
)
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.anchor_reduction import reduce_listed
from flashmetric.functional.batch_all import (
    TYPES,
    Types,
    batch_all_sums,
    batch_all_sums_by_class,
    reduce_sums,
)
from flashmetric.functional.dense_pairs import recorded_matrices
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.scaled_anchor import prepare_scaled_pairs
from flashmetric.functional.totals import current_ranks
from flashmetric.functional.triplet_selection import spoil, triplet_distances
from flashmetric.indices import TripletIndices
from flashmetric.labels import Labels
from flashmetric.ops import Hardest, HardestTriplets, PairDistance
from flashmetric.ops.distance import Distance, accumulate_dtype
from flashmetric.ops.hardest_triplets import triplet_hinge
from flashmetric.ops.terms import Formula

Mining = Literal[
    "batch_hard",
    "batch_all",
    "semi_hard",
    "semi_hard_anchor",
    "easy_positive",
    "easy_positive_semi_hard",
]
Reduction = Literal["mean", "mean_nonzero", "sum", "none"]
Empty = Literal["skip", "keep"]
_MINING, _REDUCTION, _EMPTY = get_args(Mining), get_args(Reduction), get_args(Empty)
# Those whose rows, once normalised, the op of the hardest triplets takes as they are.
_FUSED = ("euclidean", "sqeuclidean", "cosine", "dot")
_hardest: Callable[..., tuple[Tensor, Tensor]] = Hardest.apply
_hardest_triplets: Callable[..., Tensor] = HardestTriplets.apply
_pair_distance: Callable[..., Tensor] = PairDistance.apply


def triplet_margin_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float | Tensor = 0.2,
    distance: Distance | Metric = "euclidean",
    mining: Mining = "batch_hard",
    type_of_triplets: Types = "all",
    smooth: bool = False,
    hinge: bool = True,
    swap: bool = False,
    scale: float = 1.0,
    anchor_scale: float = 1.0,
    reduction: Reduction = "mean",
    empty: Empty = "skip",
    max_positives: int | None = None,
    normalize: bool = False,
    exact: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Triplet margin loss over mined triplets, or over all triplets of the batch.

    As it is by default equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels
        d_ap = d.masked_fill(~same | torch.eye(len(d), dtype=torch.bool), -torch.inf).amax(1)
        d_an = d.masked_fill(same, torch.inf).amin(1)
        valid = d_ap.isfinite() & d_an.isfinite()
        loss = (d_ap - d_an + margin)[valid].relu().mean()

    .. math::
        v = d(a, p) - d(a, n) + \text{margin}, \quad
        \ell = \text{scale} \cdot \begin{cases}
            \max(v, 0) & \\ \log(1 + e^v) & \text{smooth} \\ v & \text{without hinge}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        margin: how much farther than the positive the negative should be, in the unit of the
            distance; or one for each given triplet, a tensor [T] beside an ``indices_tuple`` of
            triplets, such as of a gap by relevance; or for ``"batch_all"`` one per class of the
            anchor and class of the negative, a tensor [C, C] for labels 0 ... C - 1, such as of a
            class hierarchy. Tensors may learn. Default: 0.2.
        distance: a name (see :mod:`flashmetric.distances`) or a distance with parameters. Default:
            ``"euclidean"``. "cosine", "angular" and "sqrt_cosine" normalise the rows themselves.
        mining: which triplets; ignored with ``indices_tuple``.
            ``"batch_hard"`` (default): of each anchor the farthest positive and nearest negative.
            ``"batch_all"``: every triplet there is, counted without being listed.
            ``"semi_hard"``: every positive pair, with the nearest negative farther than the
            positive, or with the farthest negative if there is none.
            ``"semi_hard_anchor"``: of each anchor the farthest positive, and the nearest negative
            farther than it.
            ``"easy_positive"``: of each anchor the nearest positive and the nearest negative.
            ``"easy_positive_semi_hard"``: the nearest positive, and the nearest negative farther
            than it.
        type_of_triplets: for ``"batch_all"``, ``"all"`` (default) or only those that are
            ``"hard"`` (d(a, n) <= d(a, p)), ``"semihard"`` (farther, but by no more than the
            margin) or ``"easy"`` (farther than that; their hinge is 0).
        smooth: softplus in place of the hinge. Default: False.
        hinge: False for the bare difference, which has no lower bound. Default: True.
        swap: use the distance of positive and negative where that is smaller than the distance of
            anchor and negative; not for ``"batch_all"`` (list the triplets by an ``indices_tuple``
            for that). Default: False.
        scale: factor on every triplet. Default: 1.
        anchor_scale: compare the rows with anchors this many times as long; not for distances of
            unit rows. Default: 1.
        reduction: ``"mean"`` (default) over all valid anchors, mined or given triplets;
            ``"mean_nonzero"`` over those with a loss above 0; ``"sum"``; ``"none"``.
        empty: ``"skip"`` (default) leaves out anchors without a positive or without a negative;
            ``"keep"`` counts every anchor: a missing positive has distance 0, a missing negative is
            as far as the positive. ``"semi_hard"`` counts positive pairs; without any negative,
            ``"keep"`` counts one at distance 0. ``"batch_all"`` has nothing to keep.
        max_positives: for ``"batch_all"`` and ``"semi_hard"``, how many positives an anchor has at
            most; if it has more, only the farthest take part. Default: None, they are counted,
            which waits for the device and cannot be compiled into one graph.
        normalize: scale rows to unit length first, see :func:`normalize_rows`. Default: False.
        exact: compare every candidate by its exact distance, see Ties and Cost; for
            ``"batch_hard"`` with plain labels and a distance of two rows' differences or inner
            product. Ignored with ``indices_tuple``. Default: False.
        ref_emb: rows to take positives and negatives from, shape [M, D], dtype of ``embeddings``.
            Default: the anchors themselves, a row being no pair with itself. Given references
            exclude no pair, whatever object they are.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: int64 row numbers that replace the mining: triplets (a, p, n), or pairs
            (a1, p, a2, n), whose positive and negative pairs are joined on equal anchors. ``a``
            indexes ``embeddings``, ``p`` and ``n`` index ``ref_emb`` if given, else ``embeddings``.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], the sum over the triplets of each anchor (0
        for skipped ones), or [T] for T given triplets. float32, or float64 for float64 embeddings.
        Without any valid triplet it is 0 and back-propagates zeros. NaN or infinite rows, and rows
        so long that four times the squared length overflows, make the mined loss NaN, also where
        only skipped anchors found a pair. There are no second derivatives.

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
        O((N + M) D) besides a slab of fixed size; ``"batch_all"`` and ``"semi_hard"`` also O(N P)
        for P positives of an anchor. Joining pairs to triplets takes O(T) and its output shape
        depends on the data, so it does not compile to one graph.

    Cost:
        N M D multiply-adds for ``"batch_hard"``, half of that without ``ref_emb``. With ``exact``
        every pair is measured on its own, from both of its sides, which costs about eight times as
        much as in a product: mining on a CPU takes 5 to 12 times as long.

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
        margin,
        distance,
        mining,
        type_of_triplets,
        smooth,
        hinge,
        swap,
        scale,
        anchor_scale,
        reduction,
        empty,
        max_positives,
        normalize,
        exact,
    )
    if swap and mining == "batch_all" and indices_tuple is None:
        raise ValueError(
            "swap must be False with batch_all mining, which lists no triplets to swap; got True "
            "without an indices_tuple"
        )
    margins: float | Tensor = 0.0
    if isinstance(margin, Tensor):
        check_margins(margin, indices_tuple, mining, type_of_triplets)
        margins, margin = margin.to(accumulate_dtype(embeddings.dtype)), 0.0
    margin, scale = float(margin), float(scale)
    plain = not isinstance(labels, Labels) and not isinstance(ref_labels, Labels)
    # On explicit matrices nothing is fused, and everything exact.
    explicit = recorded_matrices() is not None or current_ranks() is not None
    keep, fused = empty == "keep", distance in _FUSED and anchor_scale == 1 and not explicit
    if fused and plain and mining == "batch_hard" and indices_tuple is None:
        batch = check_batch(embeddings, labels, ref_emb, ref_labels, None)
        if normalize or distance == "cosine":
            refs = None if ref_emb is None else normalize_rows(ref_emb)
            batch = batch._replace(embeddings=normalize_rows(embeddings), ref_emb=refs)
        if not swap and hinge and reduction != "none":
            loss = _hardest_triplets(*batch[:4], distance, margin, smooth, reduction, keep, exact)
            return _times(scale, loss)
        d_ap, d_an, valid = _mined(batch, str(distance), swap, keep, exact)
        violation = d_ap - d_an + margin  # [N]
        return _times(scale, _reduce(_form(violation, smooth, hinge), valid, reduction))

    if exact and indices_tuple is None and not explicit:
        raise ValueError(
            "exact must be False except for batch_hard mining of plain labels by "
            f"{', '.join(_FUSED)}"
        )
    pairs = prepare_scaled_pairs(
        embeddings,
        labels,
        float(anchor_scale),
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    if mining == "batch_all" and not isinstance(pairs, ListedPairs):
        formula: Formula = "softplus" if smooth else "hinge" if hinge else "linear"
        if isinstance(margins, Tensor):
            if not isinstance(pairs, AllPairs) or pairs.rule != "equal" or pairs.labels.ndim > 1:
                raise TypeError("labels must be plain class numbers with a margin per class pair")
            sums = batch_all_sums_by_class(pairs, margins, formula, max_positives)
        else:
            sums = batch_all_sums(pairs, margin, formula, type_of_triplets, max_positives)
        dtype = torch.float64 if embeddings.dtype == torch.float64 else torch.float32
        return _times(scale, spoil(pairs, reduce_sums(sums, reduction, dtype)))
    d_ap, d_an, valid = triplet_distances(
        pairs, mining, swap=swap, keep=keep, max_positives=max_positives
    )
    # [N, K], or [T] given, of which each may have a margin of its own.
    loss = _form(d_ap - d_an + (margin + margins), smooth, hinge)
    if reduction == "none" and loss.ndim == 2:
        loss = loss if valid is None else torch.where(valid, loss, 0)
        return _times(scale, spoil(pairs, loss.sum(1)))
    valid = None if valid is None else valid.flatten()
    return _times(scale, spoil(pairs, _reduce(loss.flatten(), valid, reduction)))


def check_triplet_options(
    margin: float | Tensor,
    distance: str | Metric,
    mining: str,
    type_of_triplets: str,
    smooth: bool,
    hinge: bool,
    swap: bool,
    scale: float,
    anchor_scale: float,
    reduction: str,
    empty: str,
    max_positives: int | None,
    normalize: bool,
    exact: bool,
) -> None:
    """Raise unless the options of :func:`triplet_margin_loss` are valid."""
    if not isinstance(margin, Tensor):
        check_number("margin", margin)
    check_distance(distance, normalize)
    check_choice("mining", mining, _MINING)
    check_choice("type_of_triplets", type_of_triplets, TYPES)
    check_flag("smooth", smooth)
    check_flag("hinge", hinge)
    check_flag("swap", swap)
    check_number("scale", scale)
    check_number("anchor_scale", anchor_scale)
    check_choice("reduction", reduction, _REDUCTION)
    check_choice("empty", empty, _EMPTY)
    check_max_positives(max_positives)
    check_flag("exact", exact)
    if smooth and not hinge:
        raise ValueError("hinge must be True with smooth, which takes its place")
    if not hinge and reduction == "mean_nonzero":
        raise ValueError("reduction must not be 'mean_nonzero' without hinge: nothing is 0")
    if type_of_triplets != "all" and (mining != "batch_all" or smooth):
        raise ValueError(
            f"type_of_triplets must be 'all' except for batch_all mining without smooth; "
            f"got {type_of_triplets!r}"
        )


def check_margins(
    margin: Tensor, indices_tuple: tuple[Tensor, ...] | None, mining: str, type_of_triplets: str
) -> None:
    """Raise unless there is one margin per listed triplet, or one per pair of classes."""
    square = margin.ndim == 2 and margin.shape[0] == margin.shape[1]
    if indices_tuple is None and not square:
        raise TypeError(
            "margin must be a number, got Tensor, which may come beside an indices_tuple of "
            "triplets, or with a row and a column per class for batch_all mining; its shape is "
            f"{tuple(margin.shape)}"
        )
    if not margin.is_floating_point():
        raise TypeError(f"margin must be a floating-point tensor, got {margin.dtype}")
    if indices_tuple is None:
        if mining != "batch_all" or type_of_triplets != "all":
            raise ValueError(
                "margin must be a number except for batch_all mining of all triplets; got a "
                f"tensor with mining {mining!r} and type_of_triplets {type_of_triplets!r}"
            )
        return
    if not isinstance(indices_tuple, TripletIndices) and len(indices_tuple) != 3:
        raise TypeError("margin must be a number, got Tensor with an indices_tuple of pairs")
    if margin.shape != indices_tuple[0].shape:
        raise ValueError(
            f"margin must have shape {tuple(indices_tuple[0].shape)}, one per triplet; "
            f"got {tuple(margin.shape)}"
        )
    if margin.device != indices_tuple[0].device:
        raise ValueError(
            f"margin must have the device of the triplets, {indices_tuple[0].device}; "
            f"got {margin.device}"
        )


def check_max_positives(max_positives: object) -> None:
    """Raise unless it is None or a number of positives."""
    if max_positives is None:
        return
    if not isinstance(max_positives, int) or isinstance(max_positives, bool):
        raise TypeError(
            f"max_positives must be an integer or None, got {type(max_positives).__name__}"
        )
    if max_positives < 1:
        raise ValueError(f"max_positives must be at least 1, got {max_positives}")


def _mined(
    batch: Batch, distance: str, swap: bool, keep: bool, exact: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Distances of the hardest pairs of each anchor, and which anchors count (None: all)."""
    index, values = _hardest(*batch[:4], distance, exact)
    d_ap, d_an = values.unbind()
    found = index >= 0
    complete = found.all(0)
    if swap:
        refs = batch.embeddings if batch.ref_emb is None else batch.ref_emb
        d_pn = _pair_distance(refs, None, index[0], index[1], distance)
        d_an = torch.where((d_pn < d_an).logical_and_(complete), d_pn, d_an)
    if keep:
        return d_ap, torch.where(found[1], d_an, d_ap), None
    return d_ap, d_an, complete


def _form(violation: Tensor, smooth: bool, hinge: bool) -> Tensor:
    return triplet_hinge(violation, smooth) if hinge else violation


def _times(scale: float, loss: Tensor) -> Tensor:
    return loss if scale == 1 else scale * loss


def _reduce(loss: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    if reduction == "none":
        return loss if valid is None else torch.where(valid.logical_or(loss.isnan()), loss, 0)
    return reduce_listed(loss, valid, reduction)
