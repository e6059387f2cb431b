# SPDX-License-Identifier: Apache-2.0
"""Loads, stores and fences."""

from collections.abc import Callable

import numpy as np

from .binder import (
    Modifiers,
    Step,
    address,
    opcode,
    wide_source,
    wide_target,
)
from .dtypes import DTYPES, RAW, SIZES, Array
from .machine import Machine
from .memory import SHARED_WINDOW
from .syntax import Address, Instruction, Operand, Register, Sink, Symbol, Vector

TYPES = (*(f"{kind}{bits}" for kind in "bus" for bits in (8, 16, 32, 64)), "f32", "f64")
# Hints that change no result.
CACHE = ("ca", "cg", "cs", "lu", "cv", "wb", "wt")
EVICTION = tuple(
    f"L1::{policy}"
    for policy in ("evict_normal", "evict_unchanged", "evict_first", "evict_last", "no_allocate")
)
PREFETCH = ("L2::64B", "L2::128B", "L2::256B")
SCOPES = ("cta", "gpu", "sys")


def width_of_access(ins: Instruction) -> tuple[str, int] | None:
    """The space that an instruction touches at run time, and the width of its narrowest access."""
    names = set(ins.modifiers)
    if ins.head not in ("ld", "st", "atom", "red") or names & {"param"}:
        return None
    size = SIZES.get(ins.modifiers[-1], 4)
    space = next((name for name in ("global", "shared") if name in names), "any")
    return space, size


def memory_space(mods: Modifiers) -> str:
    space = mods.maybe(("global", "shared", "shared::cta", "param", "local"))
    if space == "local":
        raise mods.ins.error("local memory is not allowed")
    return {None: "any", "shared::cta": "shared"}.get(space, space or "any")


def memory_address(
    m: Machine, ins: Instruction, operand: Operand, space: str
) -> Callable[[], Array]:
    """Addresses as u64 of global memory or of any space, or u32 of shared memory."""
    base = operand.base if isinstance(operand, Address) else None
    if space == "shared" and isinstance(base, Register) and base.size == 8:
        wide = address(m, ins, operand, "u64")
        return lambda: wide().astype(np.uint32)
    if space != "shared" and isinstance(base, Symbol):
        raise ins.error(f"not known: symbol {base.name}")
    return address(m, ins, operand, "u32" if space == "shared" else "u64")


def _elements(operand: Operand, vector: str | None, ins: Instruction) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if (
        len(items) != (int(vector[1]) if vector else 1)
        or vector
        and not isinstance(operand, Vector)
    ):
        raise ins.error(f"not known: {operand} in {ins.opcode}")
    return items


# ---- loads and stores ----------------------------------------------------------------------------


@opcode("ld")
def _load(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*TYPES)
    order = mods.maybe(("volatile", "relaxed", "acquire", "weak"))
    if order in ("relaxed", "acquire"):
        mods.one(SCOPES)
    space = memory_space(mods)
    vector = mods.maybe(("v2", "v4"))
    ins.expect(2)
    items = _elements(ins.operands[0], vector, ins)
    size, count = SIZES[type_name], len(items)
    results = [None if isinstance(i, Sink) else wide_target(m, ins, i, type_name) for i in items]
    if space == "param":
        mods.done()
        return _load_parameter(m, ins, type_name, results)
    mods.maybe(CACHE)
    constant = False
    if space == "global":
        constant = mods.flag("nc")
        mods.maybe(EVICTION)
        mods.maybe(PREFETCH)
    mods.done()
    if size * count > 16:
        raise ins.unknown()
    where = memory_address(m, ins, ins.operands[1], space)
    dtype = DTYPES[type_name]
    strong = order in ("relaxed", "acquire")

    def load() -> None:
        m.at = ins
        lanes = m.lanes
        values = _load_from(m, space, where()[lanes], size, count, constant, strong)
        values = values.view(dtype)
        for column, result in enumerate(results):
            if result is not None:
                result[lanes] = values if count == 1 else values[:, column]

    return load


