# SPDX-License-Identifier: Apache-2.0
"""The losses on statistics of each anchor's pairs, as loops over one pair after the other."""

import math
from typing import Any

import torch
from torch import Tensor

from flashmetric.labels import Labels
from row_oracle import loop_kind

Found = dict[int, list[tuple[int, Tensor]]]


def distance_of(x: Tensor, r: Tensor, distance: str) -> Tensor:
    """Distance of two rows; the root has derivative 0 at 0."""
    if distance == "dot":
        return -(x * r).sum()
    if distance == "cosine":
        return 1 - (unit(x) * unit(r)).sum()
    squared = ((x - r) ** 2).sum()
    if distance == "sqeuclidean":
        return squared
    return squared.sqrt() if squared.item() > 0 else squared * 0


def unit(x: Tensor) -> Tensor:
    return x / x.norm() if x.any() else x


class Loop:
    """Positives and negatives of each anchor with their distances, and the classes of the rows."""

    def __init__(
        self,
        x: Tensor,
        labels: Tensor | Labels | None,
        *,
        distance: str,
        normalize: bool = False,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
        indices_tuple: tuple[Tensor, ...] | None = None,
    ) -> None:
        refs = x if ref_emb is None else ref_emb
        rows = [unit(row) for row in x] if normalize else list(x)
        others = [unit(row) for row in refs] if normalize else list(refs)
        self.given = list(x)
        self.zero = (x.sum() + refs.sum()) * 0
        self.n, self.square = len(rows), ref_emb is None
        words, rule = loop_words(labels, len(rows))
        of_refs = words if ref_emb is None else loop_words(ref_labels, len(others), len(rows))[0]
        self.own, self.other = ([class_of(w, rule) for w in side] for side in (words, of_refs))
        kinds: list[list[tuple[int, int]]] = [[], []]
        if indices_tuple is not None:
            a = [index.tolist() for index in indices_tuple]
            a1, p, a2, n = a if len(a) == 4 else (a[0], a[1], a[0], a[2])
            kinds = [list(zip(a1, p, strict=True)), list(zip(a2, n, strict=True))]
        else:
            for i in range(len(rows)):
                for j in range(len(others)):
                    kind = loop_kind(words[i], of_refs[j], rule)
                    if kind is not None and not (ref_emb is None and i == j):
                        kinds[kind].append((i, j))
        self.pos: Found = {i: [] for i in range(len(rows))}
        self.neg: Found = {i: [] for i in range(len(rows))}
        for found, listed in zip((self.pos, self.neg), kinds, strict=True):
            for i, j in listed:
                found[i].append((j, distance_of(rows[i], others[j], distance)))

    def reduce(self, losses: dict[int, Tensor], reduction: str, divisor: int | None = None):
        """Losses of the anchors that count."""
        values = list(losses.values())
        if reduction == "none":
            return torch.stack([losses.get(i, self.zero) for i in range(self.n)])
        total = sum(values, self.zero)
        if reduction == "sum":
            return total
        if reduction == "mean_nonzero":
            divisor = sum(value.item() > 0 for value in values)
        return total / max(1, len(values) if divisor is None else divisor)


def loop_words(labels: Any, rows: int, first: int = 0) -> tuple[list[list[int]], str]:
    if labels is None:
        return [[first + i] for i in range(rows)], "equal"
    words, rule = labels if isinstance(labels, Labels) else (labels, "equal")
    return [w if isinstance(w, list) else [w] for w in words.tolist()], rule


def class_of(words: list[int], rule: str) -> tuple[int, ...]:
    return tuple(words[:1] if rule.startswith("group") else words)


def log_sum_exp(values: list[Tensor]) -> Tensor:
    top = max(value.item() for value in values)
    return torch.stack([(value - top).exp() for value in values]).sum().log() + top


def mean_by(weights: list[Tensor], values: list[Tensor]) -> Tensor:
    """Mean under softmax weights that count as constants."""
    top = max(w.item() for w in weights)
    shares = [math.exp(w.item() - top) for w in weights]
    return sum(s * v for s, v in zip(shares, values, strict=True)) / sum(shares)


def multi_similarity(
    pairs: Loop, *, alpha=2.0, beta=50.0, base=0.5, mining=False, epsilon=0.1, level, reduction
):
    """``level`` turns a distance into base less similarity."""
    losses = {}
    for i in range(pairs.n):
        pos, neg = [d for _, d in pairs.pos[i]], [d for _, d in pairs.neg[i]]
        if mining:
            nearest = min((d.item() for d in neg), default=math.inf)
            farthest = max((d.item() for d in pos), default=-math.inf)
            pos = [d for d in pos if d.item() > nearest - epsilon]
            neg = [d for d in neg if d.item() < farthest + epsilon]
        s_pos = sum(((alpha * level(d, base)).exp() for d in pos), pairs.zero)
        s_neg = sum(((-beta * level(d, base)).exp() for d in neg), pairs.zero)
        losses[i] = (1 + s_pos).log() / alpha + (1 + s_neg).log() / beta
    return pairs.reduce(losses, reduction, pairs.n)


