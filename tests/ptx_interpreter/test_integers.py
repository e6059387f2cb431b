# SPDX-License-Identifier: Apache-2.0
"""What single integer instructions compute, against Python's integers."""

from typing import Any

import numpy as np
import pytest

from ptx_interpreter.single import execute, same

EDGES = [0, 1, 2, 7, 31, 32, 33, 2**15, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1]
EDGES_64 = [*EDGES, 2**32, 2**62, 2**63 - 1, 2**63, 2**64 - 1]


def pairs(type_name: str) -> tuple[Any, Any, int]:
    bits = int(type_name[1:])
    values = [v for v in (EDGES_64 if bits == 64 else EDGES) if v < 2**bits]
    raw = np.array([(a, b) for a in values for b in values], f"u{bits // 8}").T
    kind = "i" if type_name[0] == "s" else "u"
    return raw[0].view(f"{kind}{bits // 8}"), raw[1].view(f"{kind}{bits // 8}"), bits


def wrapped(values: list[int], like: Any) -> Any:
    bits = 8 * like.itemsize
    return np.array([v % 2**bits for v in values], f"u{like.itemsize}").view(like.dtype)


@pytest.mark.parametrize("t", ["u16", "s16", "u32", "s32", "u64", "s64"])
def test_integer_arithmetic(t: str) -> None:
    a, b, bits = pairs(t)
    exact = [(int(x), int(y)) for x, y in zip(a, b, strict=True)]
    for opcode, function in {
        f"add.{t}": lambda x, y: x + y,
        f"sub.{t}": lambda x, y: x - y,
        f"mul.lo.{t}": lambda x, y: x * y,
        f"mul.hi.{t}": lambda x, y: (x * y) >> bits,
        f"min.{t}": min,
        f"max.{t}": max,
        f"and.b{bits}": lambda x, y: x & y,
        f"or.b{bits}": lambda x, y: x | y,
        f"xor.b{bits}": lambda x, y: x ^ y,
    }.items():
        got = execute(opcode, t, [(t, a), (t, b)])
        same(got, wrapped([function(x, y) for x, y in exact], a))
    got = execute(f"mad.lo.{t}", t, [(t, a), (t, b), (t, a)])
    same(got, wrapped([x * y + x for x, y in exact], a))
    if bits < 64:
        wide = t[0] + str(2 * bits)
        got = execute(f"mul.wide.{t}", wide, [(t, a), (t, b)])
        assert got.tolist() == [x * y for x, y in exact]
    divisors = np.where(b == 0, 3, b).astype(b.dtype)
    got = execute(f"div.{t}", t, [(t, a), (t, divisors)])
    rest = execute(f"rem.{t}", t, [(t, a), (t, divisors)])
    for x, y, quotient, remainder in zip(a, divisors, got, rest, strict=True):
        x, y = int(x), int(y)
        toward_zero = abs(x) // abs(y) * (1 if (x < 0) == (y < 0) else -1)
        if -(2 ** (bits - 1)) <= toward_zero < 2**bits and (
            t[0] == "u" or toward_zero < 2 ** (bits - 1)
        ):
            assert (int(quotient), int(remainder)) == (toward_zero, x - toward_zero * y)


@pytest.mark.parametrize("t", ["b16", "u16", "s16", "b32", "u32", "s32", "b64", "u64", "s64"])
def test_shifts_beyond_the_width(t: str) -> None:
    a, _, bits = pairs("s" + t[1:] if t[0] == "s" else "u" + t[1:])
    for amount in (0, 1, bits - 1, bits, bits + 1, 255, 256, 2**31, 2**32 - 1):
        n = np.full(a.size, amount, np.uint32)
        expected = [int(x) >> min(amount, bits) for x in a]
        same(execute(f"shr.{t}", t, [(t, a), ("u32", n)]), wrapped(expected, a))
        same(execute(f"shr.{t}", t, [(t, a)], [str(amount)]), wrapped(expected, a))
        if t[0] == "b":
            expected = [int(x) << min(amount, bits) for x in a]
            same(execute(f"shl.{t}", t, [(t, a), ("u32", n)]), wrapped(expected, a))
            same(execute(f"shl.{t}", t, [(t, a)], [str(amount)]), wrapped(expected, a))


