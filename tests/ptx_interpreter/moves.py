# SPDX-License-Identifier: Apache-2.0
"""Moves between registers, comparisons and selections."""

from collections.abc import Callable

import numpy as np

from .binder import Modifiers, Step, assign, elementwise, opcode, predicate, source, target
from .dtypes import DTYPES, INTEGERS, RAW, SIZES, Array
from .machine import Machine
from .memory import SHARED_WINDOW
from .rounding import flush, from_bf16
from .syntax import Constant, Instruction, Negated, Operand, Pair, Sink, Symbol, Vector

INTEGER_TESTS = {
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lo": np.less,
    "ls": np.less_equal,
    "hi": np.greater,
    "hs": np.greater_equal,
}
ORDERED = ("eq", "ne", "lt", "le", "gt", "ge")
BITS = ("b16", "b32", "b64")
# The negation of a comparison that is false for NaN is true for NaN.
UNORDERED = {
    "equ": np.not_equal,
    "neu": np.equal,
    "ltu": np.greater_equal,
    "leu": np.greater,
    "gtu": np.less_equal,
    "geu": np.less,
}


@opcode("mov")
def _move(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, *INTEGERS, "f32", "f64", "pred")
    mods.done()
    ins.expect(2)
    to, value = ins.operands
    if isinstance(value, Vector):
        return _pack(m, ins, type_name, to, value.items)
    if isinstance(to, Vector):
        return _unpack(m, ins, type_name, to.items, value)
    if isinstance(value, Symbol) and any(p.name == value.name for p in m.kernel.parameters):
        parameter = next(p for p in m.kernel.parameters if p.name == value.name)
        if SIZES[type_name] not in (4, 8):
            raise ins.unknown()
        offset = m.constant(RAW[SIZES[type_name]](parameter.offset)).view(DTYPES[type_name])
        return elementwise(m, np.positive, target(m, ins, to, type_name), offset)
    if type_name == "pred":
        moved = source(m, ins, value, "pred")
        return elementwise(m, np.logical_or, target(m, ins, to, "pred"), moved, moved)
    # As bits: a float that is moved keeps its NaN.
    bits = RAW[SIZES[type_name]]
    moved = source(m, ins, value, type_name).view(bits)
    return elementwise(m, np.positive, target(m, ins, to, type_name).view(bits), moved)


def _pack(
    m: Machine, ins: Instruction, type_name: str, to: Operand, items: tuple[Operand, ...]
) -> Step:
    part = _part(ins, type_name, len(items))
    values = [source(m, ins, item, part) for item in items]
    result = target(m, ins, to, type_name).view(DTYPES[part]).reshape(-1, len(items))

    def pack() -> None:
        packed = np.stack(values, axis=1)
        if m.where is None:
            result[...] = packed
        else:
            result[m.lanes] = packed[m.lanes]

    return pack


def _unpack(
    m: Machine, ins: Instruction, type_name: str, items: tuple[Operand, ...], value: Operand
) -> Step:
    part = _part(ins, type_name, len(items))
    parts = source(m, ins, value, type_name).view(DTYPES[part]).reshape(-1, len(items))
    results = [None if isinstance(i, Sink) else target(m, ins, i, part) for i in items]

    def unpack() -> None:
        # A result may be the very register that is taken apart.
        columns = parts.copy()
        for column, result in enumerate(results):
            if result is not None:
                if m.where is None:
                    result[:] = columns[:, column]
                else:
                    np.putmask(result, m.where, columns[:, column])

    return unpack


def _part(ins: Instruction, type_name: str, count: int) -> str:
    size = SIZES[type_name] // count
    if count not in (2, 4) or size < 2 or type_name not in BITS:
        raise ins.unknown()
    return f"b{8 * size}"


