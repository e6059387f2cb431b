# SPDX-License-Identifier: Apache-2.0
"""Floating-point arithmetic.

Results are rounded once, in the direction that the opcode names. The approximate functions
(.approx, .full) are computed in float64 and rounded, so they are better here than on the hardware.
"""

from collections.abc import Callable
from typing import Any

import numpy as np

from . import integer
from .binder import Handler, Modifiers, Step, assign, elementwise, opcode, source, target
from .dtypes import INTEGERS, Array
from .machine import Machine
from .rounding import (
    flush,
    fma32,
    fma64,
    from_bf16,
    odd_f32,
    odd_fma32,
    odd_sum,
    to_bf16,
    to_f16,
    to_f32,
)
from .syntax import Instruction

FLOATS = ("f32", "f64")
HALVES = ("f16", "bf16", "f16x2", "bf16x2")
DIRECTIONS = ("rn", "rz", "rm", "rp")


def by_type(*names: str, integers: Handler) -> Callable[[Handler], Handler]:
    """Registers a handler for opcodes of floats beside one for those of integers."""

    def register(floats: Handler) -> Handler:
        def handler(m: Machine, ins: Instruction) -> Any:
            is_integer = ins.modifiers and ins.modifiers[-1] in INTEGERS
            return (integers if is_integer else floats)(m, ins)

        opcode(*names)(handler)
        return floats

    return register


def _finish(ftz: bool, saturate: bool, compute: Callable[..., Array]) -> Callable[..., Array]:
    """``compute`` with the modifiers .ftz and .sat."""
    if not (ftz or saturate):
        return compute

    def finished(*values: Array) -> Array:
        result = compute(*map(flush, values)) if ftz else compute(*values)
        result = flush(result) if ftz else result
        if saturate:
            result = np.where(np.isnan(result), 0, np.clip(result, 0, 1)).astype(result.dtype)
        return result

    return finished


@by_type("add", "sub", integers=integer.integer_add_sub)
def _add(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS, *HALVES)
    mode = mods.maybe(DIRECTIONS) or "rn"
    function = np.add if ins.head == "add" else np.subtract
    if type_name in HALVES:
        return _halves(m, ins, mods, type_name, mode, function)
    ftz, saturate = _f32_flags(mods, type_name)
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    values = integer.sources(m, ins, type_name, type_name)
    if mode == "rn" and not (ftz or saturate):
        return elementwise(m, function, result, *values)
    if type_name == "f64" and mode != "rn":
        raise ins.unknown()

    def directed(a: Array, b: Array) -> Array:
        if mode == "rn":
            return function(a, b)
        wide = b.astype(np.float64)
        return to_f32(odd_sum(a.astype(np.float64), wide if function is np.add else -wide), mode)

    return assign(m, result, _finish(ftz, saturate, directed), *values)


@by_type("mul", integers=integer.integer_mul_mad)
def _mul(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS, *HALVES)
    mode = mods.maybe(DIRECTIONS) or "rn"
    if type_name in HALVES:
        return _halves(m, ins, mods, type_name, mode, np.multiply)
    ftz, saturate = _f32_flags(mods, type_name)
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    values = integer.sources(m, ins, type_name, type_name)
    if mode == "rn" and not (ftz or saturate):
        return elementwise(m, np.multiply, result, *values)
    if type_name == "f64" and mode != "rn":
        raise ins.unknown()

    def directed(a: Array, b: Array) -> Array:
        return a * b if mode == "rn" else to_f32(a.astype(np.float64) * b, mode)

    return assign(m, result, _finish(ftz, saturate, directed), *values)


opcode("mad")(integer.integer_mul_mad)


@opcode("fma")
def _fma(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS, *HALVES)
    mode = mods.one(DIRECTIONS)
    if type_name in HALVES:
        return _halves(m, ins, mods, type_name, mode, None)
    ftz, saturate = _f32_flags(mods, type_name)
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    values = integer.sources(m, ins, type_name, type_name, type_name)
    if type_name == "f64":
        if mode != "rn":
            raise ins.unknown()
        return assign(m, result, fma64, *values)
    compute = fma32
    if mode != "rn":

        def compute(a: Array, b: Array, c: Array) -> Array:
            return to_f32(odd_fma32(a, b, c), mode)

    return assign(m, result, _finish(ftz, saturate, compute), *values)


def _f32_flags(mods: Modifiers, type_name: str) -> tuple[bool, bool]:
    if type_name != "f32":
        return False, False
    return mods.flag("ftz"), mods.flag("sat")


def _halves(
    m: Machine, ins: Instruction, mods: Modifiers, type_name: str, mode: str, function: Any
) -> Step:
    """Arithmetic of half and bf16, one or two in a register; ``function`` None is fma."""
    mods.done()
    if mode != "rn":
        raise ins.unknown()
    count = 3 if function is None else 2
    bfloat = type_name.startswith("bf16")
    kind = np.uint16 if bfloat else np.float16

    def compute(*values: Array) -> Array:
        parts = [np.ascontiguousarray(value).view(kind) for value in values]
        wide = [from_bf16(part) if bfloat else part.astype(np.float32) for part in parts]
        if function is None:
            exact = odd_fma32(*wide)
            rounded = to_bf16(odd_f32(exact)) if bfloat else to_f16(exact)
        else:
            exact = function(*wide)
            rounded = to_bf16(exact) if bfloat else to_f16(exact)
        packed: Array = rounded.view(values[0].dtype)
        return packed

    result = target(m, ins, ins.operands[0], type_name)
    return assign(m, result, compute, *integer.sources(m, ins, *[type_name] * count))