@pytest.mark.parametrize("bits", [32, 64])
def test_bit_counts(bits: int) -> None:
    a, _, _ = pairs(f"u{bits}")
    t, u, s = f"b{bits}", f"u{bits}", f"s{bits}"
    same(execute(f"popc.{t}", "u32", [(t, a)]), [int(x).bit_count() for x in a])
    same(execute(f"clz.{t}", "u32", [(t, a)]), [bits - int(x).bit_length() for x in a])
    reversed_bits = [int(f"{int(x):0{bits}b}"[::-1], 2) for x in a]
    same(execute(f"brev.{t}", t, [(t, a)]), np.array(reversed_bits, a.dtype))
    highest = [int(x).bit_length() - 1 for x in a]
    same(execute(f"bfind.{u}", "u32", [(u, a)]), wrapped(highest, np.zeros(1, np.uint32)))
    shifts = [bits - 1 - h if h >= 0 else -1 for h in highest]
    same(execute(f"bfind.shiftamt.{u}", "u32", [(u, a)]), wrapped(shifts, np.zeros(1, np.uint32)))
    signed = a.view(f"i{bits // 8}")
    highest = [(int(x) if x >= 0 else ~int(x)).bit_length() - 1 for x in signed]
    same(execute(f"bfind.{s}", "u32", [(s, signed)]), wrapped(highest, np.zeros(1, np.uint32)))


def bfe(a: int, position: int, length: int, bits: int, signed: bool) -> int:
    """The loop of the PTX manual."""
    msb = bits - 1
    if signed and length:
        sign = a >> min(position + length - 1, msb) & 1
    else:
        sign = 0
    result = 0
    for i in range(msb + 1):
        bit = a >> (position + i) & 1 if i < length and position + i <= msb else sign
        result |= bit << i
    return result


@pytest.mark.parametrize("t", ["u32", "s32", "u64", "s64"])
def test_bit_fields(t: str) -> None:
    a, b, bits = pairs(t)
    unsigned = [int(x) % 2**bits for x in a], [int(x) % 2**bits for x in b]
    for position, length in [
        (0, 0),
        (0, bits),
        (3, 5),
        (30, 10),
        (31, 1),
        (60, 20),
        (200, 3),
        (5, 255),
    ]:
        at, count = (np.full(a.size, v, np.uint32) for v in (position, length))
        expected = [bfe(x, position, length, bits, t[0] == "s") for x in unsigned[0]]
        got = execute(f"bfe.{t}", t, [(t, a), ("u32", at), ("u32", count)])
        same(got, wrapped(expected, a))
        raw = f"b{bits}"
        mask = ((1 << length) - 1) << position
        expected = [y & ~mask | (x << position) & mask for x, y in zip(*unsigned, strict=True)]
        got = execute(f"bfi.{raw}", raw, [(raw, a), (raw, b), ("u32", at), ("u32", count)])
        same(got, wrapped(expected, got))


def test_permutes_and_tables() -> None:
    a, b = np.array([0x83020100], np.uint32), np.array([0x07060504], np.uint32)
    for selector, expected in {
        0x3210: 0x83020100,
        0x7654: 0x07060504,
        0x0123: 0x00010283,
        0xB777: 0xFF070707,
        0x8000: 0x00000000,
    }.items():
        got = execute("prmt.b32", "b32", [("b32", a), ("b32", b)], [hex(selector)])
        assert int(got[0]) == expected
    rng = np.random.default_rng(0)
    x, y, z = rng.integers(0, 2**32, (3, 64), dtype=np.uint32)
    operands = [("b32", x), ("b32", y), ("b32", z)]
    same(execute("lop3.b32", "b32", operands, ["0x96"]), x ^ y ^ z)
    same(execute("lop3.b32", "b32", operands, ["0xE8"]), x & y | x & z | y & z)
    same(execute("lop3.b32", "b32", operands, ["0x2A"]), ~(x & y) & z)
    n = np.arange(64, dtype=np.uint32)
    both = [(int(h) << 32) | int(low) for low, h in zip(x, y, strict=True)]
    operands = [("b32", x), ("b32", y), ("u32", n)]
    for wrap, limit in (("wrap", lambda k: k & 31), ("clamp", lambda k: min(k, 32))):
        right = [v >> limit(k) & 0xFFFFFFFF for v, k in zip(both, range(64), strict=True)]
        left = [v << limit(k) >> 32 & 0xFFFFFFFF for v, k in zip(both, range(64), strict=True)]
        same(execute(f"shf.r.{wrap}.b32", "b32", operands), np.array(right, np.uint32))
        same(execute(f"shf.l.{wrap}.b32", "b32", operands), np.array(left, np.uint32))
