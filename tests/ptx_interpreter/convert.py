# SPDX-License-Identifier: Apache-2.0
"""cvt: between integers, floats, and the 16-bit floats."""

from collections.abc import Callable

import numpy as np

from .binder import (
    Modifiers,
    Step,
    assign,
    opcode,
    source,
    target,
    wide_source,
    wide_target,
)
from .dtypes import DTYPES, SIZES, Array
from .machine import Machine
from .rounding import flush, from_bf16, odd_f32, to_bf16, to_f16, to_f32
from .syntax import Instruction

INTEGERS = ("u8", "s8", "u16", "s16", "u32", "s32", "u64", "s64")
FLOATS = ("f16", "bf16", "f32", "f64")
TO_INTEGER: dict[str, Callable[[Array], Array]] = {
    "rni": np.rint,
    "rzi": np.trunc,
    "rmi": np.floor,
    "rpi": np.ceil,
}


@opcode("cvt")
def _convert(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    last = mods.type(*INTEGERS, *FLOATS)
    result_type = mods.type(*INTEGERS, *FLOATS, "f16x2", "bf16x2", "tf32")
    if result_type in ("f16x2", "bf16x2"):
        return _pack_halves(m, ins, mods, result_type, last)
    if result_type == "tf32":
        return _to_tf32(m, ins, mods, last)
    ins.expect(2)
    if result_type in INTEGERS and last in INTEGERS:
        return _integers(m, ins, mods, result_type, last)
    if result_type in INTEGERS:
        return _to_integer(m, ins, mods, result_type, last)
    if last in INTEGERS:
        return _from_integer(m, ins, mods, result_type, last)
    return _floats(m, ins, mods, result_type, last)


def _integers(m: Machine, ins: Instruction, mods: Modifiers, to: str, of: str) -> Step:
    saturate = mods.flag("sat")
    mods.done()
    result = wide_target(m, ins, ins.operands[0], to)
    value = wide_source(m, ins, ins.operands[1], of)
    dtype = np.dtype(DTYPES[to])
    if not saturate:
        return assign(m, result, lambda a: a.astype(dtype).astype(result.dtype), value)
    info = np.iinfo(dtype)
    # The limits as far as the operand's type has them.
    low = max(int(info.min), int(np.iinfo(value.dtype).min))
    high = min(int(info.max), int(np.iinfo(value.dtype).max))
    return assign(
        m, result, lambda a: np.clip(a, low, high).astype(dtype).astype(result.dtype), value
    )


def _to_integer(m: Machine, ins: Instruction, mods: Modifiers, to: str, of: str) -> Step:
    round_to = TO_INTEGER[mods.one(TO_INTEGER)]
    ftz = of == "f32" and mods.flag("ftz")
    mods.flag("sat")  # conversions to integers always clamp
    mods.done()
    result = wide_target(m, ins, ins.operands[0], to)
    widen = _widen(of)
    dtype = DTYPES[to]
    info = np.iinfo(dtype)

    def convert(a: Array) -> Array:
        wide = widen(flush(a) if ftz else a).astype(np.float64)
        whole = round_to(wide)
        # Clamped by hand: 2^63 and 2^64 are floats, the largest integers are not.
        inside = (whole >= float(info.min)) & (
            whole < float(2.0 ** (8 * SIZES[to]) if info.min == 0 else -float(info.min))
        )
        value = np.where(inside, whole, 0).astype(dtype)
        value = np.where(whole >= float(info.max), dtype(info.max), value)
        value = np.where(whole < float(info.min), dtype(info.min), value)
        # What a NaN becomes is 0 for 32 bits, and the lowest bit pattern with a sign for 64.
        nan = dtype(0) if SIZES[to] < 8 else np.uint64(1 << 63).astype(dtype)
        return np.where(np.isnan(wide), nan, value).astype(result.dtype)

    return assign(m, result, convert, source(m, ins, ins.operands[1], of))


def _from_integer(m: Machine, ins: Instruction, mods: Modifiers, to: str, of: str) -> Step:
    mode = mods.one(("rn", "rz", "rm", "rp") if to == "f32" else ("rn",))
    mods.done()
    result = target(m, ins, ins.operands[0], to)
    value = wide_source(m, ins, ins.operands[1], of)
    dtype = DTYPES[to]

    def convert(a: Array) -> Array:
        if to == "bf16":
            return to_bf16(odd_f32(_odd_f64(a)))
        if to == "f64" or to == "f32" and mode == "rn":
            # numpy rounds integers to floats once.
            return a.astype(dtype)
        if to == "f16":
            return to_f16(_odd_f64(a))
        return to_f32(_odd_f64(a), mode)

    return assign(m, result, convert, value)


def _odd_f64(a: Array) -> Array:
    """Integers as float64 rounded to odd: exact up to 53 bits, a sticky bit beyond."""
    if a.itemsize < 8:
        return a.astype(np.float64)
    if a.dtype == np.int64:
        size = np.where(a < 0, np.negative(a), a).view(np.uint64)
        return np.where(a < 0, -1.0, 1.0) * _odd_f64(size)
    low = a & np.uint64(0xFFF)
    big = a >= np.uint64(1 << 53)
    kept = np.where(low != 0, (a - low) | np.uint64(0x800), a)
    return np.where(big, kept, a).astype(np.float64)


def _widen(of: str) -> Callable[[Array], Array]:
    """To float32, or float64 if it is that."""
    if of == "bf16":
        return from_bf16
    if of == "f16":
        return lambda a: a.astype(np.float32)
    return lambda a: a


def _floats(m: Machine, ins: Instruction, mods: Modifiers, to: str, of: str) -> Step:
    narrowing = SIZES[to] < SIZES[of] or {to, of} == {"f16", "bf16"}
    integral = mods.maybe(TO_INTEGER) if to == of and to in ("f32", "f64") else None
    directions = ("rn", "rz", "rm", "rp") if to == "f32" else ("rn", "rz")
    mode = mods.one(directions) if narrowing else mods.maybe(("rn",)) or "rn"
    ftz = "f32" in (to, of) and mods.flag("ftz")
    relu = narrowing and to in ("f16", "bf16") and mods.flag("relu")
    saturate = mods.flag("sat")
    finite = narrowing and to in ("f16", "bf16") and mods.flag("satfinite")
    mods.done()
    result = target(m, ins, ins.operands[0], to)
    value = source(m, ins, ins.operands[1], of)
    widen = _widen(of)

    def convert(a: Array) -> Array:
        wide = widen(a)
        if integral:
            wide = TO_INTEGER[integral](wide)
        if ftz and wide.dtype == np.float32:
            wide = flush(wide)
        if saturate:
            wide = np.where(np.isnan(wide), 0, np.clip(wide, 0, 1)).astype(wide.dtype)
        if to in ("f16", "bf16"):
            return narrow(wide, to, mode, relu, finite)
        if to == "f32" and wide.dtype == np.float64:
            single = to_f32(wide, mode)
            return flush(single) if ftz else single
        return wide.astype(result.dtype)

    return assign(m, result, convert, value)


def narrow(wide: Array, to: str, mode: str, relu: bool, finite: bool) -> Array:
    """float32 or float64 to half or bf16 (as its bits)."""
    if relu:
        wide = np.where(wide < 0, 0, wide).astype(wide.dtype)
        wide = np.where(wide == 0, np.absolute(wide), wide)
    if to == "f16":
        half = to_f16(wide, mode)
        half = np.where(np.isnan(half), np.uint16(0x7FFF).view(np.float16), half)
        if finite:
            half = np.where(np.isinf(half), np.copysign(np.finfo(np.float16).max, half), half)
        return half
    brief = to_bf16(odd_f32(wide) if wide.dtype == np.float64 else wide, mode)
    if finite:
        infinite = brief & np.uint16(0x7FFF) == np.uint16(0x7F80)
        brief = np.where(infinite, brief - np.uint16(1), brief)
    return brief


def _pack_halves(m: Machine, ins: Instruction, mods: Modifiers, to: str, of: str) -> Step:
    mode = mods.one(("rn", "rz"))
    relu = mods.flag("relu")
    finite = mods.flag("satfinite")
    mods.done()
    ins.expect(3)
    if of != "f32":
        raise ins.unknown()
    high, low = (source(m, ins, operand, "f32") for operand in ins.operands[1:])
    kind = to[:-2]

    def convert(high: Array, low: Array) -> Array:
        halves = [narrow(value, kind, mode, relu, finite) for value in (low, high)]
        return np.stack(halves, axis=1).view(np.uint32)[:, 0]

    return assign(m, target(m, ins, ins.operands[0], to), convert, high, low)


def _to_tf32(m: Machine, ins: Instruction, mods: Modifiers, of: str) -> Step:
    mode = mods.one(("rna",))
    mods.done()
    ins.expect(2)
    if of != "f32" or mode != "rna":
        raise ins.unknown()
    half, keep = np.uint32(0x1000), np.uint32(0xFFFFE000)
    special = np.uint32(0x7F800000)

    def convert(a: Array) -> Array:
        result: Array = a + half
        not_finite = a & special == special
        if np.count_nonzero(not_finite):
            result[not_finite] = a[not_finite]
        result &= keep
        return result

    value = source(m, ins, ins.operands[1], of).view(np.uint32)
    return assign(m, target(m, ins, ins.operands[0], "tf32"), convert, value)
