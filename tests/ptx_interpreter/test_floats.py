# SPDX-License-Identifier: Apache-2.0
"""What single float instructions compute, against exact fractions and numbers from the manual."""

import math
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from ptx_interpreter.single import execute, same
from ptx_interpreter.test_integers import pairs

NAN, INF = np.nan, np.inf
TINY = np.float32(1e-40)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    with np.errstate(all="ignore"):
        yield


def draw(n: int = 320) -> list[Any]:
    """Three arrays of float32 of many magnitudes."""
    rng = np.random.default_rng(0)
    return [
        (rng.standard_normal(n) * 2.0 ** rng.integers(-20, 20, n)).astype(np.float32)
        for _ in range(3)
    ]


def rounded(exact: Fraction, direction: str) -> np.float32:
    """The float32 next to a number in a direction, by comparing fractions."""
    nearest = np.float32(float(exact))
    for other in (np.nextafter(nearest, np.float32(INF)), np.nextafter(nearest, np.float32(-INF))):
        a, b = abs(Fraction(float(other)) - exact), abs(Fraction(float(nearest)) - exact)
        if a < b or a == b and int(other.view(np.uint32)) % 2 == 0:
            nearest = other
    if direction == "rn":
        return nearest
    toward = {"rz": -INF if exact > 0 else INF, "rm": -INF, "rp": INF}[direction]
    here = Fraction(float(nearest))
    wrong = here > exact if toward < 0 else here < exact
    return np.nextafter(nearest, np.float32(toward)) if wrong else nearest


@pytest.mark.parametrize("direction", ["rn", "rz", "rm", "rp"])
def test_sums_and_products_are_rounded_once(direction: str) -> None:
    a, b, c = draw(96)
    # Half-way cases, which rounding to float64 in between would get wrong.
    a[:3], b[:3], c[:3] = 1 + 2**-12, 1 + 2**-12, [2**-80, -(2**-80), 0]
    a[3:5], b[3:5], c[3:5] = 2**24 + 2, 1, [1 + 2**-23, 1]
    operands = [("f32", a), ("f32", b), ("f32", c)]
    exact = [tuple(Fraction(float(v)) for v in row) for row in zip(a, b, c, strict=True)]
    got = execute(f"fma.{direction}.f32", "f32", operands)
    same(got, [rounded(x * y + z, direction) for x, y, z in exact])
    got = execute(f"mul.{direction}.f32", "f32", operands[:2])
    same(got, [rounded(x * y, direction) for x, y, _ in exact])
    got = execute(f"add.{direction}.f32", "f32", operands[1:])
    same(got, [rounded(y + z, direction) for _, y, z in exact])
    got = execute(f"sub.{direction}.f32", "f32", operands[1:])
    same(got, [rounded(y - z, direction) for _, y, z in exact])


def test_fma_of_doubles_is_rounded_once() -> None:
    rng = np.random.default_rng(0)
    a, b = rng.standard_normal((2, 256))
    product = np.array([float(Fraction(x) * Fraction(y)) for x, y in zip(a, b, strict=True)])
    for c in (-product, rng.standard_normal(256), np.zeros(256), product * 2.0**-53):
        got = execute("fma.rn.f64", "f64", [("f64", a), ("f64", b), ("f64", c)])
        exact = [
            float(Fraction(x) * Fraction(y) + Fraction(z)) for x, y, z in zip(a, b, c, strict=True)
        ]
        same(got, exact)
    special = [
        np.array(v) for v in ([INF, NAN, 1e300, 0.0], [1.0, 1.0, 1e300, 5.0], [1.0, 1.0, 1.0, -0.0])
    ]
    got = execute("fma.rn.f64", "f64", [("f64", v) for v in special])
    same(got, [INF, NAN, INF, 0.0])


