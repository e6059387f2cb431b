# SPDX-License-Identifier: Apache-2.0
"""What the tile engine's kernels must compute, in float64, and how far rounding may take them."""

import copy
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_batch import Batch, bfloat16, widen

Array = NDArray[Any]
EPS = 2.0**-23
TINY = 2.0**-149
NEAR = 1 / 1024
IGNORED = -(2**63)
# Errors of the planes: two carry 22 bits; a weight of one plane is rounded to half precision.
WEIGHT_EPS = {1: 2.0**-10, 2: 2.0**-20}


def encode(x: Array, dtype: str) -> Array:
    """Rows of a dtype, bfloat16 as uint16."""
    return bfloat16(x) if dtype == "bfloat16" else np.ascontiguousarray(x, dtype)


def unit(x: Array) -> Array:
    """Rows of length 1; zero rows stay."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    return x / np.where(norm == 0, 1, norm)


def value_of(u: Array, distance: str) -> Array:
    """The distance, as formula.h has it."""
    if distance == "dot":
        return 0.5 * u
    u = np.maximum(u, 0)
    return {
        "euclidean": np.sqrt,
        "sqeuclidean": np.positive,
        "cosine": lambda u: 0.5 * u,
        "angular": lambda u: 2 * np.arcsin(np.minimum(np.sqrt(u) / 2, 1)),
        "sqrt_cosine": lambda u: np.sqrt(u / 2),
        "rbf": lambda u: -np.expm1(-u),
    }[distance](u)


def slope_of(value: Array, distance: str) -> Array:
    """Derivative of the distance in u."""
    if distance in ("euclidean", "sqrt_cosine"):
        half = 0.5 if distance == "euclidean" else 0.25
        return np.where(value == 0, 0, half / np.where(value == 0, 1, value))
    if distance == "angular":
        sine = np.sin(value)
        return np.where(sine <= 0, 0, 0.5 / np.where(sine <= 0, 1, sine))
    if distance == "rbf":
        return 1 - value
    return np.full_like(value, 1.0 if distance == "sqeuclidean" else 0.5)


def pair_kinds(labels: Array, ref_labels: Array, rule: str) -> list[Array]:
    """Masks of the positives and of the negatives, as ops/labels.py has them."""
    x, r = (a[:, None] if a.ndim == 1 else a for a in (labels, ref_labels))
    known = (x[:, :1] != IGNORED) & (r[:, 0] != IGNORED)
    if rule.startswith("group"):
        same, groups = x[:, :1] == r[:, 0], x[:, 1:] == r[:, 1]
        allowed = {"a": known, "s": known & groups, "d": known & ~groups}
        return [allowed[rule[-2]] & same, allowed[rule[-1]] & ~same]
    if rule == "any":
        same = ((x[:, None] & r[None]) != 0).any(2)
    else:
        same = (x[:, None] == r[None]).all(2)
    return [same & known, ~same & known]


class Pairs:
    """All pairs of a batch; ``operand_eps``: what rounding the operands costs u."""

    def __init__(self, batch: Batch, operand_eps: float = 0.0) -> None:
        self.distance = batch.distance
        self.x, self.r = widen(batch.query.rows), widen(batch.ref.rows)
        own = np.eye(batch.n, batch.m, dtype=bool) & batch.alone
        kinds = pair_kinds(batch.query.labels, batch.ref.labels, batch.rule)
        self.kinds = [mask & ~own for mask in kinds]
        a, b = (self.x**2).sum(1), (self.r**2).sum(1)
        size = a[:, None] + b[None]
        steps = 4 + batch.d / 64
        if self.distance == "dot":
            self.u = -2 * self.x @ self.r.T
            near = np.zeros_like(own)
            self.exact_error = steps * EPS * np.abs(self.x) @ np.abs(self.r.T)
        else:
            self.u = np.stack([((row - self.r) ** 2).sum(1) for row in self.x])
            near = self.u < NEAR / 2 * size
            self.exact_error = steps * EPS * self.u
        self.flat = np.zeros_like(own)
        if self.distance in ("cosine", "angular", "sqrt_cosine"):
            self.flat = (a == 0)[:, None] | (b == 0)[None]
            self.u[self.flat] = 2
        floor = (batch.d + 4) * TINY
        self.exact_error = self.exact_error + floor
        gram_error = (4 * EPS + operand_eps) * size + floor
        # A zero row is at distance 1 from unit rows, which rounding has left not quite so long.
        length = np.abs(np.where(a == 0, 1, a) - 1)[:, None] + np.abs(np.where(b == 0, 1, b) - 1)
        gram_error += np.where(self.flat, length + 8 * EPS, 0)
        self.near = near
        self.error = np.where(near, self.exact_error, gram_error)
        self.key_error = gram_error

    @property
    def value(self) -> Array:
        return value_of(self.u, self.distance)


def check_hardest(batch: Batch, out: dict[str, Array], **options: Any) -> None:
    """The pairs found are hardest but for rounding, and their distances are exact."""
    exact = options.pop("exact", False)
    pairs = Pairs(batch, **options)
    rows = np.arange(batch.n)
    for kind, mask in enumerate(pairs.kinds):
        index, distance = out["index"][kind], out["distance"][kind]
        some = mask.any(1)
        np.testing.assert_array_equal(index >= 0, some)
        assert (index[~some] == -1).all() and (distance[~some] == 0).all()
        i, j = rows[some], index[some]
        assert (j < batch.m).all() and mask[i, j].all()
        if batch.m == 0:
            continue
        sign = 1 if kind else -1
        best = np.where(mask, sign * pairs.u, np.inf).argmin(1)[some]
        both_near = pairs.near[i, j] & pairs.near[i, best]
        allowed = np.where(
            both_near | exact,
            pairs.exact_error[i, j] + pairs.exact_error[i, best],
            pairs.key_error[i, j] + pairs.key_error[i, best],
        )
        loss = sign * (pairs.u[i, j] - pairs.u[i, best])
        assert (loss <= allowed).all(), (kind, i[loss > allowed], loss[loss > allowed])
        low = value_of(pairs.u - pairs.exact_error, batch.distance)[i, j]
        high = value_of(pairs.u + pairs.exact_error, batch.distance)[i, j]
        slack = EPS * np.abs(high)
        ours = distance[some].astype(np.float64)
        assert ((ours >= low - slack) & (ours <= high + slack)).all()


def lowest_hardest(batch: Batch) -> Array:
    """The indices where all keys are exact: the lowest among equals."""
    pairs = Pairs(batch)
    positives, negatives = pairs.kinds
    return np.stack(
        [
            np.where(positives.any(1), np.where(positives, pairs.value, -np.inf).argmax(1), -1),
            np.where(negatives.any(1), np.where(negatives, pairs.value, np.inf).argmin(1), -1),
        ]
    )


def check_triplets(out: dict[str, Array], rule: dict[str, Any]) -> None:
    """Loss, slope and scale follow from the pairs found."""
    d_ap, d_an = out["distance"].astype(np.float64)
    has_positive, has_negative = out["index"] >= 0
    margin, keep = float(np.float32(rule["margin"])), rule.get("keep", False)
    moving = has_negative & (has_positive | keep)
    v = np.where(moving, d_ap - d_an + margin, margin)
    smooth = rule.get("smooth", False)
    loss = np.where(moving | keep, np.logaddexp(0, v) if smooth else np.maximum(v, 0), 0)
    slope = np.where(moving, 1 / (1 + np.exp(-v)) if smooth else v > 0, 0)
    reduction = rule.get("reduction", "mean")
    counted = (loss > 0) if reduction == "mean_nonzero" else moving | keep
    divisor = 1 if reduction == "sum" else max(1, counted.sum())
    np.testing.assert_allclose(out["slope"], np.stack([slope, -slope]), rtol=2e-6, atol=1e-7)
    np.testing.assert_allclose(out["scale"], [1 / divisor], rtol=1e-7)
    np.testing.assert_allclose(out["loss"], [loss.sum() / divisor], rtol=2e-6, atol=1e-7)


def swapped(batch: Batch) -> Batch:
    """The references as rows, as the backward pass sees them."""
    other = copy.copy(batch)
    other.query, other.ref = batch.ref, batch.query
    other.n, other.m = batch.m, batch.n
    return other


def usual_margins(distance: str, d: int) -> tuple[float, float]:
    """Margins that a good part of random pairs violates."""
    d = max(d, 1)
    return {
        "euclidean": (0.5, float(np.sqrt(2 * d))),
        "sqeuclidean": (0.5, 2.0 * d),
        "cosine": (0.1, 1.0),
        "dot": (-2.0, 0.5),
    }[distance]


def problem(
    rng: np.random.Generator,
    n: int,
    d: int,
    classes: int,
    m: int | None = None,
    *,
    dtype: str = "float32",
    planes: int | None = None,
    distance: str = "euclidean",
    lone: tuple[int, ...] = (),
    **where: Any,
) -> Batch:
    """A batch of random rows. ``classes`` 0, or one of ``lone``: a class of its own."""

    def side(count: int) -> tuple[Array, Array]:
        x = rng.standard_normal((count, d))
        if distance in ("cosine", "angular", "sqrt_cosine"):
            x = unit(x)
        elif distance == "rbf":
            x /= np.sqrt(max(2 * d, 1))
        labels = rng.integers(0, classes, count) if classes else np.arange(count)
        return encode(x, dtype), labels.astype(np.int64)

    rows, labels = side(n)
    labels[list(lone)] = n + np.array(lone, np.int64)
    ref, ref_labels = (None, None) if m is None else side(m)
    planes = planes or (2 if dtype == "float32" else 1)
    return Batch(rows, labels, ref, ref_labels, planes=planes, distance=distance, **where)
