# SPDX-License-Identifier: Apache-2.0
"""Both losses once more, as loops over plain Python floats: what proves the reference."""

import math


def loop_triplet(
    x, labels, *, margin, distance, smooth, swap, reduction, empty, normalize, **where
) -> float | list[float]:
    """The triplet margin loss, one anchor or given triplet at a time."""
    given = "indices_tuple" in where
    x, r, same = loop_setup(x, labels, distance, normalize, **where)
    triplets = loop_given_triplets(where["indices_tuple"]) if given else []
    if not given:
        for a in range(len(x)):
            p = n = None
            for j in range(len(r)):
                d = loop_distance(x[a], r[j], distance)
                if same[a][j] is True and (p is None or d > loop_distance(x[a], r[p], distance)):
                    p = j
                if same[a][j] is False and (n is None or d < loop_distance(x[a], r[n], distance)):
                    n = j
            triplets.append((a, p, n))

    losses = []
    for a, p, n in triplets:
        if empty == "skip" and (p is None or n is None):
            losses.append(None)
            continue
        d_ap = 0.0 if p is None else loop_distance(x[a], r[p], distance)
        d_an = d_ap if n is None else loop_distance(x[a], r[n], distance)
        if swap and p is not None and n is not None:
            d_an = min(d_an, loop_distance(r[p], r[n], distance))
        v = d_ap - d_an + margin
        losses.append(math.log1p(math.exp(v)) if smooth else max(v, 0.0))

    if reduction == "none":
        return [loss or 0.0 for loss in losses]
    counted = [loss for loss in losses if loss is not None]
    if reduction == "sum":
        return sum(counted)
    if reduction == "mean_nonzero":
        counted = [loss for loss in counted if loss > 0]
    return sum(counted) / max(len(counted), 1)


def loop_contrastive(
    x, labels, *, pos_margin, neg_margin, distance, power, scale, reduction, normalize, **where
) -> float | list[float]:
    """The contrastive loss, one ordered pair at a time."""
    x, r, same = loop_setup(x, labels, distance, normalize, **where)
    if "indices_tuple" in where:
        columns = [column.tolist() for column in where["indices_tuple"]]
        if len(columns) == 3:
            columns = [columns[0], columns[1], columns[0], columns[2]]
        pairs = [(a, j, True) for a, j in zip(columns[0], columns[1], strict=True)]
        pairs += [(a, j, False) for a, j in zip(columns[2], columns[3], strict=True)]
    else:
        pairs = [(a, j, s) for a, row in enumerate(same) for j, s in enumerate(row)]

    losses = {True: [], False: []}
    by_anchor = [0.0] * len(x)
    for a, j, positive in pairs:
        if positive is None:
            continue
        d = loop_distance(x[a], r[j], distance)
        loss = scale * max(d - pos_margin if positive else neg_margin - d, 0.0) ** power
        losses[positive].append(loss)
        by_anchor[a] += loss

    if reduction == "none":
        return by_anchor
    total = [sum(losses[kind]) for kind in (True, False)]
    count = [len(losses[kind]) for kind in (True, False)]
    if reduction == "sum":
        return sum(total)
    if reduction == "mean":
        return sum(total) / max(sum(count), 1)
    if reduction == "mean_nonzero":
        count = [sum(loss > 0 for loss in losses[kind]) for kind in (True, False)]
    return sum(t / max(c, 1) for t, c in zip(total, count, strict=True))


def loop_setup(x, labels, distance, normalize, ref_emb=None, ref_labels=None, indices_tuple=None):
    """Rows, references, and for each pair True (same label), False, or None for row i with i."""
    rows, refs = x.tolist(), (x if ref_emb is None else ref_emb).tolist()
    if normalize or distance == "cosine":
        rows, refs = [loop_unit(row) for row in rows], [loop_unit(row) for row in refs]
    if indices_tuple is not None:
        return rows, refs, None
    labels = labels.tolist()
    others = labels if ref_labels is None else ref_labels.tolist()
    same = [
        [None if ref_labels is None and i == j else a == b for j, b in enumerate(others)]
        for i, a in enumerate(labels)
    ]
    return rows, refs, same


def loop_given_triplets(indices):
    """Triplets of a 3- or 4-tuple of index tensors."""
    columns = [column.tolist() for column in indices]
    if len(columns) == 3:
        return list(zip(*columns, strict=True))
    return [
        (a, p, n)
        for a, p in zip(columns[0], columns[1], strict=True)
        for b, n in zip(columns[2], columns[3], strict=True)
        if a == b
    ]


def loop_unit(row):
    """A row over its length, or the zero row."""
    length = math.sqrt(sum(value * value for value in row))
    return [value / length for value in row] if length else row


def loop_distance(x, r, distance):
    """The distance of two rows, taken from its formula."""
    dot = sum(a * b for a, b in zip(x, r, strict=True))
    if distance in ("cosine", "dot"):
        return 1.0 - dot if distance == "cosine" else -dot
    squared = sum((a - b) ** 2 for a, b in zip(x, r, strict=True))
    return squared if distance == "sqeuclidean" else math.sqrt(squared)
