# SPDX-License-Identifier: Apache-2.0
"""The statistics of all pairs of a batch as loops over plain Python floats, and their gradients."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

IGNORED = -(2**63)


class LoopPairs:
    """All pairs of a batch, with the leading arguments of the ops."""

    def __init__(self, query, labels, ref, ref_labels, rule, distance):
        self.x = query.double().tolist()
        self.r = self.x if ref is None else ref.double().tolist()
        self.features, self.distance, self.alone = query.shape[1], distance, ref is None
        words = [row if isinstance(row, list) else [row] for row in labels.tolist()]
        others = words
        if ref_labels is not None:
            others = [row if isinstance(row, list) else [row] for row in ref_labels.tolist()]
        self.kind = [
            [None if self.alone and i == j else loop_kind(a, b, rule) for j, b in enumerate(others)]
            for i, a in enumerate(words)
        ]
        self.d = [[loop_distance(x, r, distance) for r in self.r] for x in self.x]

    def of_kind(self, kind: int) -> Iterator[tuple[int, int, float]]:
        """Row, reference and distance of every pair of a kind."""
        for i, kinds in enumerate(self.kind):
            for j, k in enumerate(kinds):
                if k == kind:
                    yield i, j, self.d[i][j]

    def candidates(self, i: int, kind: int) -> list[tuple[float, int]]:
        """Distance and number of every reference that is a pair of that kind with row i."""
        return [(self.d[i][j], j) for j, k in enumerate(self.kind[i]) if k == kind]

    def has(self, kind: int) -> Tensor:
        """Which rows have a pair of that kind."""
        return torch.tensor([kind in kinds for kinds in self.kind], dtype=torch.bool)

    def gradients(self, weights: dict[tuple[int, int], float]) -> tuple[Tensor, Tensor]:
        """Gradients of sum(weight * d) in query and ref; those of a self-batch are in query."""
        grad_x = [[0.0] * self.features for _ in self.x]
        grad_r = grad_x if self.alone else [[0.0] * self.features for _ in self.r]
        for (i, j), weight in weights.items():
            if weight == 0:
                continue
            x, r = self.x[i], self.r[j]
            slope = weight * loop_slope(x, r, self.d[i][j], self.distance)
            for k in range(self.features):
                grad_x[i][k] += slope * loop_du(x[k], r[k], self.distance)
                grad_r[j][k] += slope * loop_du(r[k], x[k], self.distance)
        return tensor(grad_x, self.features), tensor([] if self.alone else grad_r, self.features)


def tensor(rows: list[list[float]], columns: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.tensor(rows, dtype=dtype).reshape(len(rows), columns)


def loop_kind(a: list[int], b: list[int], rule: str) -> int | None:
    """0 for positives, 1 for negatives, None for pairs that are neither."""
    if a[0] == IGNORED or b[0] == IGNORED:
        return None
    if rule == "equal":
        return 0 if a == b else 1
    if rule == "any":
        return 0 if any(p & q for p, q in zip(a, b, strict=True)) else 1
    kind = 0 if a[0] == b[0] else 1
    allowed = {"a": True, "s": a[1] == b[1], "d": a[1] != b[1]}
    return kind if allowed[rule[len("group:") + kind]] else None


UNIT = ("cosine", "angular", "sqrt_cosine")


def loop_distance(x: list[float], r: list[float], distance: str) -> float:
    pairs = list(zip(x, r, strict=True))
    if distance == "dot":
        return -sum(a * b for a, b in pairs)
    if distance == "cityblock":
        return sum(abs(a - b) for a, b in pairs)
    if distance == "chi2":
        return sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b != 0)
    u = sum((a - b) ** 2 for a, b in pairs)
    if distance in UNIT and not (any(x) and any(r)):
        u = 2.0
    return {
        "euclidean": math.sqrt(u),
        "sqeuclidean": u,
        "cosine": u / 2,
        "angular": 2 * math.asin(min(math.sqrt(u) / 2, 1)),
        "sqrt_cosine": math.sqrt(u / 2),
        "rbf": 1 - math.exp(-u),
    }[distance]


def loop_slope(x: list[float], r: list[float], d: float, distance: str) -> float:
    """Derivative of the distance d in u."""
    if distance in UNIT and not (any(x) and any(r)):
        return 0.0
    if distance in ("euclidean", "sqrt_cosine"):
        return 0.0 if d == 0 else (0.5 if distance == "euclidean" else 0.25) / d
    if distance == "angular":
        return 0.0 if d == 0 or d >= math.pi else 0.5 / math.sin(d)
    return {"cosine": 0.5, "dot": 0.5, "rbf": 1 - d}.get(distance, 1.0)


def loop_du(a: float, b: float, distance: str) -> float:
    """Derivative of u in one feature a of a row, of which the other row has b."""
    if distance == "dot":
        return -2 * b
    if distance == "cityblock":
        return float((a > b) - (a < b))
    if distance == "chi2":
        return 0.0 if a + b == 0 else (a - b) * (a + 3 * b) / (a + b) ** 2
    return 2 * (a - b)


def loop_term(z: float, formula: str) -> tuple[float, float]:
    """A pointwise function and its derivative."""
    sigmoid = 1 / (1 + math.exp(-z)) if z > -700 else 0.0
    hinge = max(z, 0.0)
    return {
        "none": (0.0, 0.0),
        "linear": (z, 1.0),
        "square": (z * z, 2 * z),
        "hinge": (hinge, float(z > 0)),
        "squared_hinge": (hinge**2, 2 * hinge),
        "softplus": (hinge + math.log1p(math.exp(-abs(z))), sigmoid),
        "exp": (math.exp(min(z, 700)), math.exp(min(z, 700))),
        "squared_sigmoid": (sigmoid**2, 2 * sigmoid**2 * (1 - sigmoid)),
    }[formula]


def _at(parameter: Tensor, kind: int, i: int) -> float:
    return parameter[kind, i if parameter.shape[1] > 1 else 0].item()


def _kept(pairs: LoopPairs, kind: int, bound: Tensor | None) -> Iterator[tuple[int, int, float]]:
    for i, j, d in pairs.of_kind(kind):
        limit = None if bound is None else bound[kind, i].item()
        if limit is None or (d < limit if kind else d > limit):
            yield i, j, d


def loop_row_sum(
    pairs: LoopPairs,
    formulas: tuple[str, str],
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    grad: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """Sums, counts and slopes, and what follows from them for the rows.

    Returns:
        Sums, counts, slopes, gradients [2, N, D] and [2, M, D] of the totals, and the gradients of
        (grad * sums).sum().
    """
    n = len(pairs.x)
    sums, counts, slopes = ([[0.0] * n for _ in range(rows)] for rows in (2, 4, 4))
    of_total: list[dict[tuple[int, int], float]] = [{}, {}]
    of_rows: dict[tuple[int, int], float] = {}
    for kind, formula in enumerate(formulas):
        for i, j, d in _kept(pairs, kind, bound):
            factor = _at(scale, kind, i)
            value, slope = loop_term(factor * d + _at(offset, kind, i), formula)
            sums[kind][i] += value
            counts[kind][i] += 1
            counts[2 + kind][i] += value > 0
            slopes[kind][i] += slope
            slopes[2 + kind][i] += slope * d
            of_total[kind][i, j] = slope * factor
            of_rows[i, j] = slope * factor * (1.0 if grad is None else grad[kind, i].item())
    totals = [pairs.gradients(weights) for weights in of_total]
    return (
        tensor(sums, n),
        tensor(counts, n, torch.int64),
        tensor(slopes, n),
        torch.stack([grad_query for grad_query, _ in totals]),
        torch.stack([grad_ref for _, grad_ref in totals]),
        *pairs.gradients(of_rows),
    )


def loop_logit(z: float, form: str, shape: float) -> tuple[float, float]:
    if form == "circle":
        weight = max(z + shape, 0.0)
        return weight * (z - shape), weight
    return z, 1.0


def _log_sum_exp(logits: list[tuple[float, float]]) -> tuple[float, float]:
    """Log-sum-exp of the first numbers, and the mean of the second under their softmax."""
    if not logits:
        return -math.inf, 0.0
    top = max(logit for logit, _ in logits)
    total = sum(math.exp(logit - top) for logit, _ in logits)
    mean = sum(math.exp(logit - top) * d for logit, d in logits) / total
    return top + math.log(total), mean


def loop_row_lse(
    pairs: LoopPairs,
    forms: tuple[str, str],
    scale: Tensor,
    offset: Tensor,
    bound: Tensor | None,
    shape: float,
    grad: Tensor,
    ref_grad: Tensor | None,
) -> tuple[Tensor, ...]:
    """Statistics by row, [2, N] each, by reference, [2, M], and gradients.

    Returns:
        lse, mean, counts; the same over the queries of each reference; the gradients of
        (grad * lse).sum() + (ref_grad * ref_lse).sum() in query and ref.
    """
    n, m = len(pairs.x), len(pairs.r)
    by_row = [[[] for _ in range(n)] for _ in range(2)]
    by_column = [[[] for _ in range(m)] for _ in range(2)]
    found = []
    for kind, form in enumerate(forms):
        for i, j, d in _kept(pairs, kind, bound) if form != "none" else ():
            factor = _at(scale, kind, i)
            value, slope = loop_logit(factor * d + _at(offset, kind, i), form, shape)
            by_row[kind][i].append((value, d))
            by_column[kind][j].append((value, d))
            found.append((kind, i, j, value, slope * factor))
    outputs = []
    for groups, size in ((by_row, n), (by_column, m)):
        statistics = [[_log_sum_exp(group) for group in kind] for kind in groups]
        outputs += [tensor([[s[at] for s in kind] for kind in statistics], size) for at in (0, 1)]
        outputs.append(tensor([[len(g) for g in kind] for kind in groups], size, torch.int64))
    weights: dict[tuple[int, int], float] = {}
    for kind, i, j, value, slope in found:
        share = grad[kind, i].item() * math.exp(value - outputs[0][kind, i].item())
        if ref_grad is not None:
            share += ref_grad[kind, j].item() * math.exp(value - outputs[3][kind, j].item())
        weights[i, j] = slope * share
    return (*outputs, *pairs.gradients(weights))


def loop_threshold_sum(
    pairs: LoopPairs, kind: int, formula: str, thresholds: Tensor, grad: Tensor
) -> tuple[Tensor, ...]:
    """Sums, counts and slopes, [N, K] each, and the gradients of (grad * sums).sum()."""
    n, k = grad.shape
    t = thresholds.double().expand(n, k).tolist()
    sums, counts, slopes = ([[0.0] * k for _ in range(n)] for _ in range(3))
    weights: dict[tuple[int, int], float] = {}
    for i, j, d in pairs.of_kind(kind):
        weights[i, j] = 0.0
        for at in range(k):
            if t[i][at] == -math.inf:
                continue
            value, slope = loop_term(t[i][at] - d, formula)
            sums[i][at] += value
            counts[i][at] += t[i][at] > d
            slopes[i][at] += slope
            weights[i, j] -= grad[i, at].item() * slope
    return (
        tensor(sums, k),
        tensor(counts, k, torch.int64),
        tensor(slopes, k),
        *pairs.gradients(weights),
    )


def loop_nearest_beyond(pairs: LoopPairs, kind: int, farthest: bool, thresholds: Tensor) -> Tensor:
    """The nearest beyond each threshold, or the farthest below it; -1 if there is none."""
    index = torch.full(thresholds.shape, -1)
    for i, limits in enumerate(thresholds.tolist()):
        for k, limit in enumerate(limits):
            sign = -1 if farthest else 1
            within = [(sign * d, j) for d, j in pairs.candidates(i, kind) if sign * (d - limit) > 0]
            index[i, k] = min(within)[1] if within else -1
    return index


def loop_row_top_k(pairs: LoopPairs, kind: int, k: int, farthest: bool) -> Tensor:
    """The k nearest or farthest, -1 where there are no more."""
    index = torch.full((len(pairs.x), k), -1)
    for i in range(len(pairs.x)):
        sign = -1 if farthest else 1
        best = sorted((sign * d, j) for d, j in pairs.candidates(i, kind))[:k]
        for at, (_, j) in enumerate(best):
            index[i, at] = j
    return index