def test_float_functions() -> None:
    a, b, _ = draw()
    positive = np.abs(a)
    double = positive.astype(np.float64)
    same(execute("div.rn.f32", "f32", [("f32", a), ("f32", b)]), a / b)
    same(execute("sqrt.rn.f32", "f32", [("f32", positive)]), np.sqrt(positive))
    same(execute("rcp.rn.f64", "f64", [("f64", double)]), 1 / double)
    for opcode, expected in {
        "rsqrt.approx.f32": 1 / np.sqrt(double),
        "lg2.approx.f32": np.log2(double),
        "rcp.approx.ftz.f32": 1 / double,
    }.items():
        np.testing.assert_allclose(execute(opcode, "f32", [("f32", positive)]), expected, rtol=1e-6)
    small = np.linspace(-20, 20, 64, dtype=np.float32)
    np.testing.assert_allclose(
        execute("ex2.approx.f32", "f32", [("f32", small)]), 2.0**small, rtol=1e-6
    )
    gross = execute("rcp.approx.ftz.f64", "f64", [("f64", double)])
    np.testing.assert_allclose(gross, 1 / double, rtol=2.0**-19)
    assert not (gross.view(np.uint64) & np.uint64(0xFFFFFFFF)).any()
    same(execute("copysign.f32", "f32", [("f32", a), ("f32", b)]), np.copysign(b, a))
    same(execute("abs.f32", "f32", [("f32", a)]), np.abs(a))
    same(execute("neg.f64", "f64", [("f64", double)]), -double)


def test_subnormals_and_saturation() -> None:
    values = np.array([TINY, -TINY, 1, 2, -3, NAN, INF, 0.25], np.float32)
    ones = np.ones(8, np.float32)
    operands = [("f32", values), ("f32", ones)]
    flushed = np.array([0, -0.0, 1, 2, -3, NAN, INF, 0.25])
    same(execute("mul.f32", "f32", operands), values)
    same(execute("mul.ftz.f32", "f32", operands), flushed)
    same(execute("mul.sat.f32", "f32", operands), [TINY, 0, 1, 1, 0, 0, 1, 0.25])
    same(execute("cvt.sat.f32.f32", "f32", operands[:1]), [TINY, 0, 1, 1, 0, 0, 1, 0.25])


def test_minimum_and_maximum() -> None:
    a = np.array([1, NAN, 1, NAN, -0.0, 0.0, -INF, -1], np.float32)
    b = np.array([NAN, 1, 2, NAN, 0.0, -0.0, 3, -1], np.float32)
    operands = [("f32", a), ("f32", b)]
    same(execute("min.f32", "f32", operands), [1, 1, 1, NAN, -0.0, -0.0, -INF, -1])
    same(execute("max.f32", "f32", operands), [1, 1, 2, NAN, 0.0, 0.0, 3, -1])
    same(execute("min.NaN.f32", "f32", operands), [NAN, NAN, 1, NAN, -0.0, -0.0, -INF, -1])
    same(execute("max.NaN.f32", "f32", operands), [NAN, NAN, 2, NAN, 0.0, 0.0, 3, -1])


def test_comparisons_with_nan() -> None:
    a = np.array([1, 1, 2, NAN, 1, NAN, 0.0], np.float32)
    b = np.array([1, 2, 1, 1, NAN, NAN, -0.0], np.float32)
    unordered = np.isnan(a) | np.isnan(b)
    plain = {
        "eq": a == b,
        "ne": (a < b) | (a > b),
        "lt": a < b,
        "le": a <= b,
        "gt": a > b,
        "ge": a >= b,
    }
    operands = [("f32", a), ("f32", b)]
    for name, expected in plain.items():
        same(execute(f"setp.{name}.f32", "pred", operands), expected)
        same(execute(f"setp.{name}u.f32", "pred", operands), expected | unordered)
        same(execute(f"set.{name}.u32.f32", "u32", operands), np.where(expected, 2**32 - 1, 0))
        same(execute(f"set.{name}.f32.f32", "f32", operands), expected)
    same(execute("setp.num.f32", "pred", operands), ~unordered)
    same(execute("setp.nan.f32", "pred", operands), unordered)
    q = np.array([1, 0, 1, 0, 1, 0, 1])
    for combine, function in {
        "and": np.logical_and,
        "or": np.logical_or,
        "xor": np.logical_xor,
    }.items():
        got = execute(f"setp.lt.{combine}.f32", "pred", [*operands, ("pred", q)])
        same(got, function(a < b, q))


def test_integer_comparisons_know_the_sign() -> None:
    a, b, _ = pairs("s32")
    x, y = a.view(np.uint32), b.view(np.uint32)
    same(execute("setp.lt.s32", "pred", [("s32", a), ("s32", b)]), a < b)
    same(execute("setp.lt.u32", "pred", [("u32", x), ("u32", y)]), x < y)
    same(execute("setp.hs.u32", "pred", [("u32", x), ("u32", y)]), x >= y)


