# SPDX-License-Identifier: Apache-2.0
"""N-pairs loss: the anchors of all classes against the positives of all classes."""

from typing import NamedTuple

import torch
from torch import Tensor

from flashmetric.checks import (
    Batch,
    check_batch,
    check_choice,
    check_distance,
    check_indices,
    check_number,
)
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import reduce_anchors
from flashmetric.functional.listed_pairs import positive_pairs
from flashmetric.functional.normalize import L2_POWER, L2Power, row_sizes
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.functional.softmax_rows import (
    Reduction,
    check_reduction,
    label_towers,
    negative_log_share,
    take_rows,
)
from flashmetric.functional.totals import current_ranks, one_batch
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import IGNORED, words


def n_pairs_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    l2: float = 0.0,
    l2_power: L2Power = 2,
    distance: Distance | Metric = "dot",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""N-pairs loss: one pair of each class, against the positives of the other classes.

    Equivalent to, without the P x P matrix, for one anchor and one positive of each class::

        logits = anchors @ positives.T
        loss = torch.nn.functional.cross_entropy(logits, torch.arange(len(anchors)))
        loss = loss + l2 * (anchors.square().sum(1).mean() + positives.square().sum(1).mean())

    .. math::
        \ell_i = \log \Bigl(1 + \sum_{j \ne i} e^{a_i \cdot p_j - a_i \cdot p_i} \Bigr)
            + l_2 (\lVert a_i \rVert^2 + \lVert p_i \rVert^2)

    Without labels, ``loss(anchors, ref_emb=positives)`` takes the pairs as they are: row i of both
    belongs to one class, and the classes differ. Further rows of ``ref_emb`` are negatives of every
    anchor. With labels, the pair of a class is its first two rows (with ``ref_emb``: its first row
    of either); classes without a pair, and further rows of a class, do not enter. The selection has
    a fixed size, N // 2 (with ``ref_emb``: min(N, M)), and waits for no device.

    Args:
        embeddings: rows or anchors, shape [N, D], float32, float16, bfloat16 or float64, any
            strides. Their inner products are taken as they are, whence the regulariser.
        labels: class of each row, shape [N], int64, int32 or bool, or :class:`Labels` of one class
            per row (``ignoring``, ``multi_hot(match="all")``). Default: see above.
        l2: weight of the regulariser. Default: 0.
        l2_power: 2 (default) for squared lengths, or 1 for lengths.
        distance: logits are minus the distance. Default: ``"dot"``, minus the inner product.
        normalize: scale rows to unit length first (the regulariser stays that of the rows as they
            are). Default: False.
        reduction: ``"mean"`` (default) over the pairs, ``"sum"``, or ``"none"`` by anchor.
        ref_emb: positives, shape [M, D].
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n), of which the first two are used:
            with labels, the first listed pair of each class; without, all listed pairs.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], 0 for rows that are no anchors. Without a
        pair it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or rows have several classes.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import n_pairs_loss
        >>> anchors = torch.eye(2, requires_grad=True)
        >>> n_pairs_loss(anchors, ref_emb=torch.eye(2)).item()  # log(1 + 1 / e)
        0.3132...

    Source:
        K. Sohn: Improved Deep Metric Learning with Multi-class N-pair Loss Objective, NIPS 2016.
    """
    check_n_pairs_options(l2, l2_power, distance, normalize, reduction)
    selected = _select(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    anchors, positives, row_labels, ref_numbers = selected.rows
    pairs = prepare_pairs(
        anchors,
        row_labels,
        distance=distance,
        normalize=normalize,
        ref_emb=positives,
        ref_labels=ref_numbers,
    )
    rows, _ = negative_log_share(pairs.logsumexp(Logit(-1.0), Logit(-1.0)))
    if l2:
        of_pairs = positives[: anchors.shape[0]]
        if selected.place is not None:
            of_pairs = take_rows(positives, selected.place)
        rows = rows + l2 * (row_sizes(anchors, l2_power) + row_sizes(of_pairs, l2_power))
    counted = selected.valid
    rows = rows.masked_fill(~counted, 0)
    if reduction == "none" and selected.anchor is not None:
        return rows.new_zeros(embeddings.shape[0]).index_add(0, selected.anchor, rows)
    return reduce_anchors(rows, counted, reduction)


def check_n_pairs_options(
    l2: float, l2_power: int, distance: str | Metric, normalize: bool, reduction: str
) -> None:
    """Raise unless the options of :func:`n_pairs_loss` are valid."""
    check_number("l2", l2)
    check_choice("l2_power", l2_power, L2_POWER)
    check_distance(distance, normalize)
    check_reduction(reduction)


class _Selection(NamedTuple):
    rows: tuple[Tensor, Tensor, Tensor | Labels, Tensor | Labels]
    """Anchors, positives, and their labels."""
    valid: Tensor
    """Which anchors are of a pair, bool [P]."""
    anchor: Tensor | None
    """Their rows in the batch; None if they are all of them, in order."""
    place: Tensor | None = None
    """Which positive each anchor has; None if number i has number i."""


def _select(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | Labels | None,
    indices_tuple: tuple[Tensor, ...] | None,
) -> _Selection:
    towers = labels is None
    labels, ref_labels = label_towers(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    batch = check_batch(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    if current_ranks() is not None and one_batch(ref_emb) and indices_tuple is None:
        return _of_this_rank(batch)
    if batch.rule != "equal":
        raise ValueError("labels must give each row one class, which 'any' and groups do not")
    refs = embeddings if ref_emb is None else ref_emb
    if indices_tuple is not None:
        checked = check_indices(indices_tuple, embeddings, ref_emb)
        anchor, positive, valid = _listed(batch, *positive_pairs(checked))
    elif towers and batch.labels is not None and batch.ref_labels is not None:
        valid = torch.ones_like(batch.labels, dtype=torch.bool)
        return _Selection((embeddings, refs, batch.labels, batch.ref_labels), valid, None)
    else:
        anchor, positive, valid = _first_of_classes(batch)
    # Places that no class takes are in no pair.
    numbers = torch.arange(len(anchor), device=anchor.device).masked_fill(~valid, IGNORED)
    # Two tensors: torch.compile does not take one as two inputs of an autograd function.
    classes, of_refs = Labels(numbers, "equal"), Labels(numbers.clone(), "equal")
    rows = take_rows(embeddings, anchor), take_rows(refs, positive)
    return _Selection((*rows, classes, of_refs), valid, anchor)


def _of_this_rank(batch: Batch) -> _Selection:
    """The pairs of the whole batch, which the references are, whose anchors this rank has."""
    ranks, refs = current_ranks(), batch.ref_emb
    assert ranks is not None and refs is not None and batch.ref_labels is not None
    whole = Batch(refs, batch.ref_labels[:, 0], None, None)
    anchor, positive, valid = _first_of_classes(whole)
    numbers = torch.arange(len(anchor), device=anchor.device).masked_fill(~valid, IGNORED)
    own = valid & (anchor >= ranks.begin) & (anchor < ranks.begin + ranks.anchors)
    place = _to_front(own, min(len(anchor), len(batch.embeddings)))
    here = numbers[place].masked_fill(~own[place], IGNORED)
    rows = take_rows(refs, anchor[place]), take_rows(refs, positive)
    labels = Labels(here, "equal"), Labels(numbers, "equal")
    return _Selection((*rows, *labels), own[place], anchor[place], place)


def _sorted_by_class(classes: Tensor) -> tuple[Tensor, Tensor]:
    """Order of rows by their label words [N, words], and where in it a class begins."""
    order = torch.arange(classes.shape[0], device=classes.device)
    for word in reversed(range(classes.shape[1])):
        order = order[classes[order, word].argsort(stable=True)]
    ordered = classes[order]
    changes = (ordered[1:] != ordered[:-1]).any(1)
    begins = torch.cat((changes.new_ones(1), changes))[: len(order)]
    return order, begins


def _to_front(wanted: Tensor, places: int) -> Tensor:
    """Positions of the wanted ones, then others, ``places`` in all: a size that is known."""
    return (~wanted).int().argsort(stable=True)[:places]


def _listed(
    batch: Batch, anchor: Tensor, positive: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """The first listed pair of each class, or all pairs if there are no classes."""
    if batch.labels is None:
        everything = torch.ones_like(anchor, dtype=torch.bool)
        return anchor, positive, everything if valid is None else valid
    classes = words(batch.labels)[anchor]
    if valid is not None:
        classes = classes.masked_fill(~valid.unsqueeze(1), IGNORED)
    order, begins = _sorted_by_class(classes)
    known = classes[order, 0] != IGNORED
    place = _to_front(begins & known, min(len(anchor), batch.embeddings.shape[0]))
    order, valid = order[place], (begins & known)[place]
    return anchor[order], positive[order], valid


def _first_of_classes(batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """The first two rows of each class; with references, the first row of either."""
    assert batch.labels is not None
    n = batch.embeddings.shape[0]
    classes, places, last = words(batch.labels), n // 2, n - 1
    if batch.ref_labels is not None:
        m = batch.ref_labels.shape[0]
        classes, places, last = torch.cat((classes, words(batch.ref_labels))), min(n, m), m - 1
    order, begins = _sorted_by_class(classes)
    same = ~begins[1:] & (classes[order[1:], 0] != IGNORED)
    if batch.ref_labels is None:
        found, anchor, positive = same & begins[:-1], order[:-1], order[1:]
    else:
        # Sorting keeps a class's anchors before its references: where these meet is its pair.
        found = same & (order[:-1] < n) & (order[1:] >= n)
        position = torch.arange(len(order), device=order.device)
        begin = position.masked_fill(~begins, 0).cummax(0).values if len(order) else position
        anchor, positive = order[begin[1:]], order[1:] - n
    place = _to_front(found, places)
    # Row numbers that stand in where there is no pair have to exist.
    return anchor[place].clamp(max=n - 1), positive[place].clamp(0, last), found[place]