def lifted_structure(
    pairs: Loop,
    *,
    neg_margin=1.0,
    pos_margin=0.0,
    max_positives=None,
    l2=0.0,
    l2_power=2,
    reduction,
):
    values: list[tuple[int, Tensor]] = []
    for i, found in pairs.pos.items():
        found = sorted(found, key=lambda pair: -pair[1].item())[:max_positives]
        for j, d in found:
            neg = pairs.neg[i] + (pairs.neg[j] if pairs.square else [])
            if neg:
                lse = log_sum_exp([neg_margin - other for _, other in neg])
                values.append((i, (lse + d - pos_margin).relu() ** 2 / 2))
    if reduction == "none":
        sums = [sum((v for k, v in values if k == i), pairs.zero) for i in range(pairs.n)]
        sizes = {i: l2 * size for i, size in row_sizes(pairs, l2_power).items()}
        return torch.stack([value + sizes.get(i, 0) for i, value in enumerate(sums)])
    loss = pairs.reduce(dict(enumerate(v for _, v in values)), reduction)
    kind = "sum" if reduction == "sum" else "mean"
    return loss + l2 * pairs.reduce(row_sizes(pairs, l2_power), kind)


def row_sizes(pairs: Loop, power: int) -> dict[int, Tensor]:
    """Lengths of the rows in any pair, or their squares, of the rows as they came."""
    found = {}
    for i in range(pairs.n):
        if pairs.pos[i] or pairs.neg[i]:
            squared = sum((value**2 for value in pairs.given[i]), pairs.zero)
            found[i] = squared if power == 2 else squared.sqrt() if squared > 0 else squared
    return found


def both(pairs: Loop):
    """Anchors that have pairs of both kinds, and the distances of those."""
    for i in range(pairs.n):
        if pairs.pos[i] and pairs.neg[i]:
            yield i, [d for _, d in pairs.pos[i]], [d for _, d in pairs.neg[i]]


def generalized_lifted_structure(pairs: Loop, *, neg_margin=1.0, pos_margin=0.0, reduction):
    losses = {}
    for i, pos, neg in both(pairs):
        positive = log_sum_exp([d - pos_margin for d in pos])
        losses[i] = (positive + log_sum_exp([neg_margin - d for d in neg])).relu()
    return pairs.reduce(losses, reduction)


def adaptive_weighted_triplet(pairs: Loop, *, margin=1.0, smooth=False, reduction):
    losses = {}
    for i, pos, neg in both(pairs):
        violation = margin + mean_by(pos, pos) - mean_by([-d for d in neg], neg)
        losses[i] = (1 + violation.exp()).log() if smooth else violation.relu()
    return pairs.reduce(losses, reduction)


def ranked_list(
    pairs: Loop,
    *,
    margin=0.4,
    alpha=None,
    neg_temperature=10.0,
    pos_temperature=0.0,
    imbalance=0.5,
    reduction,
):
    outer = 1 + margin / 2 if alpha is None else alpha
    inner, losses = outer - margin, {}
    for i, pos, neg in both(pairs):
        pos = [d for d in pos if d.item() > inner]
        neg = [d for d in neg if d.item() < outer]
        loss = pairs.zero
        if pos:
            weights = [pos_temperature * (d - inner) for d in pos]
            loss = loss + (1 - imbalance) * mean_by(weights, [d - inner for d in pos])
        if neg:
            weights = [neg_temperature * (outer - d) for d in neg]
            loss = loss + imbalance * mean_by(weights, [outer - d for d in neg])
        losses[i] = loss
    return pairs.reduce(losses, reduction)


def nca(pairs: Loop, *, softmax_scale=1.0, form="log", reduction):
    losses = {}
    for i in range(pairs.n):
        if not pairs.pos[i]:
            continue
        of_pos, everything = (
            [-softmax_scale * d for _, d in found]
            for found in (pairs.pos[i], pairs.pos[i] + pairs.neg[i])
        )
        log_p = log_sum_exp(of_pos) - log_sum_exp(everything)
        losses[i] = -log_p if form == "log" else -log_p.exp()
    return pairs.reduce(losses, reduction)


def fast_ap(pairs: Loop, *, bins=10, reduction):
    """``pairs`` are squared distances of unit rows."""
    losses, width = {}, 4 / bins

    def pulse(d: Tensor, centre: int) -> Tensor:
        return (1 - (d - centre * width).abs() / width).relu()

    for i in range(pairs.n):
        if not pairs.pos[i]:
            continue
        total = total_pos = value = pairs.zero
        for centre in range(bins + 1):
            of_pos = sum((pulse(d, centre) for _, d in pairs.pos[i]), pairs.zero)
            total_pos = total_pos + of_pos
            total = total + of_pos + sum((pulse(d, centre) for _, d in pairs.neg[i]), pairs.zero)
            if total.item() > 0:
                value = value + of_pos * total_pos / total
        losses[i] = 1 - value / len(pairs.pos[i])
    return pairs.reduce(losses, reduction)


def quadruplet(pairs: Loop, *, margin=0.2, pair_margin=0.2, class_size=None, reduction):
    first, second = {}, {}
    for i in range(pairs.n):
        if not pairs.pos[i]:
            continue
        positive = max((d for _, d in pairs.pos[i]), key=Tensor.item)
        if pairs.neg[i]:
            negative = min((d for _, d in pairs.neg[i]), key=Tensor.item)
            first[i] = (positive - negative + margin).relu()
        others = [
            d
            for l, found in pairs.neg.items()  # noqa: E741
            for k, d in found
            if pairs.own[i] not in (pairs.own[l], pairs.other[k])
        ]
        if others:
            second[i] = (positive - min(others, key=Tensor.item) + pair_margin).relu()
    return pairs.reduce(first, reduction) + pairs.reduce(second, reduction)
