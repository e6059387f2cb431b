# SPDX-License-Identifier: Apache-2.0
"""The softmax losses as loops over pairs, one scalar at a time, from the formulas of the papers.

Pairs are lists: ``pos[i]`` and ``neg[i]`` hold the partners of anchor i, repeated ones repeatedly.
Scalars are float64 tensors, so that autograd differentiates the loops.
"""

import math

import torch


def unit(row):
    """A row over its length, or the zero row."""
    length = sum(v * v for v in row).sqrt() if bool((row.detach() != 0).any()) else 1.0
    return row / length


def dot(x, r):
    return sum(a * b for a, b in zip(x.unbind(), r.unbind(), strict=True))


def similarity(x, r, distance):
    """Minus the distance, or the cosine."""
    if distance == "cosine":
        return dot(unit(x), unit(r))
    if distance == "dot":
        return dot(x, r)
    squared = dot(x - r, x - r)
    return -squared if distance == "sqeuclidean" else -squared.sqrt()


def pairs_of_kinds(kinds):
    """Lists of a matrix with True for positives, False for negatives, None for neither."""
    pos = [[j for j, kind in enumerate(row) if kind is True] for row in kinds]
    neg = [[j for j, kind in enumerate(row) if kind is False] for row in kinds]
    return pos, neg


def kinds_of_labels(labels, ref_labels=None):
    """Plain labels: the diagonal of a batch of its own is neither."""
    others = labels if ref_labels is None else ref_labels
    return [
        [None if ref_labels is None and i == j else a == b for j, b in enumerate(others)]
        for i, a in enumerate(labels)
    ]


def pairs_of_indices(indices, anchors):
    """Lists of pairs (a1, p, a2, n) or triplets (a, p, n)."""
    columns = [column.tolist() for column in indices]
    if len(columns) == 3:
        columns = [columns[0], columns[1], columns[0], columns[2]]
    pos, neg = ([[] for _ in range(anchors)] for _ in range(2))
    for a, p in zip(*columns[:2], strict=True):
        pos[a].append(p)
    for a, n in zip(*columns[2:], strict=True):
        neg[a].append(n)
    return pos, neg


def exchanged(pairs, others):
    """The same lists from the other side."""
    result = []
    for lists in pairs:
        back = [[] for _ in range(others)]
        for i, partners in enumerate(lists):
            for j in partners:
                back[j].append(i)
        result.append(back)
    return tuple(result)


def reduced(values, counted, reduction):
    """Values per anchor as a tensor, their sum, or their sum over ``counted``."""
    if reduction == "none":
        return torch.stack([torch.as_tensor(v, dtype=torch.float64) for v in values])
    total = sum(values)
    return total if reduction == "sum" else total / max(counted, 1)


def loop_ntxent(x, r, pairs, *, temperature, distance="cosine", reduction="mean"):
    values, count = [], 0
    for i, (pos, neg) in enumerate(zip(*pairs, strict=True)):
        value = 0.0 * x.sum()
        for p in pos:
            e = torch.exp(similarity(x[i], r[p], distance) / temperature)
            rest = sum(torch.exp(similarity(x[i], r[n], distance) / temperature) for n in neg)
            value = value - torch.log(e / (e + rest))
            count += 1
        values.append(value)
    return reduced(values, count, reduction)


def loop_sup_con(x, r, pairs, *, temperature, form="out", distance="cosine", reduction="mean"):
    values, count = [], 0
    for i, (pos, neg) in enumerate(zip(*pairs, strict=True)):
        value = 0.0 * x.sum()
        if pos:
            e = [torch.exp(similarity(x[i], r[p], distance) / temperature) for p in pos]
            rest = [torch.exp(similarity(x[i], r[n], distance) / temperature) for n in neg]
            whole = sum(e) + sum(rest)
            if form == "out":
                value = -sum(torch.log(share / whole) for share in e) / len(pos)
            else:
                value = -torch.log(sum(share / whole for share in e) / len(pos))
            count += 1
        values.append(value)
    return reduced(values, count, reduction)


