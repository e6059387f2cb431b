# SPDX-License-Identifier: Apache-2.0
"""What row_sum, row_grad and row_lse must compute, in float64, and what rounding may change."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cuda_batch import Batch, widen
from cuda_reference import EPS, TINY, WEIGHT_EPS, Pairs, slope_of, value_of
from cuda_rows import Terms

Array = NDArray[Any]
Function = Callable[[Array], Array]


def _sigmoid(z: Array) -> Array:
    return np.exp(-np.logaddexp(0, -z))


TERM: dict[str, tuple[Function, Function]] = {
    "none": (np.zeros_like, np.zeros_like),
    "linear": (np.positive, np.ones_like),
    "square": (np.square, lambda z: 2 * z),
    "hinge": (lambda z: np.maximum(z, 0), lambda z: (z > 0) * 1.0),
    "squared_hinge": (lambda z: np.maximum(z, 0) ** 2, lambda z: 2 * np.maximum(z, 0)),
    "softplus": (lambda z: np.logaddexp(0, z), _sigmoid),
    "exp": (np.exp, np.exp),
    "squared_sigmoid": (
        lambda z: _sigmoid(z) ** 2,
        lambda z: 2 * _sigmoid(z) ** 2 * _sigmoid(-z),
    ),
}


@dataclass
class Known:
    """A number per pair and by how much rounding may change it."""

    value: Array
    error: Array

    def apply(self, function: Function, steps: float = 8) -> "Known":
        """Of a function that is monotone, or nearly so, within the error."""
        middle = function(self.value)
        ends = function(self.value - self.error), function(self.value + self.error)
        error = np.maximum(*(np.abs(end - middle) for end in ends))
        return Known(middle, error + steps * EPS * np.abs(middle) + TINY)

    def times(self, other: "Known | Array") -> "Known":
        if not isinstance(other, Known):
            return Known(self.value * other, self.error * np.abs(other))
        value = self.value * other.value
        error = self.error * (np.abs(other.value) + other.error)
        error += np.abs(self.value) * other.error
        return Known(value, error + 2 * EPS * np.abs(value))


class RowPairs:
    """Distances of all pairs, and what terms make of them."""

    def __init__(self, batch: Batch, terms: Terms, **options: Any) -> None:
        self.batch, self.terms = batch, terms
        self.pairs = pairs = Pairs(batch, **options)
        name = batch.distance
        value = pairs.value
        ends = value_of(pairs.u + pairs.error, name), value_of(pairs.u - pairs.error, name)
        error = np.maximum(ends[0] - value, value - ends[1]) + 8 * EPS * np.abs(value)
        if name == "rbf":
            error += EPS
        self.d = Known(value, error)
        slope = slope_of(value, name)
        near = [slope_of(v, name) for v in (value + error, np.maximum(value - error, value / 2))]
        slope_error = np.maximum(*(np.abs(other - slope) for other in near)) + 8 * EPS * slope
        self.slope = Known(slope, slope_error + (EPS if name == "rbf" else 0))

    def z(self, kind: int, by_ref: bool) -> Known:
        """By the numbers of the query rows or of the references."""
        a, b = (self._of(self.terms.array(name)[kind], by_ref) for name in ("scale", "offset"))
        value = a * self.d.value + b
        error = np.abs(a) * self.d.error + 2 * EPS * (np.abs(a * self.d.value) + np.abs(b))
        return Known(value, error)

    def kept(self, kind: int, by_ref: bool) -> tuple[Array, Array]:
        """Pairs that are within the bounds in any case, and those that may be."""
        mask = self.pairs.kinds[kind]
        if self.terms.bound is None:
            return mask, mask
        bound = self._of(np.asarray(self.terms.bound, np.float32)[kind], by_ref)
        over = (self.d.value - bound) * (1 if kind == 0 else -1)
        return mask & (over > self.d.error), mask & (over > -self.d.error)

    def _of(self, numbers: Array, by_ref: bool) -> Array:
        numbers = numbers.astype(np.float64)
        return numbers[None, :] if by_ref else numbers[:, None]

    def gradient(self, weights: list[Known]) -> tuple[Array, Array]:
        """Of the sum of weights times distances in the query rows, and the error allowed."""
        pairs = self.pairs
        total, spread = 0.0, 0.0
        for known in weights:
            h = known.times(self.slope)
            live = ~pairs.flat
            value, error = h.value * live, h.error * live
            if self.batch.distance == "dot":
                total = total - 2 * value @ pairs.r
                spread = spread + 2 * error @ np.abs(pairs.r)
            else:
                total = total + 2 * (value.sum(1)[:, None] * pairs.x - value @ pairs.r)
                spread = spread + np.stack(
                    [2 * e @ np.abs(x - pairs.r) for e, x in zip(error, pairs.x, strict=True)]
                )
            largest = np.abs(pairs.x).max(1, initial=0)[:, None]
            largest = largest + np.abs(pairs.r).max(1, initial=0)
            scale = WEIGHT_EPS[self.batch.planes]
            spread = spread + scale * ((np.abs(value) + error) * largest).sum(1)[:, None]
        return np.asarray(total), np.asarray(spread)

    def term_weight(
        self, kind: int, by_ref: bool, weight: Array | None, *, both: bool = False
    ) -> Known:
        """Derivative of weighted sums in the distances; ``both``: without a weight, twice."""
        sure, maybe = self.kept(kind, by_ref)
        slope = self.z(kind, by_ref).apply(TERM[self.terms.names[kind]][1])
        factor = self._of(self.terms.array("scale")[kind], by_ref)
        if weight is not None:
            factor = factor * self._of(weight[kind], by_ref)
        known = slope.times(np.broadcast_to(factor, slope.value.shape))
        error = known.error + (np.abs(known.value)) * ~sure
        return Known(known.value * maybe * (2 if both else 1), error * maybe * (2 if both else 1))

    def logits(self, kind: int, by_ref: bool) -> tuple[Known, Known]:
        z, shape = self.z(kind, by_ref), float(np.float32(self.terms.shape))
        if self.terms.names[kind] != "circle":
            return z, Known(np.ones_like(z.value), np.zeros_like(z.value))
        factor = z.apply(lambda z: np.maximum(z + shape, 0))
        factor.error += 2 * EPS * (np.abs(z.value) + abs(shape))
        other = z.apply(lambda z: z - shape)
        other.error += 2 * EPS * (np.abs(z.value) + abs(shape))
        return factor.times(other), factor

    def lse_weight(self, kind: int, by_ref: bool, weight: Array, lse: Array) -> Known:
        """Derivative of weighted log-sum-exps in the distances."""
        if self.terms.names[kind] == "none":
            zero = np.zeros_like(self.d.value)
            return Known(zero, zero)
        sure, maybe = self.kept(kind, by_ref)
        logit, slope = self.logits(kind, by_ref)
        level = self._of(lse[kind], by_ref)
        known = level > -np.inf
        level = np.where(known, level, 0)
        exponent = Known(
            np.where(known & maybe, logit.value - level, -np.inf),
            logit.error + 2 * EPS * (np.abs(logit.value) + np.abs(level)),
        )
        factor = self._of(self.terms.array("scale")[kind] * weight[kind], by_ref)
        share = exponent.apply(np.exp).times(slope)
        share = share.times(np.broadcast_to(factor, share.value.shape))
        error = share.error + np.abs(share.value) * ~sure
        return Known(share.value * maybe, error * maybe)


def within(ours: Array, wanted: Array, error: Array) -> None:
    """The error is no larger than allowed."""
    excess = np.abs(widen(ours) - wanted) - error
    bad = ~(excess <= 0)
    assert not bad.any(), (excess[bad][:5], np.argwhere(bad)[:5])


def rounded(ours: Array, wanted: Array, error: Array) -> None:
    """The same of a gradient in the dtype of the rows."""
    rounding = {"f": 2.0**-24, "e": 2.0**-11, "H": 2.0**-8}[ours.dtype.char]
    floor = 2.0**-25 if ours.dtype.char == "e" else TINY
    within(ours, wanted, error + rounding * np.abs(wanted) + floor)


def check_row_sum(batch: Batch, terms: Terms, out: dict[str, Array], **options: Any) -> None:
    """Sums, counts, slopes and the gradients of the totals."""
    rows = RowPairs(batch, terms, **options)
    for kind, name in enumerate(terms.names):
        sure, maybe = rows.kept(kind, False)
        unsure = maybe & ~sure
        z = rows.z(kind, False)
        value, slope = (z.apply(function) for function in TERM[name])
        moment = slope.times(rows.d)
        slopes = out["slopes"][kind::2]
        numbers = [(out["sums"][kind], value), (slopes[0], slope), (slopes[1], moment)]
        for ours, known in numbers:
            size = np.abs(known.value)
            error = (known.error * maybe + size * unsure).sum(1) + 8 * EPS * (size * maybe).sum(1)
            within(ours, (known.value * maybe).sum(1), error)
        counts, active = out["counts"][kind], out["counts"][2 + kind]
        assert ((sure.sum(1) <= counts) & (counts <= maybe.sum(1))).all()
        least = TERM[name][0](z.value - z.error) > TINY**0.5
        most = TERM[name][0](z.value + z.error) > 0
        if name == "square":
            least, most = np.abs(z.value) > z.error + TINY**0.25, np.ones_like(least)
        assert (((least & sure).sum(1) <= active) & (active <= (most & maybe).sum(1))).all()
        if "grad" in out:
            weights = [rows.term_weight(kind, False, None)]
            if batch.alone:
                weights.append(rows.term_weight(kind, True, None))
            within(out["grad"][kind], *rows.gradient(weights))


def check_row_grad(
    batch: Batch,
    terms: Terms,
    grad: Array,
    *,
    own: dict[str, Array] | None = None,
    other: dict[str, Array] | None = None,
    logits: bool = False,
) -> None:
    """The gradient of a weighted sum, or of weighted log-sum-exps."""
    rows = RowPairs(batch, terms)
    weights = []
    for kind in (0, 1):
        for by_ref, role in ((False, own), (True, other)):
            if role is None:
                continue
            if logits:
                weights.append(rows.lse_weight(kind, by_ref, role["weight"], role["lse"]))
            else:
                weights.append(rows.term_weight(kind, by_ref, role.get("weight")))
    rounded(grad, *rows.gradient(weights))


def check_row_lse(batch: Batch, terms: Terms, out: dict[str, Array]) -> None:
    """Log-sum-exps, means and counts."""
    rows = RowPairs(batch, terms)
    for kind, name in enumerate(terms.names):
        lse, mean, counts = (out[key][kind] for key in ("lse", "mean", "counts"))
        sure, maybe = rows.kept(kind, False)
        np.testing.assert_array_equal(sure, maybe, "choose other bounds")
        if name == "none":
            assert (lse == -np.inf).all() and (mean == 0).all() and (counts == 0).all()
            continue
        logit, _ = rows.logits(kind, False)
        some = sure.any(1)
        np.testing.assert_array_equal(counts, sure.sum(1))
        assert (lse[~some] == -np.inf).all() and (mean[~some] == 0).all()
        logits = np.where(sure, logit.value, -np.inf)[some]
        if not some.any():
            continue
        wanted = np.logaddexp.reduce(logits, 1)
        p = np.exp(logits - wanted[:, None])
        error = (p * logit.error[some]).sum(1)
        within(lse[some], wanted, error + 4e-7 + 2 * EPS * np.abs(wanted))
        d = rows.d.value[some]
        wanted_mean = (p * d).sum(1)
        spread = np.abs(d - wanted_mean[:, None]) * (logit.error[some] + 4e-7)
        error = (p * (spread + rows.d.error[some])).sum(1) + 1e-6 * (p * np.abs(d)).sum(1)
        within(mean[some], wanted_mean, error)