def test_selections_and_tests() -> None:
    a, b, c = draw(32)
    p = np.arange(32) % 3
    same(execute("selp.f32", "f32", [("f32", a), ("f32", b), ("pred", p)]), np.where(p, a, b))
    same(
        execute("slct.f32.f32", "f32", [("f32", a), ("f32", b), ("f32", c)]), np.where(c >= 0, a, b)
    )
    values = np.array([0, TINY, 1, INF, NAN], np.float32)
    for name, expected in {
        "finite": [1, 1, 1, 0, 0],
        "infinite": [0, 0, 0, 1, 0],
        "number": [1, 1, 1, 1, 0],
        "notanumber": [0, 0, 0, 0, 1],
        "normal": [0, 0, 1, 0, 0],
        "subnormal": [0, 1, 0, 0, 0],
    }.items():
        same(execute(f"testp.{name}.f32", "pred", [("f32", values)]), expected)


# ---- conversions ---------------------------------------------------------------------------------


def test_floats_to_integers_clamp() -> None:
    a = np.array([0.5, 1.5, -0.5, -2.5, 2.9, -2.9, 3e9, -3e9, 1e20, -1e20, NAN, INF], np.float32)
    operand = [("f32", a)]
    same(
        execute("cvt.rzi.s32.f32", "s32", operand),
        [0, 1, 0, -2, 2, -2, 2**31 - 1, -(2**31), 2**31 - 1, -(2**31), 0, 2**31 - 1],
    )
    same(
        execute("cvt.rni.u32.f32", "u32", operand),
        [0, 2, 0, 0, 3, 0, 3000000000, 0, 2**32 - 1, 0, 0, 2**32 - 1],
    )
    same(execute("cvt.rmi.s32.f32", "s32", operand)[:6], [0, 1, -1, -3, 2, -3])
    same(execute("cvt.rpi.s32.f32", "s32", operand)[:6], [1, 2, 0, -2, 3, -2])
    same(
        execute("cvt.rzi.s64.f32", "s64", operand)[6:10],
        [3000000000, -3000000000, 2**63 - 1, -(2**63)],
    )
    assert execute("cvt.rzi.u64.f32", "u64", operand).tolist()[6:10] == [
        3000000000,
        0,
        2**64 - 1,
        0,
    ]
    same(execute("cvt.rmi.f32.f32", "f32", operand), np.floor(a))
    same(execute("cvt.rni.f32.f32", "f32", operand), np.rint(a))


def test_integers_to_integers() -> None:
    a = np.array([-1, 127, 128, -129, 300, -(2**31), 2**31 - 1], np.int32)
    same(execute("cvt.s64.s32", "s64", [("s32", a)]), a)
    same(execute("cvt.u64.u32", "u64", [("u32", a.view(np.uint32))]), a.view(np.uint32))
    same(execute("cvt.s32.s8", "s32", [("s32", a)]), a.astype(np.int8))
    same(execute("cvt.u32.u16", "u32", [("u32", a.view(np.uint32))]), a.view(np.uint32) & 0xFFFF)
    same(execute("cvt.sat.s16.s32", "s16", [("s32", a)]), np.clip(a, -(2**15), 2**15 - 1))
    same(execute("cvt.sat.u32.s32", "u32", [("s32", a)]), np.maximum(a, 0))


def test_integers_to_floats_are_rounded_once() -> None:
    # 2^53 - 1 doubled and more: rounding to float64 first would make these ties.
    values = [
        2**24 + 1,
        2**24 + 3,
        (2**24 + 1 << 32) + 1,
        (2**24 + 1 << 32) - 1,
        2**63 - 1,
        2**62 + 1,
    ]
    a = np.array(values, np.int64)
    for sign in (1, -1):
        same(
            execute("cvt.rn.f32.s64", "f32", [("s64", sign * a)]),
            [rounded(Fraction(sign * v), "rn") for v in values],
        )
        same(
            execute("cvt.rz.f32.s64", "f32", [("s64", sign * a)]),
            [rounded(Fraction(sign * v), "rz") for v in values],
        )
    same(execute("cvt.rn.f64.s64", "f64", [("s64", a)]), [float(v) for v in values])
    same(
        execute("cvt.rn.f16.s32", "f16", [("s32", np.array([2049, 2051, 70000]))]),
        [2048, 2052, INF],
    )


def nearest_half(value: float) -> float:
    return float(np.float64(value).astype(np.float16))