@opcode("cvta")
def _convert_address(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type("u64")
    to = mods.flag("to")
    space = mods.one(("global", "shared", "param"))
    mods.done()
    ins.expect(2)
    result = target(m, ins, ins.operands[0], type_name)
    value = source(m, ins, ins.operands[1], type_name)
    if space == "global":
        return elementwise(m, np.positive, result, value)
    if space == "param":
        raise ins.unknown()
    window = m.constant(np.uint64(SHARED_WINDOW))
    return elementwise(m, np.subtract if to else np.add, result, value, window)


@opcode("isspacep")
def _is_space(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    space = mods.one(("global", "shared"))
    mods.done()
    ins.expect(2)
    value = source(m, ins, ins.operands[1], "u64")
    shared = space == "shared"
    window = m.constant(np.uint64(SHARED_WINDOW))
    function = np.greater_equal if shared else np.less
    return elementwise(m, function, target(m, ins, ins.operands[0], "pred"), value, window)


# ---- comparisons ---------------------------------------------------------------------------------


def comparison(
    m: Machine, ins: Instruction, mods: Modifiers, type_name: str
) -> Callable[[Array, Array], Array]:
    """The comparison that the modifiers name, of operands of the type."""
    is_float = type_name in ("f32", "f64", "f16", "bf16")
    ftz = type_name == "f32" and mods.flag("ftz")
    convert: Callable[[Array], Array] | None = flush if ftz else None
    if type_name == "bf16":
        convert = from_bf16
    if is_float:
        name = mods.one((*ORDERED, *UNORDERED, "num", "nan"))
        compare = _float_comparison(name)
    else:
        unsigned = type_name[0] == "u"
        allowed = ("eq", "ne") if type_name[0] == "b" else ORDERED
        name = mods.one((*allowed, "lo", "ls", "hi", "hs") if unsigned else allowed)
        compare = INTEGER_TESTS[name]
    if convert is None:
        return compare
    return lambda a, b: compare(convert(a), convert(b))


def _float_comparison(name: str) -> Callable[[Array, Array], Array]:
    if name == "num":
        return lambda a, b: ~(np.isnan(a) | np.isnan(b))
    if name == "nan":
        return lambda a, b: np.isnan(a) | np.isnan(b)
    if name == "ne":
        return lambda a, b: (a < b) | (a > b)
    if name in UNORDERED:
        opposite = UNORDERED[name]
        if name == "neu":
            return np.not_equal
        if name == "equ":
            return lambda a, b: ~((a < b) | (a > b))
        return lambda a, b: ~opposite(a, b)
    compare: Callable[[Array, Array], Array] = INTEGER_TESTS[name]
    return compare


@opcode("setp")
def _set_predicate(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, *INTEGERS, "f32", "f64", "f16", "bf16")
    compare = comparison(m, ins, mods, type_name)
    combine = mods.maybe(("and", "or", "xor"))
    mods.done()
    ins.expect(4 if combine else 3)
    a, b = (source(m, ins, operand, type_name) for operand in ins.operands[1:3])
    to = ins.operands[0]
    if combine is None and not isinstance(to, Pair):
        result = target(m, ins, to, "pred")
        if isinstance(compare, np.ufunc):
            return elementwise(m, compare, result, a, b)
        return assign(m, result, compare, a, b)
    firsts, seconds = (to.first, to.second) if isinstance(to, Pair) else (to, Sink())
    results = [
        None if isinstance(o, Sink) else target(m, ins, o, "pred") for o in (firsts, seconds)
    ]
    functions = {"and": np.logical_and, "or": np.logical_or, "xor": np.logical_xor}
    other = predicate(m, ins, ins.operands[3]) if combine else None

    def step() -> None:
        holds = compare(a, b)
        values = [holds, ~holds]
        if combine and other is not None:
            # Before the first result is written, which may be the operand.
            values = [functions[combine](value, other()) for value in values]
        for result, value in zip(results, values, strict=True):
            if result is not None:
                np.putmask(result, m.mask, value)

    return step


@opcode("set")
def _set(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, *INTEGERS, "f32", "f64")
    result_type = mods.type("u32", "s32", "f32")
    compare = comparison(m, ins, mods, type_name)
    mods.done()
    ins.expect(3)
    a, b = (source(m, ins, operand, type_name) for operand in ins.operands[1:3])
    dtype = DTYPES[result_type]
    true = dtype(1) if result_type == "f32" else np.array(-1, np.int32).view(dtype)[()]
    result = target(m, ins, ins.operands[0], result_type)
    return assign(m, result, lambda a, b: np.where(compare(a, b), true, dtype(0)), a, b)


@opcode("selp")
def _select(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*BITS, *INTEGERS, "f32", "f64")
    mods.done()
    ins.expect(4)
    bits = RAW[SIZES[type_name]]
    result = target(m, ins, ins.operands[0], type_name).view(bits)
    a, b = (source(m, ins, operand, type_name).view(bits) for operand in ins.operands[1:3])
    if isinstance(ins.operands[3], Negated | Constant):
        raise ins.unknown()
    chosen = source(m, ins, ins.operands[3], "pred")
    return assign(m, result, np.where, chosen, a, b)


@opcode("slct")
def _select_by_sign(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    by = mods.type("s32", "f32")
    type_name = mods.type(*BITS, *INTEGERS, "f32", "f64")
    mods.done()
    ins.expect(4)
    bits = RAW[SIZES[type_name]]
    result = target(m, ins, ins.operands[0], type_name).view(bits)
    a, b = (source(m, ins, operand, type_name).view(bits) for operand in ins.operands[1:3])
    sign = source(m, ins, ins.operands[3], by)

    def choose(sign: Array, a: Array, b: Array) -> Array:
        return np.where(sign >= 0, a, b)

    return assign(m, result, choose, sign, a, b)