def loop_circle(x, r, pairs, *, m, gamma, reduction="mean"):
    values, count = [], 0
    for i, (pos, neg) in enumerate(zip(*pairs, strict=True)):
        value = 0.0 * x.sum()
        if pos and neg:
            of_pos = of_neg = 0.0
            for p in pos:
                s = similarity(x[i], r[p], "cosine")
                of_pos = of_pos + torch.exp(-gamma * max(1 + m - s.item(), 0.0) * (s - (1 - m)))
            for n in neg:
                s = similarity(x[i], r[n], "cosine")
                of_neg = of_neg + torch.exp(gamma * max(s.item() + m, 0.0) * (s - m))
            value = torch.log1p(of_pos * of_neg)
            count += 1
        values.append(value)
    return reduced(values, count, reduction)


def loop_image_text(x, r, pairs, *, scale, form="out", distance="cosine", reduction="mean"):
    options = {
        "temperature": 1 / scale,
        "form": form,
        "distance": distance,
        "reduction": reduction,
    }
    there = loop_sup_con(x, r, pairs, **options)
    return (there + loop_sup_con(r, x, exchanged(pairs, len(r)), **options)) / 2


def loop_n_pairs(x, r, chosen, *, l2=0.0, l2_power=2, negatives=(), distance="dot"):
    """Mean over the chosen (anchor, positive); ``negatives`` are further rows of r."""
    if not chosen:
        return 0.0 * x.sum()
    total = 0.0
    for a, p in chosen:
        own = similarity(x[a], r[p], distance)
        others = [j for _, j in chosen if j != p] + list(negatives)
        total = total + torch.log1p(
            sum((torch.exp(similarity(x[a], r[j], distance) - own) for j in others), x.sum() * 0)
        )
        for row in (x[a], r[p]):
            squared = dot(row, row)
            total = total + l2 * (squared if l2_power == 2 else squared.sqrt())
    return total / len(chosen)


def loop_angular(
    x, r, positives, negatives, *, alpha, normalize=True, form="log", reduction="mean"
):
    """``positives`` are (anchor, positive); ``negatives[a]`` lists those of an anchor."""
    t = math.tan(alpha * math.pi / 180) ** 2
    values, count = [0.0 * x.sum() for _ in range(len(x))], 0
    for a, p in positives:
        rows = [x[a], r[p]] + [r[n] for n in negatives[a]]
        first, second, *others = [unit(row) for row in rows] if normalize else rows
        if not others:
            continue
        total = 1.0 if form == "log" else 0.0 * x.sum()
        centre = (first + second) / 2
        for n in others:
            if form == "hinge":
                apart, away = first - second, n - centre
                total = total + torch.relu(dot(apart, apart) - 4 * t * dot(away, away))
                continue
            f = 4 * t * dot(first + second, n) - 2 * (1 + t) * dot(first, second)
            total = total + torch.exp(f)
        values[a] = values[a] + (torch.log(total) if form == "log" else total)
        count += 1
    return reduced(values, count, reduction)


def loop_soft_triple(x, labels, centers, *, la, gamma, margin, tau, reduction="mean"):
    classes, per_class, _ = centers.shape
    values, count = [], 0
    for row, label in zip(x, labels, strict=True):
        value = 0.0 * x.sum()
        if label is not None:
            exponents = []
            for c in range(classes):
                s = [dot(unit(row), unit(centers[c, k])) for k in range(per_class)]
                weights = [torch.exp(v / gamma) for v in s]
                mean = sum(w * v for w, v in zip(weights, s, strict=True)) / sum(weights)
                exponents.append(la * (mean - (margin if c == label else 0.0)))
            whole = sum(torch.exp(e) for e in exponents)
            value = -torch.log(torch.exp(exponents[label]) / whole)
            count += 1
        values.append(value)
    value = reduced(values, count, reduction)
    if reduction == "none" or per_class == 1:
        return value
    spread = 0.0
    for c in range(classes):
        for t in range(per_class):
            for s in range(t + 1, per_class):
                cosine = dot(unit(centers[c, t]), unit(centers[c, s]))
                spread = spread + torch.sqrt(2 + 1e-5 - 2 * cosine)
    return value + tau * spread / (classes * per_class * (per_class - 1))
