# SPDX-License-Identifier: Apache-2.0
"""The pointwise pair losses as loops over pairs, each written from its formula.

A loop knows a batch as a list of pairs (i, j, same) and gets rows as float64 tensors; what it
returns is a torch scalar, so that autograd differentiates it pair by pair.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor


def all_pairs(labels, ref_labels=None):
    """Ordered pairs (i, j, same) of labelled rows; without references no row with itself."""
    others = labels if ref_labels is None else ref_labels
    return [
        (i, j, a == b)
        for i, a in enumerate(labels.tolist())
        for j, b in enumerate(others.tolist())
        if ref_labels is not None or i != j
    ]


def given_pairs(indices):
    """Pairs of a 3- or 4-tuple of index tensors."""
    columns = [column.tolist() for column in indices]
    if len(columns) == 3:
        columns = [columns[0], columns[1], columns[0], columns[2]]
    pairs = [(a, j, True) for a, j in zip(columns[0], columns[1], strict=True)]
    return pairs + [(a, j, False) for a, j in zip(columns[2], columns[3], strict=True)]


def unit(row: Tensor) -> Tensor:
    """A row over its length; a zero row as it is."""
    return row / row.square().sum().sqrt() if row.any() else row


def unit_rows(rows: Tensor) -> Tensor:
    return torch.stack([unit(row) for row in rows]) if len(rows) else rows


def cosine(x: Tensor, r: Tensor) -> Tensor:
    """The cosine; of coinciding rows exactly 1, of a zero row 0."""
    if bool((x == r).all()) and bool(x.any()):
        return x.new_ones(())
    return sum((a * b for a, b in zip(unit(x), unit(r), strict=True)), x.new_zeros(()))


def squared(x: Tensor, r: Tensor) -> Tensor:
    return sum(((a - b) ** 2 for a, b in zip(x, r, strict=True)), x.new_zeros(()))


def euclidean(x: Tensor, r: Tensor) -> Tensor:
    """The distance; of coinciding rows 0, without a gradient."""
    return squared(x, r).sqrt() if bool((x != r).any()) else x.new_zeros(())


def cityblock(x: Tensor, r: Tensor) -> Tensor:
    return sum(((a - b).abs() for a, b in zip(x, r, strict=True)), x.new_zeros(()))


def chi2(x: Tensor, r: Tensor) -> Tensor:
    terms = ((a - b) ** 2 / (a + b) for a, b in zip(x, r, strict=True) if a + b != 0)
    return sum(terms, x.new_zeros(()))


def ratio(x: Tensor, r: Tensor) -> Tensor:
    """Variance of the difference over that of the anchor; 0 for a constant anchor."""

    def variance(row: Tensor) -> Tensor:
        mean = sum(row) / len(row)
        return sum((value - mean) ** 2 for value in row) / (len(row) - 1)

    own = variance(x)
    return variance(x - r) / own if own != 0 else x.new_zeros(())


DISTANCES = {
    "euclidean": euclidean,
    "sqeuclidean": squared,
    "cityblock": cityblock,
    "chi2": chi2,
    "cosine": lambda x, r: 1 - cosine(x, r),
    "dot": lambda x, r: -(x * r).sum(),
}


def logistic(z: Tensor) -> Tensor:
    """log(1 + e^z)."""
    return z + (-z).exp().log1p() if z > 0 else z.exp().log1p()


def sigmoid(z: Tensor) -> Tensor:
    return 1 / (1 + (-z).exp())


def positive_part(z: Tensor) -> Tensor:
    return z if z > 0 else z * 0


def add_up(x, pairs, values, reduction):
    """The reductions that these losses share; values are in the order of the pairs."""
    zero = x.sum() * 0
    kinds = [
        [v for (*_, same), v in zip(pairs, values, strict=True) if same is kind]
        for kind in (True, False)
    ]
    if reduction == "none":
        rows = [zero] * len(x)
        for (i, _, _), value in zip(pairs, values, strict=True):
            rows[i] = rows[i] + value
        return torch.stack(rows) if rows else x.sum(1)
    total = [sum(kind, zero) for kind in kinds]
    count = [len(kind) for kind in kinds]
    active = [sum(bool(v > 0) for v in kind) for kind in kinds]
    if reduction == "sum":
        return total[0] + total[1]
    if reduction == "mean":
        return (total[0] + total[1]) / max(1, sum(count))
    if reduction == "mean_active":
        return (total[0] + total[1]) / max(1, sum(active))
    if reduction == "bier":
        anchors = len({i for i, *_ in pairs})
        return total[0] / max(1, count[0] + anchors) + total[1] / max(1, count[1])
    if reduction == "horde":
        loss = zero
        for i in {i for i, *_ in pairs}:
            for kind in (True, False):
                own = [
                    v for (a, _, s), v in zip(pairs, values, strict=True) if a == i and s is kind
                ]
                loss = loss + sum(own, zero) / max(1, len(own))
        return loss
    if reduction == "mean_anchors":
        return (total[0] + total[1]) / max(1, len({i for i, *_ in pairs}))
    divisor = active if reduction == "mean_nonzero" else count
    return total[0] / max(1, divisor[0]) + total[1] / max(1, divisor[1])


def each(x, r, pairs, of_pair):
    return [of_pair(x[i], r[j], same, i) for i, j, same in pairs]


def contrastive(x, r, pairs, *, plus, minus, distance, reduction, factor=1.0):
    """Any contrastive loss: a function of the distance for positives, one for negatives."""
    d = DISTANCES[distance]
    values = each(x, r, pairs, lambda a, b, same, _: factor * (plus if same else minus)(d(a, b)))
    return add_up(x, pairs, values, reduction)


def exponential(x, r, pairs, *, q, distance, reduction):
    def of_pair(a, b, same, _):
        energy = DISTANCES[distance](a, b)
        if same:
            return 2 / q * energy**2
        return 2 * q * (-2.77 / q * energy).exp()

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def logistic_distance(x, r, pairs, *, tau, beta, distance, reduction):
    def of_pair(a, b, same, _):
        sign = 1 if same else -1
        return logistic(beta * (1 - sign * (tau - DISTANCES[distance](a, b)))) / beta / 2

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def sigmoid_verification(x, r, pairs, *, weight, bias, distance, reduction):
    def of_pair(a, b, same, _):
        s = cosine(a, b) if distance == "cosine" else (a * b).sum()
        return (float(same) - sigmoid(weight * s + bias)) ** 2 / 2

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def cosine_target(x, r, pairs, *, pos_target, neg_target, reduction):
    def of_pair(a, b, same, _):
        return (cosine(a, b) - (pos_target if same else neg_target)) ** 2 / 2

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def cosine_embedding(x, r, pairs, *, margin, reduction):
    def of_pair(a, b, same, _):
        return 1 - cosine(a, b) if same else positive_part(cosine(a, b) - margin)

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def cosine_contrastive(x, r, pairs, *, margin, reduction):
    def of_pair(a, b, same, _):
        s = cosine(a, b)
        return (s - 1) ** 2 / 2 if same else positive_part(s - margin) / 2

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def binomial_deviance(x, r, pairs, *, alpha, beta, cost, distance, reduction):
    def of_pair(a, b, same, _):
        s = cosine(a, b) if distance == "cosine" else (a * b).sum()
        return logistic(-alpha * (s - beta) if same else alpha * cost * (s - beta))

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def margin(x, r, pairs, *, margin, beta, nu, distance, reduction, classes=None):
    """``beta`` is a number, or one per class with the classes of the anchors."""
    x, r = unit_rows(x), unit_rows(r)

    def boundary(i):
        return beta if classes is None else beta[classes[i]]

    def of_pair(a, b, same, i):
        sign = 1 if same else -1
        return positive_part(margin + sign * (DISTANCES[distance](a, b) - boundary(i)))

    how = {"mean_nonzero": "mean_active"}.get(reduction, reduction)
    loss = add_up(x, pairs, each(x, r, pairs, of_pair), how)
    anchors = {i for i, *_ in pairs}
    for i in anchors:
        share = nu * boundary(i) / len(anchors)
        if reduction == "none":
            loss = loss + share * torch.nn.functional.one_hot(torch.tensor(i), len(x))
        else:
            loss = loss + share
    return loss


def snr(x, r, pairs, *, pos_margin, neg_margin, regularization, reduction):
    x, r = unit_rows(x), unit_rows(r)

    def of_pair(a, b, same, _):
        return positive_part(ratio(a, b) - pos_margin if same else neg_margin - ratio(a, b))

    loss = add_up(x, pairs, each(x, r, pairs, of_pair), reduction)
    anchors = {i for i, *_ in pairs}
    for i in anchors:
        share = regularization * abs(sum(x[i])) / len(anchors)
        if reduction == "none":
            loss = loss + share * torch.nn.functional.one_hot(torch.tensor(i), len(x))
        else:
            loss = loss + share
    return loss


def siglip(x, r, pairs, *, log_scale, bias, distance, reduction):
    def of_pair(a, b, same, _):
        s = cosine(a, b) if distance == "cosine" else (a * b).sum()
        scale = log_scale.exp() if isinstance(log_scale, Tensor) else math.exp(log_scale)
        return logistic((-1 if same else 1) * (scale * s + bias))

    how = {"mean": "mean_anchors"}.get(reduction, reduction)
    return add_up(x, pairs, each(x, r, pairs, of_pair), how)


def verification(x, r, pairs, *, weight, bias, distance, reduction):
    def of_pair(a, b, same, _):
        z = bias
        for k in range(len(a)):
            z = z - weight[k] * DISTANCES[distance](a[k : k + 1], b[k : k + 1])
        return -(sigmoid(z) if same else sigmoid(-z)).log()

    return add_up(x, pairs, each(x, r, pairs, of_pair), reduction)


def value_and_grads(function: Callable[..., Tensor], *leaves: Tensor) -> list[Tensor]:
    leaves = tuple(leaf.detach().clone().requires_grad_() for leaf in leaves)
    value = function(*leaves)
    grads = torch.autograd.grad(value, leaves, allow_unused=True)
    return [value.detach(), *(torch.zeros(()) if grad is None else grad for grad in grads)]


def assert_same(ours: list[Tensor], theirs: list[Tensor], tolerance: float = 1e-10) -> None:
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
