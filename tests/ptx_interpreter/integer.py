# SPDX-License-Identifier: Apache-2.0
"""Integer arithmetic, bit fields and bitwise logic."""

from typing import Any

import numpy as np

from .binder import Modifiers, Step, assign, elementwise, opcode, predicate, source, target
from .dtypes import DTYPES, INTEGERS, SIZES, Array, is_signed
from .machine import Machine
from .syntax import Constant, Instruction

WIDER = {"u16": "u32", "s16": "s32", "u32": "u64", "s32": "s64"}
BITS = ("b16", "b32", "b64")


def sources(m: Machine, ins: Instruction, *type_names: str) -> list[Array]:
    """The operands after the first, of the given types."""
    ins.expect(1 + len(type_names))
    return [source(m, ins, o, t) for o, t in zip(ins.operands[1:], type_names, strict=True)]


def integer_add_sub(m: Machine, ins: Instruction) -> Step:
    """Addition and subtraction of integers."""
    mods = Modifiers(ins)
    type_name = mods.type(*INTEGERS)
    mods.done()
    function = np.add if ins.head == "add" else np.subtract
    values = sources(m, ins, type_name, type_name)
    return elementwise(m, function, target(m, ins, ins.operands[0], type_name), *values)


def integer_min_max(m: Machine, ins: Instruction) -> Step:
    """Minimum and maximum of integers."""
    mods = Modifiers(ins)
    type_name = mods.type(*INTEGERS)
    mods.done()
    function = np.minimum if ins.head == "min" else np.maximum
    values = sources(m, ins, type_name, type_name)
    return elementwise(m, function, target(m, ins, ins.operands[0], type_name), *values)


def integer_mul_mad(m: Machine, ins: Instruction) -> Step:
    """Products (mul, mad) of integers: the low half, the high half or all of the product."""
    mods = Modifiers(ins)
    part = mods.one(("lo", "hi", "wide"))
    type_name = mods.type(*(WIDER if part == "wide" else INTEGERS))
    mods.done()
    wide = DTYPES[WIDER[type_name]] if type_name in WIDER else None
    result_type = WIDER[type_name] if part == "wide" else type_name

    def product(a: Array, b: Array) -> Array:
        if part == "lo":
            return a * b
        if wide is None:
            return high_product(a, b)
        full: Array = np.multiply(a, b, dtype=wide)
        return full if part == "wide" else (full >> 8 * SIZES[type_name]).astype(a.dtype)

    result = target(m, ins, ins.operands[0], result_type)
    if ins.head == "mul":
        a, b = sources(m, ins, type_name, type_name)
        return (
            elementwise(m, np.multiply, result, a, b)
            if part == "lo"
            else assign(m, result, product, a, b)
        )
    values = sources(m, ins, type_name, type_name, result_type)
    return assign(m, result, lambda a, b, c: product(a, b) + c, *values)


def high_product(a: Array, b: Array) -> Array:
    """The upper 64 bits of the product of 64-bit integers."""
    half, low = np.uint64(32), np.uint64(0xFFFFFFFF)
    x, y = a.view(np.uint64), b.view(np.uint64)
    x1, x0, y1, y0 = x >> half, x & low, y >> half, y & low
    middle = x1 * y0 + (x0 * y0 >> half)
    high = x1 * y1 + (middle >> half) + ((middle & low) + x0 * y1 >> half)
    if a.dtype == np.int64:
        high = high - np.where(a < 0, y, np.uint64(0)) - np.where(b < 0, x, np.uint64(0))
    signed: Array = high.view(a.dtype)
    return signed


def integer_div(m: Machine, ins: Instruction) -> Step:
    """Quotients and remainders of integers, which round toward zero."""
    mods = Modifiers(ins)
    type_name = mods.type(*INTEGERS)
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    a, b = sources(m, ins, type_name, type_name)

    def divide(a: Array, b: Array) -> Array:
        if ((b == 0) & m.mask).any():
            m.at = ins
            raise m.failure("division by zero", m.who[(b == 0) & m.mask])
        b = np.where(b == 0, 1, b).astype(a.dtype)
        remainder = np.fmod(a, b)
        return remainder if ins.head == "rem" else (a - remainder) // b

    return assign(m, result, divide, a, b)


