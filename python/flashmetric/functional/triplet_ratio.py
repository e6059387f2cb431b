# SPDX-License-Identifier: Apache-2.0
"""Triplet losses that compare two distances by a softmax or by their quotient, without a hinge."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import reduce_listed
from flashmetric.functional.batch_all import batch_all_sums, reduce_sums
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.triplet import Mining, check_max_positives
from flashmetric.functional.triplet_selection import SELECTIONS, spoil, triplet_distances
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, accumulate_dtype

Reduction = Literal["mean", "sum", "none"]
SelectedMining = Literal[
    "batch_hard", "semi_hard", "semi_hard_anchor", "easy_positive", "easy_positive_semi_hard"
]
_MINING, _REDUCTION = get_args(Mining), get_args(Reduction)


def triplet_ratio_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    const: float = 1.0,
    distance: Distance | Metric = "euclidean",
    mining: Mining = "batch_all",
    reduction: Reduction = "mean",
    max_positives: int | None = None,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Squared softmax of the two distances of a triplet, as in Hoffer's triplet network.

    By default equivalent to, without a matrix or a list of triplets::

        d = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels
        a, p, n = ((same & ~eye)[:, :, None] & ~same[:, None, :]).nonzero(as_tuple=True)
        d_plus = torch.stack((d[a, p], d[a, n])).softmax(0)[0]
        loss = const * d_plus.square().mean()

    .. math::
        d_+ = \frac{e^{d(a, p)}}{e^{d(a, p)} + e^{d(a, n)}}, \qquad
        \ell = \tfrac{\text{const}}{2} \lVert (d_+, d_- - 1) \rVert^2 = \text{const} \cdot d_+^2

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        const: factor; 1 (default) as the authors' code, 2 as the squared norm is printed.
        distance: a name (see :mod:`flashmetric.distances`) or a distance with parameters. Default:
            ``"euclidean"``.
        mining: as for :func:`triplet_margin_loss`. Default: ``"batch_all"``.
        reduction: ``"mean"`` (default) over all triplets, ``"sum"``, or ``"none"`` for the sum over
            the triplets of each anchor.
        max_positives: as for :func:`triplet_margin_loss`.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: rows to take positives and negatives from, shape [M, D]. Default: the anchors
            themselves, a row being no pair with itself.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: triplets (a, p, n), or pairs (a1, p, a2, n) that are joined on equal anchors.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], or [T] for T given triplets. Without any
        triplet it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Memory:
        O((N + M) D + N P) for P positives of an anchor. Ties, determinism and precision as for
        :func:`triplet_margin_loss`.

    Cost:
        One logistic function per triplet for ``"batch_all"``: no triplet is ever done with.

    Example:
        >>> import torch
        >>> from flashmetric.functional import triplet_ratio_loss
        >>> x = torch.tensor([[0.0], [1.0], [2.0]])
        >>> triplet_ratio_loss(x, torch.tensor([0, 0, 1])).item()
        0.161...

    Source:
        E. Hoffer, N. Ailon: Deep metric learning using Triplet network, 2015, arXiv:1412.6622. In
        spite of the name the loss depends on the difference of the distances, not on their ratio.
    """
    check_ratio_options(const, distance, mining, reduction, max_positives, normalize)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    const = float(const)
    if mining == "batch_all" and not isinstance(pairs, ListedPairs):
        sums = batch_all_sums(pairs, 0.0, "squared_sigmoid", max_positives=max_positives)
        dtype = accumulate_dtype(embeddings.dtype)
        return spoil(pairs, const * reduce_sums(sums, reduction, dtype))
    d_ap, d_an, valid = triplet_distances(pairs, mining, max_positives=max_positives)
    loss = const * (d_ap - d_an).sigmoid().square()
    return spoil(pairs, _reduce(loss, valid, reduction))


def check_ratio_options(
    const: float,
    distance: str | Metric,
    mining: str,
    reduction: str,
    max_positives: int | None,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`triplet_ratio_loss` are valid."""
    check_number("const", const)
    check_distance(distance, normalize)
    check_choice("mining", mining, _MINING)
    check_choice("reduction", reduction, _REDUCTION)
    check_max_positives(max_positives)


def triplet_quotient_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 1.0,
    scale: float = 0.5,
    distance: Distance | Metric = "sqeuclidean",
    mining: SelectedMining = "batch_hard",
    reduction: Reduction = "mean",
    max_positives: int | None = None,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Hinge on the quotient of the two distances of a triplet.

    Equivalent, for given triplets, to::

        d_ap, d_an = ((embeddings[a] - embeddings[j]).square().sum(1) for j in (p, n))
        loss = scale * (1 - d_an / (margin + d_ap)).relu().mean()

    .. math:: \ell = \text{scale} \cdot \max(0, 1 - d(a, n) / (\text{margin} + d(a, p)))

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        margin: by how much the negative should be farther than the positive; above 0. Default: 1.
        scale: factor on every triplet. Default: 1/2.
        distance: a name (see :mod:`flashmetric.distances`) or a distance with parameters that is
            never negative, so not ``"dot"``. Default: ``"sqeuclidean"``.
        mining: as for :func:`triplet_margin_loss`, except ``"batch_all"``. Default:
            ``"batch_hard"``.
        reduction: ``"mean"`` (default) over all triplets, ``"sum"``, or ``"none"`` for the sum over
            the triplets of each anchor.
        max_positives: as for :func:`triplet_margin_loss`.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: rows to take positives and negatives from, shape [M, D]. Default: the anchors
            themselves, a row being no pair with itself.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: triplets (a, p, n), or pairs (a1, p, a2, n) that are joined on equal anchors.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], or [T] for T given triplets. Without any
        triplet it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Memory:
        O((N + M) D). Ties, determinism and precision as for :func:`triplet_margin_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import triplet_quotient_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.0]])
        >>> triplet_quotient_loss(x, torch.tensor([0, 0, 1])).item()
        0.375

    Source:
        The ratio layer of T. Bui et al., Compact descriptors for sketch-based image retrieval using
        a triplet loss convolutional neural network, CVIU 2017. The gradient here is the derivative;
        that of the authors' layer is not.
    """
    check_quotient_options(margin, scale, distance, mining, reduction, max_positives, normalize)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    d_ap, d_an, valid = triplet_distances(pairs, mining, max_positives=max_positives)
    loss = float(scale) * (1 - d_an / (float(margin) + d_ap)).relu()
    return spoil(pairs, _reduce(loss, valid, reduction))


def check_quotient_options(
    margin: float,
    scale: float,
    distance: str | Metric,
    mining: str,
    reduction: str,
    max_positives: int | None,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`triplet_quotient_loss` are valid."""
    check_number("margin", margin)
    if margin <= 0:
        raise ValueError(f"margin must be above 0, got {margin}")
    check_number("scale", scale)
    check_distance(distance, normalize)
    if "dot" in (distance, getattr(distance, "kernel", None)):
        raise ValueError("distance must never be negative, got 'dot'")
    check_choice("mining", mining, SELECTIONS)
    check_choice("reduction", reduction, _REDUCTION)
    check_max_positives(max_positives)


def _reduce(loss: Tensor, valid: Tensor | None, reduction: str) -> Tensor:
    """Losses [N, K], or [T] of given triplets, to what ``reduction`` says."""
    if reduction == "none":
        loss = loss if valid is None else torch.where(valid, loss, 0)
        return loss if loss.ndim == 1 else loss.sum(1)
    return reduce_listed(loss.flatten(), None if valid is None else valid.flatten(), reduction)
