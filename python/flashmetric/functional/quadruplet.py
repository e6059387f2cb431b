# SPDX-License-Identifier: Apache-2.0
"""Quadruplet loss: a triplet loss, and positives nearer than pairs of two other classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_count, check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import REDUCTIONS, Reduction, reduce_anchors
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Pairs
from flashmetric.functional.totals import of_own_anchors, of_references, one_batch
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import words


def quadruplet_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 0.2,
    pair_margin: float = 0.2,
    class_size: int | None = None,
    distance: Distance | Metric = "sqeuclidean",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Quadruplet loss over the hardest pairs of each anchor and of the classes it has no part in.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings).square()
        pos = d.masked_fill(~same | eye, -torch.inf).amax(1)
        neg = d.masked_fill(same, torch.inf)
        first = (pos - neg.amin(1) + margin).relu().mean()
        others = torch.stack([  # the nearest pair of two classes, neither that of anchor i
            neg[labels != label][:, labels != label].amin() for label in labels
        ])
        loss = first + (pos - others + pair_margin).relu().mean()

    .. math::
        \ell_i = \max\big(0, \max_p d_{ip} - \min_n d_{in} + m_1\big)
               + \max\Big(0, \max_p d_{ip} - \min_{l, k} d_{lk} + m_2\Big), \qquad
        c_l \ne c_k,\; c_l \ne c_i,\; c_k \ne c_i

    The paper sums over all quadruplets that its mining finds hard; this is the hardest one of each
    anchor, for either term.

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there. Rows of :func:`multi_hot` with ``match="any"`` have no one class and are
            not supported. With ``indices_tuple`` labels may be None; every row then counts as a
            class of its own in the second term.
        margin: of the first term. Default: 0.2.
        pair_margin: of the second term. Default: 0.2.
        class_size: the largest number of rows (references) of one class. By default it is counted,
            which waits for the device and does not compile into one graph. Too small a number
            makes the second term miss pairs. Unused with ``indices_tuple``, which is counted.
        distance: Default: ``"sqeuclidean"``.
        normalize: see there.
        reduction: ``"mean"`` (default) over the anchors that have a positive and a negative, plus
            the mean of the second term over those that have a positive and find a pair of other
            classes; ``"mean_nonzero"`` likewise over the terms above 0; ``"sum"``; ``"none"``.
        ref_emb: see there. The pairs of the second term are an anchor and a reference, too.
        ref_labels: see there.
        indices_tuple: see there. All pairs are taken from those listed.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. float32, or float64 for float64 embeddings.
        Without any anchor that counts it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism and precision as for :func:`pair_loss`.

    Memory:
        O((N + M) D), and O(N K) for classes of at most K rows.

    Cost:
        One sweep for the positives, and one for the K + 1 nearest negatives of each row: the
        nearest one whose class is not that of the nearest is among them.

    Example:
        >>> import torch
        >>> from flashmetric.functional import quadruplet_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.25], [1.5]], requires_grad=True)
        >>> quadruplet_loss(x, torch.tensor([0, 0, 1, 2])).item()
        1.706...

    Source:
        W. Chen, X. Chen, J. Zhang, K. Huang: Beyond Triplet Loss: A Deep Quadruplet Network for
        Person Re-Identification, CVPR 2017.
    """
    check_quadruplet_options(margin, pair_margin, class_size, distance, normalize, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    own, other = _class_numbers(labels, ref_labels, pairs)
    if indices_tuple is not None:
        # A list can hold one pair often; only all of them surely show a second class.
        count = pairs.counts()[1]
        wanted = int(count.max()) if count.numel() else 0
    elif class_size is None:
        size = torch.zeros(pairs.anchors + pairs.references, dtype=torch.int64, device=own.device)
        size = size.index_add(0, other, torch.ones_like(other))
        wanted = 1 + (int(size.max()) if size.numel() else 0)
    else:
        wanted = class_size + 1
    negatives = pairs.top("negative", max(1, min(wanted, pairs.references)))
    farthest = pairs.farthest("positive")
    positive, has_positive = farthest.distance[:, 0], farthest.valid[:, 0]
    # The second negative pair may be any of the batch: in float64, of which the CPU adds the
    # gradients in a fixed order.
    index, distances = negatives.other, negatives.distance.double()
    if one_batch(ref_emb):
        index, distances, own = map(of_references, (index, distances, own))
    flat, found = map(
        of_own_anchors,
        _nearest_pair_of_other_classes(index, distances.detach(), own, other),
    )
    pair = distances.flatten()[flat].to(positive.dtype) if distances.numel() else positive
    terms = (
        (negatives.distance[:, 0], negatives.valid[:, 0], margin),
        (pair, found, pair_margin),
    )
    first, second = (
        reduce_anchors((positive - d + float(gap)).relu(), has_positive & valid, reduction)
        for d, valid, gap in terms
    )
    return first + second


class _Nearest(NamedTuple):
    """A negative of each row, [N]: place in the list, distance (infinite for none), class."""

    place: Tensor
    distance: Tensor
    group: Tensor


def _nearest_pair_of_other_classes(
    index: Tensor, distance: Tensor, own: Tensor, other: Tensor
) -> tuple[Tensor, Tensor]:
    """For every row, the nearest listed pair of two classes that are not the row's.

    Args:
        index: nearest references of each row in this order, [N, K], -1 for none.
        distance: their distances, [N, K].
        own: class number of each row.
        other: class number of each reference.

    Returns:
        Positions in the flattened lists, [N], and whether there is one, [N].
    """
    if len(own) == 0 or len(other) == 0:
        return own.new_zeros(len(own)), own.new_zeros(len(own), dtype=torch.bool)
    group = other[index.clamp(min=0)]
    place = torch.arange(index.shape[1], device=index.device)
    none = index < 0
    key = distance.masked_fill(none, torch.inf)

    def nearest(mask: Tensor) -> _Nearest:
        at = torch.where(mask, place, index.shape[1]).amin(1)
        missing = at == index.shape[1]
        at = at.clamp(max=index.shape[1] - 1).unsqueeze(1)
        d = key.gather(1, at)[:, 0].masked_fill(missing, torch.inf)
        return _Nearest(at[:, 0], d, group.gather(1, at)[:, 0])

    first = nearest(~none)
    second = nearest(~none & (group != first.group.unsqueeze(1)))
    groups = len(own) + len(other)
    # A pair of the nearest kind serves all classes but its own two.
    a = _best_untouched(first, own, groups)
    # A row whose nearest is of class c serves c by the nearest of another class.
    b = _best_by_class(second, first.group, own, groups)
    d_a = _at(first.distance, a)[own]
    d_b = _at(second.distance, b)[own]
    row = torch.where(d_a <= d_b, a[own], b[own])
    at = torch.where(d_a <= d_b, _at(first.place, a)[own], _at(second.place, b)[own])
    found = (torch.minimum(d_a, d_b) < torch.inf) | (d_a.isnan() & (row >= 0))
    return (row.clamp(min=0) * index.shape[1] + at).masked_fill(~found, 0), found


def _at(values: Tensor, rows: Tensor) -> Tensor:
    """Values of rows; infinite (0 for integers) where the row is -1."""
    missing = torch.inf if values.is_floating_point() else 0
    return values[rows.clamp(min=0)].masked_fill(rows < 0, missing)


def _best_untouched(nearest: _Nearest, own: Tensor, groups: int) -> Tensor:
    """For each class, the row of the nearest pair of which no row is of that class; -1 for none.

    The pairs are ranked. Those that touch a class are a sorted list of ranks, and the first rank
    that is missing in it is the best pair left.
    """
    order = nearest.distance.argsort(stable=True)
    rank = torch.arange(len(order), device=order.device)
    spare = torch.full_like(rank, groups)  # a class of no interest
    own, group = own[order], nearest.group[order]
    touched = torch.cat((own, torch.where(group == own, spare, group)))
    ranks = torch.cat((rank, rank))
    by_rank = ranks.argsort(stable=True)
    by_class = by_rank[touched[by_rank].argsort(stable=True)]
    touched, ranks = touched[by_class], ranks[by_class]
    begin = torch.searchsorted(touched, torch.arange(groups + 1, device=order.device))
    position = torch.arange(len(ranks), device=order.device) - begin[touched]
    missing = torch.zeros_like(begin).index_add(0, touched, (ranks == position).long())[:groups]
    best = order[missing.clamp(max=len(order) - 1)]
    gone = (missing >= len(order)) | (nearest.distance[best] == torch.inf)
    return best.masked_fill(gone, -1)


def _best_by_class(nearest: _Nearest, group: Tensor, own: Tensor, groups: int) -> Tensor:
    """For each class, the row of smallest distance among those of ``group``; -1 for none."""
    # A row of that class itself cannot serve it.
    group = group.masked_fill((group == own) | (nearest.distance == torch.inf), groups)
    order = nearest.distance.argsort(stable=True)
    order = order[group[order].argsort(stable=True)]
    ordered = group[order]
    begin = torch.searchsorted(ordered, torch.arange(groups, device=order.device))
    at = begin.clamp(max=len(order) - 1)
    absent = ordered[at] != torch.arange(groups, device=order.device)
    return order[at].masked_fill(absent, -1)


def _class_numbers(
    labels: Tensor | Labels | None, ref_labels: Tensor | Labels | None, pairs: Pairs
) -> tuple[Tensor, Tensor]:
    """Classes of anchors and of references, numbered from 0 on; without labels, row numbers."""
    device, refs = pairs.embeddings.device, pairs.ref_emb
    if labels is None or (refs is not None and ref_labels is None):
        own = torch.arange(pairs.anchors, device=device)
        first = 0 if refs is None else pairs.anchors
        return own, torch.arange(first, first + pairs.references, device=device)
    parts = [_class_words(labels)] + ([] if ref_labels is None else [_class_words(ref_labels)])
    every = torch.cat(parts)
    order = torch.arange(len(every), device=device)
    for column in reversed(every.unbind(1)):
        order = order[column[order].argsort(stable=True)]
    every = every[order]
    # Not unique(), of which the size of the result depends on the data.
    step = (every[1:] != every[:-1]).any(1).long()
    number = torch.zeros_like(order)
    number[order[1:]] = step.cumsum(0)
    own = number[: pairs.anchors]
    return own, own if refs is None else number[pairs.anchors :]


def _class_words(labels: Tensor | Labels) -> Tensor:
    """What the class of a row is, [N, words]."""
    if not isinstance(labels, Labels):
        return labels.long().unsqueeze(1)
    if labels.rule == "any":
        raise ValueError("labels must give each row one class, got multi_hot(match='any')")
    every = words(labels.words)
    # The second word of grouped labels is no part of the class.
    return every[:, :1] if labels.rule.startswith("group") else every


def check_quadruplet_options(
    margin: float,
    pair_margin: float,
    class_size: int | None,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`quadruplet_loss` are valid."""
    check_number("margin", margin)
    check_number("pair_margin", pair_margin)
    if class_size is not None:
        check_count("class_size", class_size)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