@by_type("min", "max", integers=integer.integer_min_max)
def _min_max(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS, *HALVES)
    ftz = type_name == "f32" and mods.flag("ftz")
    keep_nan = type_name != "f64" and mods.flag("NaN")
    mods.done()
    minimum = ins.head == "min"
    choose: Any = {
        (True, True): np.minimum,
        (True, False): np.fmin,
        (False, True): np.maximum,
        (False, False): np.fmax,
    }[minimum, keep_nan]

    def of_floats(a: Array, b: Array) -> Array:
        chosen: Array = choose(a, b)
        # PTX has -0 below +0: where the operands are equal, their bits decide.
        zeros = chosen == 0
        if np.count_nonzero(zeros):
            raw = f"u{a.itemsize}"
            both = np.bitwise_or if minimum else np.bitwise_and
            bits = both(a.view(raw), b.view(raw)).view(a.dtype)
            chosen = np.where(zeros & (a == b), bits, chosen)
        return chosen

    def of_halves(a: Array, b: Array) -> Array:
        if type_name.startswith("bf16"):
            wide = of_floats(*(from_bf16(np.ascontiguousarray(x).view(np.uint16)) for x in (a, b)))
            packed: Array = to_bf16(wide).view(a.dtype)
            return packed
        wide = of_floats(*(np.ascontiguousarray(x).view(np.float16) for x in (a, b)))
        return wide.view(a.dtype)

    result = target(m, ins, ins.operands[0], type_name)
    values = integer.sources(m, ins, type_name, type_name)
    compute = of_halves if type_name in HALVES else of_floats
    return assign(m, result, _finish(ftz, False, compute), *values)


@opcode("abs", "neg")
def _sign(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS, *HALVES, "s16", "s32", "s64")
    ftz = type_name == "f32" and mods.flag("ftz")
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    (a,) = integer.sources(m, ins, type_name)
    if type_name in ("bf16", "f16x2", "bf16x2"):
        signs = a.dtype.type(0x80008000 & (1 << 8 * a.itemsize) - 1)
        if ins.head == "abs":
            return elementwise(m, np.bitwise_and, result, a, m.constant(~signs))
        return elementwise(m, np.bitwise_xor, result, a, m.constant(signs))
    function = np.absolute if ins.head == "abs" else np.negative
    if ftz:
        return assign(m, result, lambda a: flush(function(a)), a)
    return elementwise(m, function, result, a)


@by_type("div", integers=integer.integer_div)
def _div(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS)
    mods.one(("rn", "approx", "full") if type_name == "f32" else ("rn",))
    ftz = type_name == "f32" and mods.flag("ftz")
    mods.done()
    result = target(m, ins, ins.operands[0], type_name)
    values = integer.sources(m, ins, type_name, type_name)
    if ftz:
        return assign(m, result, _finish(True, False, np.divide), *values)
    return elementwise(m, np.divide, result, *values)


FUNCTIONS: dict[str, Callable[[Array], Array]] = {
    "rcp": lambda x: 1 / x,
    "sqrt": np.sqrt,
    "rsqrt": lambda x: 1 / np.sqrt(x),
    "ex2": np.exp2,
    "lg2": np.log2,
    "sin": np.sin,
    "cos": np.cos,
    "tanh": np.tanh,
}
# Functions that exist with correct rounding; the others are approximate only.
ROUNDED = ("rcp", "sqrt")


@opcode(*FUNCTIONS)
def _function(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS)
    rounded = ins.head in ROUNDED and mods.flag("rn")
    if not rounded:
        mods.one(("approx",))
    gross = type_name == "f64" and not rounded
    if gross and (ins.head not in ("rcp", "rsqrt") or not mods.flag("ftz")):
        raise ins.unknown()
    ftz = type_name == "f32" and mods.flag("ftz")
    mods.done()
    function = FUNCTIONS[ins.head]
    high = np.uint64(0xFFFFFFFF00000000)

    def compute(a: Array) -> Array:
        if gross:
            # Only the upper halves of operand and result count.
            a = flush((a.view(np.uint64) & high).view(np.float64))
            value: Array = flush((function(a).view(np.uint64) & high).view(np.float64))
            return value
        value = function(a.astype(np.float64)).astype(a.dtype)
        return value

    result = target(m, ins, ins.operands[0], type_name)
    return assign(m, result, _finish(ftz, False, compute), *integer.sources(m, ins, type_name))


@opcode("copysign")
def _copysign(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS)
    mods.done()
    sign, size = integer.sources(m, ins, type_name, type_name)
    return elementwise(m, np.copysign, target(m, ins, ins.operands[0], type_name), size, sign)


@opcode("testp")
def _test(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*FLOATS)
    kind = mods.one(("finite", "infinite", "number", "notanumber", "normal", "subnormal"))
    mods.done()
    tiny = np.finfo(np.float32 if type_name == "f32" else np.float64).tiny
    tests: dict[str, Callable[[Array], Array]] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": lambda a: np.isfinite(a) & (np.abs(a) >= tiny),
        "subnormal": lambda a: (a != 0) & (np.abs(a) < tiny),
    }
    result = target(m, ins, ins.operands[0], "pred")
    return assign(m, result, tests[kind], source(m, ins, ins.operands[1], type_name))