opcode("rem")(integer_div)


@opcode("and", "or", "xor")
def _logic(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, "pred")
    mods.done()
    function = {"and": np.bitwise_and, "or": np.bitwise_or, "xor": np.bitwise_xor}[ins.head]
    result = target(m, ins, ins.operands[0], type_name)
    if type_name == "pred":
        ins.expect(3)
        a, b = (predicate(m, ins, operand) for operand in ins.operands[1:])
        return assign(m, result, lambda: function(a(), b()))
    return elementwise(m, function, result, *sources(m, ins, type_name, type_name))


@opcode("not", "cnot")
def _not(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, "pred")
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    (a,) = sources(m, ins, type_name)
    if ins.head == "cnot":
        if type_name == "pred":
            raise ins.unknown()
        return assign(m, result, lambda a: (a == 0).astype(a.dtype), a)
    return elementwise(m, np.invert, result, a)


@opcode("shl", "shr")
def _shift(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*(BITS if ins.head == "shl" else (*BITS, *INTEGERS)))
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    value, _ = sources(m, ins, type_name, "u32")
    # numpy gives what PTX wants for amounts beyond the width, if both have one type.
    function = np.left_shift if ins.head == "shl" else np.right_shift
    amount = source(m, ins, ins.operands[2], "u32")
    dtype = result.dtype
    if isinstance(ins.operands[2], Constant):
        amount = m.constant(np.minimum(amount[0], 255).astype(dtype))
        return elementwise(m, function, result, value, amount)
    most = np.uint32(255)
    return assign(
        m, result, lambda v, n: function(v, np.minimum(n, most).astype(dtype)), value, amount
    )