def _load_from(
    m: Machine, space: str, addresses: Array, size: int, count: int, constant: bool, strong: bool
) -> Array:
    if space == "shared":
        return m.shared.load(addresses, size, count, m.now, m.access, m.lanes, strong)
    if space == "global" or not (shared := addresses >= np.uint64(SHARED_WINDOW)).any():
        return m.memory.load(addresses, size, count, m.now, m.access, constant, strong)
    values = np.zeros((addresses.size, count), RAW[size])
    threads = m.active_threads
    for chosen, of in ((shared, "shared"), (~shared, "global")):
        if chosen.any():
            access, lanes = m.access_of(threads[chosen]), threads[chosen]
            if of == "shared":
                narrow = (addresses[chosen] - np.uint64(SHARED_WINDOW)).astype(np.uint32)
                part = m.shared.load(narrow, size, count, m.now, access, lanes, strong)
            else:
                part = m.memory.load(addresses[chosen], size, count, m.now, access, False, strong)
            values[chosen] = part.reshape(-1, count)
    return values[:, 0] if count == 1 else values


def _load_parameter(
    m: Machine, ins: Instruction, type_name: str, results: list[Array | None]
) -> Step:
    operand = ins.operands[1]
    size, dtype = SIZES[type_name], DTYPES[type_name]
    length = size * len(results)
    total = m.kernel.parameter_bytes
    if not isinstance(operand, Address):
        raise ins.error(f"not known: {operand} as an address")
    if isinstance(operand.base, Symbol):
        name = operand.base.name
        found = next((p for p in m.kernel.parameters if p.name == name), None)
        if found is None or not 0 <= operand.offset <= found.size - length:
            raise ins.error(f"not known: parameter {name}+{operand.offset}")
        first = found.offset + operand.offset

        def load() -> None:
            values = m.parameters[first : first + length].view(dtype)
            for value, result in zip(values, results, strict=True):
                if result is not None:
                    if m.where is None:
                        result.fill(value)
                    else:
                        result[m.lanes] = value

        return load
    # Where the address is computed: an element of an array in a structure.
    where = address(m, ins, operand, "u64")

    def gather() -> None:
        m.at = ins
        lanes = m.lanes
        first = where()[lanes].view(np.int64)
        bad = (first < 0) | (first > total - length) | (first % length != 0)
        if bad.any():
            raise m.failure("parameters read out of bounds or misaligned", m.who[lanes][bad])
        rows = m.parameters[first[:, None] + np.arange(length)].view(dtype)
        for column, result in enumerate(results):
            if result is not None:
                result[lanes] = rows[:, column]

    return gather


@opcode("st")
def _store(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*TYPES)
    order = mods.maybe(("volatile", "relaxed", "release", "weak"))
    strong = order in ("relaxed", "release")
    if strong:
        mods.one(SCOPES)
    space = memory_space(mods)
    vector = mods.maybe(("v2", "v4"))
    mods.maybe(CACHE)
    if space == "global":
        mods.maybe(EVICTION)
    mods.done()
    ins.expect(2)
    items = _elements(ins.operands[1], vector, ins)
    size, count = SIZES[type_name], len(items)
    if space == "param" or size * count > 16:
        raise ins.unknown()
    raw = RAW[size]
    values = [wide_source(m, ins, item, type_name).view(raw) for item in items]
    where = memory_address(m, ins, ins.operands[0], space)

    def store() -> None:
        m.at = ins
        lanes = m.lanes
        if count == 1:
            data = values[0][lanes]
        else:
            data = np.stack([value[lanes] for value in values], axis=1)
        _store_to(m, space, where()[lanes], data, size, strong)

    return store


def _store_to(
    m: Machine, space: str, addresses: Array, data: Array, size: int, strong: bool
) -> None:
    if space == "shared":
        m.shared.store(addresses, data, size, m.now, m.access, m.lanes)
        return
    if space == "global" or not (shared := addresses >= np.uint64(SHARED_WINDOW)).any():
        m.memory.store(addresses, data, size, m.now, m.access, strong)
        return
    threads = m.active_threads
    for chosen, of in ((shared, "shared"), (~shared, "global")):
        if chosen.any():
            access, lanes = m.access_of(threads[chosen]), threads[chosen]
            if of == "shared":
                narrow = (addresses[chosen] - np.uint64(SHARED_WINDOW)).astype(np.uint32)
                m.shared.store(narrow, data[chosen], size, m.now, access, lanes)
            else:
                m.memory.store(addresses[chosen], data[chosen], size, m.now, access, strong)


@opcode("membar", "fence")
def _fence(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    if ins.head == "membar":
        mods.one(("cta", "gl", "sys"))
    else:
        mods.maybe(("sc", "acq_rel"))
        mods.one(SCOPES)
    mods.done()
    ins.expect(0)

    def fence() -> None:
        m.fence()

    return fence