def test_halves() -> None:
    a, b, c = draw()
    h, g, f = (v.astype(np.float16) for v in (a, b, c))
    same(execute("cvt.rn.f16.f32", "f16", [("f32", a)]), a.astype(np.float16))
    same(execute("cvt.f32.f16", "f32", [("f16", h)]), h.astype(np.float32))
    truncated = execute(
        "cvt.rz.f16.f32", "f16", [("f32", np.array([1.9999, -1.9999, 1e6], np.float32))]
    )
    same(truncated, [1.999, -1.999, np.finfo(np.float16).max])
    ok = np.isfinite(h) & np.isfinite(g) & np.isfinite(f)
    h, g, f = h[ok], g[ok], f[ok]
    exact = [Fraction(float(x)) * Fraction(float(y)) for x, y in zip(h, g, strict=True)]
    same(
        execute("mul.f16", "f16", [("f16", h), ("f16", g)]), [nearest_half(float(e)) for e in exact]
    )
    sums = [e + Fraction(float(z)) for e, z in zip(exact, f, strict=True)]
    same(
        execute("fma.rn.f16", "f16", [("f16", h), ("f16", g), ("f16", f)]),
        [nearest_half(float(e)) for e in sums],
    )
    low, high = np.float32([1.0, 70000, NAN]), np.float32([2.0, -70000, 3.0])
    got = execute("cvt.rn.f16x2.f32", "b32", [("f32", high), ("f32", low)]).view(np.float16)
    same(got.reshape(-1, 2), np.float16([[1, 2], [INF, -INF], [NAN, 3]]))
    got = execute("cvt.rn.satfinite.f16x2.f32", "b32", [("f32", high), ("f32", low)])
    same(got.view(np.float16).reshape(-1, 2), [[1, 2], [65504, -65504], [NAN, 3]])
    x = np.float16([[1, 2], [3, 4], [5, 6]])
    packed = np.ascontiguousarray(x).view(np.uint32)[:, 0]
    got = execute("add.f16x2", "b32", [("b32", packed), ("b32", packed)]).view(np.float16)
    same(got.reshape(-1, 2), 2 * x)
    got = execute("neg.f16x2", "b32", [("b32", packed)]).view(np.float16)
    same(got.reshape(-1, 2), -x)


def bf16(value: float) -> int:
    """The bits of the nearest bf16, by search."""
    if math.isnan(value):
        return 0x7FFF
    down = int(np.float32(value).view(np.uint32)) >> 16
    candidates = [down - 1, down, down + 1]
    wide = [float(np.uint32(c << 16).view(np.float32)) for c in candidates]
    distance = [abs(Fraction(w) - Fraction(value)) for w in wide]
    best = [c for c, d in zip(candidates, distance, strict=True) if d == min(distance)]
    return next((c for c in best if c % 2 == 0), best[0])


def test_bf16() -> None:
    a, b, c = draw(96)
    a[:2] = [1 + 2**-8, 1 + 3 * 2**-8]  # ties, to even
    bits = execute("cvt.rn.bf16.f32", "b16", [("f32", a)])
    same(bits, [bf16(float(v)) for v in a])
    assert execute("cvt.rn.bf16.f32", "b16", [("f32", np.float32([NAN]))])[0] == 0x7FFF
    wide = (bits.astype(np.uint32) << 16).view(np.float32)
    same(execute("cvt.f32.bf16", "f32", [("b16", bits)]), wide)
    got = execute("cvt.rn.bf16x2.f32", "b32", [("f32", b), ("f32", a)])
    same(got, [bf16(float(y)) << 16 | bf16(float(x)) for x, y in zip(a, b, strict=True)])
    others = [execute("cvt.rn.bf16.f32", "b16", [("f32", v)]) for v in (b, c)]
    values = [[float(np.uint32(int(v) << 16).view(np.float32)) for v in u] for u in (bits, *others)]
    got = execute("fma.rn.bf16", "b16", [("b16", bits), ("b16", others[0]), ("b16", others[1])])
    same(got, [bf16(x * y + z) for x, y, z in zip(*values, strict=True)])
    got = execute("cvt.rna.tf32.f32", "b32", [("f32", np.float32([1 + 2**-11, 1 + 2**-12, INF]))])
    same(got.view(np.float32), [1 + 2**-10, 1, INF])


def test_doubles_to_singles() -> None:
    a = np.array([1 + 2**-24, 1 + 2**-24 + 2**-50, 1e300, -1 / 3, 1e-310])
    for direction in ("rn", "rz", "rm", "rp"):
        got = execute(f"cvt.{direction}.f32.f64", "f32", [("f64", a)])
        same(got[[0, 1, 3]], [rounded(Fraction(a[i]), direction) for i in (0, 1, 3)])
    same(execute("cvt.f64.f32", "f64", [("f32", a.astype(np.float32))]), a.astype(np.float32))