@opcode("shf")
def _funnel_shift(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    left = mods.one(("l", "r")) == "l"
    wrap = mods.one(("wrap", "clamp")) == "wrap"
    mods.exactly("b32")
    result = target(m, ins, ins.operands[0], "b32")

    def shift(low: Array, high: Array, amount: Array) -> Array:
        n = (amount & np.uint32(31) if wrap else np.minimum(amount, np.uint32(32))).astype(
            np.uint64
        )
        both = high.astype(np.uint64) << np.uint64(32) | low
        shifted = both << n >> np.uint64(32) if left else both >> n
        return shifted.astype(np.uint32)

    return assign(m, result, shift, *sources(m, ins, "b32", "b32", "u32"))


@opcode("lop3")
def _lop3(m: Machine, ins: Instruction) -> Step:
    Modifiers(ins).exactly("b32")
    ins.expect(5)
    table = ins.operands[4]
    if not isinstance(table, Constant):
        raise ins.unknown()
    wanted = int(table.text, 0)

    def compute(a: Array, b: Array, c: Array) -> Array:
        total = np.zeros_like(a)
        for row in range(8):
            if wanted >> row & 1:
                x = a if row & 4 else ~a
                y = b if row & 2 else ~b
                total |= x & y & (c if row & 1 else ~c)
        return total

    values = [source(m, ins, operand, "b32") for operand in ins.operands[1:4]]
    return assign(m, target(m, ins, ins.operands[0], "b32"), compute, *values)


@opcode("popc", "clz", "bfind", "brev")
def _bit_counts(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    find = ins.head == "bfind"
    shift_amount = find and mods.flag("shiftamt")
    type_name = mods.type(*(("u32", "s32", "u64", "s64") if find else ("b32", "b64")))
    mods.done()
    width = 8 * SIZES[type_name]
    unsigned = DTYPES[f"u{width}"]

    def count(a: Array) -> Array:
        if ins.head == "popc":
            return np.bitwise_count(a).astype(np.uint32)
        if ins.head == "brev":
            octets = np.ascontiguousarray(a).view(np.uint8).reshape(-1, width // 8)[:, ::-1]
            bits = np.packbits(np.unpackbits(octets, axis=1, bitorder="little"), axis=1)
            turned: Array = np.ascontiguousarray(bits).view(unsigned)[:, 0]
            return turned
        if is_signed(type_name):
            a = np.where(a < 0, ~a, a)
        length = bit_length(a.view(unsigned), width)
        if ins.head == "clz":
            zeros: Array = (width - length).astype(np.uint32)
            return zeros
        place = (width - length) if shift_amount else (length - 1)
        return np.where(length == 0, -1, place).astype(np.int32).view(np.uint32)

    result = target(m, ins, ins.operands[0], type_name if ins.head == "brev" else "u32")
    return assign(m, result, count, *sources(m, ins, type_name))


def bit_length(a: Array, width: int) -> Array:
    """The number of bits up to the highest that is set."""
    smeared = a.copy()
    shift = 1
    while shift < width:
        smeared |= smeared >> a.dtype.type(shift)
        shift *= 2
    return np.bitwise_count(smeared).astype(np.int64)


@opcode("bfe")
def _extract(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type("u32", "s32", "u64", "s64")
    mods.done()
    width = 8 * SIZES[type_name]
    result = target(m, ins, ins.operands[0], type_name)

    def extract(a: Array, at: Array, count: Array) -> Array:
        at = (at & np.uint32(255)).astype(np.int64)
        count = (count & np.uint32(255)).astype(np.int64)
        dtype = a.dtype
        shifted = np.right_shift(a, at.astype(dtype))
        keep = np.minimum(count, width)
        if not is_signed(type_name):
            field: Array = shifted & mask_of(keep, dtype)
            return field
        # The sign is the field's last bit, or the value's where the field reaches beyond it.
        last = np.minimum(at + keep - 1, width - 1)
        sign = np.where(keep > 0, np.right_shift(a, np.maximum(last, 0).astype(dtype)) & 1, 0)
        field = shifted & mask_of(keep, dtype)
        beyond = ~mask_of(np.minimum(keep, np.maximum(width - at, 0)), dtype)
        return np.where(sign == 1, field | beyond, np.where(keep > 0, field, 0)).astype(dtype)

    return assign(m, result, extract, *sources(m, ins, type_name, "u32", "u32"))


@opcode("bfi")
def _insert(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type("b32", "b64")
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)

    def insert(field: Array, into: Array, at: Array, count: Array) -> Array:
        dtype = into.dtype
        at = (at & np.uint32(255)).astype(dtype)
        mask = np.left_shift(mask_of((count & np.uint32(255)).astype(np.int64), dtype), at)
        return into & ~mask | np.left_shift(field, at) & mask

    return assign(m, result, insert, *sources(m, ins, type_name, type_name, "u32", "u32"))


def mask_of(count: Array, dtype: Any) -> Array:
    """``count`` bits from the lowest up, all of them if there are not so many."""
    width = 8 * np.dtype(dtype).itemsize
    unsigned = DTYPES[f"u{width}"]
    some = np.left_shift(unsigned(1), np.minimum(count, width - 1).astype(unsigned)) - unsigned(1)
    mask: Array = np.where(count >= width, ~unsigned(0), some).astype(unsigned).view(dtype)
    return mask


@opcode("prmt")
def _permute(m: Machine, ins: Instruction) -> Step:
    Modifiers(ins).exactly("b32")
    result = target(m, ins, ins.operands[0], "b32")

    def permute(a: Array, b: Array, selector: Array) -> Array:
        octets = np.stack([a, b], axis=1).view(np.uint8)  # [T, 8]
        choice = selector[:, None] >> np.arange(0, 16, 4, dtype=np.uint32) & np.uint32(15)
        chosen = np.take_along_axis(octets, (choice & np.uint32(7)).astype(np.int64), axis=1)
        sign = np.where(chosen & np.uint8(128), np.uint8(255), np.uint8(0))
        chosen = np.where(choice & np.uint32(8), sign, chosen)
        return np.ascontiguousarray(chosen).view(np.uint32)[:, 0]

    return assign(m, result, permute, *sources(m, ins, "b32", "b32", "b32"))
