# SPDX-License-Identifier: Apache-2.0
"""Sums and products that are rounded once, in any direction.

A value on the way is kept as float64 that is "rounded to odd": if it is not exact, its last bit is
set. Such a value can be rounded to any format of at most 50 bits as if it were exact.
"""

import numpy as np

from .dtypes import Array

TINY32 = np.float32(2.0**-126)


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded sum of two arrays, and its error."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def two_product(a: Array, b: Array) -> tuple[Array, Array]:
    """The rounded product of two arrays of float64, and its error."""
    product = a * b
    (a1, a0), (b1, b0) = _halves(a), _halves(b)
    return product, ((a1 * b1 - product) + a1 * b0 + a0 * b1) + a0 * b0


def _halves(a: Array) -> tuple[Array, Array]:
    scaled = a * 134217729.0
    high = scaled - (scaled - a)
    return high, a - high


def to_odd(value: Array, error: Array) -> Array:
    """``value + error``, of which value is the rounded sum, rounded to odd."""
    inexact = error != 0
    if not np.count_nonzero(inexact):
        return value
    inexact &= value.view(np.uint64) & np.uint64(1) == 0
    inexact &= np.isfinite(value) & np.isfinite(error)
    # One step toward the true sum, in the order of the bits: away from zero is up.
    outward = (error > 0) == (value > 0)
    step = np.where(outward, np.int64(1), np.int64(-1)) * inexact
    odd: Array = (value.view(np.int64) + step).view(np.float64)
    return odd


def odd_sum(a: Array, b: Array) -> Array:
    """The sum of float64, rounded to odd."""
    return to_odd(*two_sum(a, b))


def odd_fma32(a: Array, b: Array, c: Array) -> Array:
    """A * b + c for float32 as float64, rounded to odd."""
    return odd_sum(a.astype(np.float64) * b, c.astype(np.float64))


def fma32(a: Array, b: Array, c: Array) -> Array:
    """A * b + c for float32, rounded once to nearest."""
    total = a.astype(np.float64)
    total *= b
    total += c
    result: Array = total.astype(np.float32)
    # The sum was rounded to 53 bits. Rounding it again errs only if it is half way between two
    # float32, or among the subnormal ones.
    doubtful = total.view(np.uint64) & np.uint64(0x1FFFFFFF) == np.uint64(0x10000000)
    small = np.abs(result) < TINY32
    if np.count_nonzero(small):
        doubtful |= small & (total != 0)
    if np.count_nonzero(doubtful):
        result[doubtful] = odd_fma32(a[doubtful], b[doubtful], c[doubtful]).astype(np.float32)
    return result


def fma64(a: Array, b: Array, c: Array) -> Array:
    """A * b + c for float64, rounded once to nearest (Boldo and Melquiond, 2008).

    Where parts of the product would overflow or underflow, the product is rounded first.
    """
    if not np.count_nonzero((a.view(np.uint64) | b.view(np.uint64)) & np.uint64((1 << 27) - 1)):
        # Factors of at most 26 bits: the product is exact.
        return a * b + c
    high, low = two_product(a, b)
    sum_high, rest = two_sum(c, low)
    sum_all, middle = two_sum(high, sum_high)
    result: Array = sum_all + to_odd(*two_sum(middle, rest))
    size = np.abs(high)
    safe = (size > 1e-280) & (np.maximum(np.abs(a), np.abs(b)) < 1e290) & np.isfinite(result)
    if np.count_nonzero(safe) < safe.size:
        result = np.where(safe, result, high + c)
    return result


def to_f32(value: Array, mode: str) -> Array:
    """float64, exact or rounded to odd, to float32 in the direction rn, rz, rm or rp."""
    nearest: Array = value.astype(np.float32)
    if mode == "rn":
        return nearest
    above, below = nearest > value, nearest < value
    if mode == "rz":
        above, below = above & (value > 0), below & (value < 0)
    elif mode == "rm":
        below = np.zeros_like(below)
    else:
        above = np.zeros_like(above)
    result = np.where(above, np.nextafter(nearest, np.float32(-np.inf)), nearest)
    return np.where(below, np.nextafter(nearest, np.float32(np.inf)), result)


def odd_f32(value: Array) -> Array:
    """float64 to float32, rounded to odd: it can be rounded on to bf16 or half."""
    toward_zero = to_f32(value, "rz")
    inexact = (toward_zero != value) & np.isfinite(value)
    odd = (toward_zero.view(np.uint32) | np.uint32(1)).view(np.float32)
    return np.where(inexact, odd, toward_zero)


# ---- bf16, held as its 16 bits -------------------------------------------------------------------


def from_bf16(bits: Array) -> Array:
    """bf16 to float32, exactly."""
    return (bits.astype(np.uint32) << np.uint32(16)).view(np.float32)


def to_bf16(value: Array, mode: str = "rn") -> Array:
    """float32, exact or rounded to odd, to bf16 to nearest even or toward zero."""
    bits = value.view(np.uint32)
    if mode == "rn":
        bits = bits + (np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1)))
    elif mode != "rz":
        raise ValueError(mode)
    return np.where(np.isnan(value), np.uint16(0x7FFF), (bits >> np.uint32(16)).astype(np.uint16))


def to_f16(value: Array, mode: str = "rn") -> Array:
    """float32 or float64, exact or rounded to odd, to half to nearest even or toward zero."""
    nearest: Array = value.astype(np.float16)
    if mode == "rz":
        wide = nearest.astype(value.dtype)
        beyond = np.abs(wide) > np.abs(value)
        nearest = np.where(beyond, np.nextafter(nearest, np.float16(0)), nearest)
    elif mode != "rn":
        raise ValueError(mode)
    return nearest


def flush(value: Array) -> Array:
    """Subnormal numbers replaced by zeros of their sign (.ftz)."""
    small = np.abs(value) < np.finfo(value.dtype).tiny
    return np.where(small, np.copysign(value.dtype.type(0), value), value)
