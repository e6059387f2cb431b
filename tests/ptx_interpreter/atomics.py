# SPDX-License-Identifier: Apache-2.0
"""Atomic operations on global and shared memory."""

import numpy as np

from .binder import Modifiers, Step, opcode, source, target
from .dtypes import DTYPES, SIZES, Array
from .load_store import SCOPES, TYPES, memory_address, memory_space
from .machine import Machine
from .memory import SHARED_WINDOW
from .syntax import Instruction, Sink

OPERATIONS: dict[str, tuple[str, ...]] = {
    "add": ("u32", "s32", "u64", "f32", "f64"),
    "min": ("u32", "s32", "u64", "s64"),
    "max": ("u32", "s32", "u64", "s64"),
    "and": ("b32", "b64"),
    "or": ("b32", "b64"),
    "xor": ("b32", "b64"),
    "exch": ("b32", "b64"),
    "cas": ("b32", "b64"),
}
UFUNCS = {
    "add": np.add,
    "min": np.minimum,
    "max": np.maximum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
}


@opcode("atom", "red")
def _atomic(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    type_name = mods.type(*TYPES)
    release = mods.maybe(("relaxed", "acquire", "release", "acq_rel")) in ("release", "acq_rel")
    mods.maybe(SCOPES)
    space = memory_space(mods)
    operation = mods.one(OPERATIONS)
    mods.done()
    if type_name not in OPERATIONS[operation] or space == "param":
        raise ins.unknown()
    returns = ins.head == "atom"
    if not returns and operation in ("exch", "cas"):
        raise ins.unknown()
    ins.expect((3 if returns else 2) + (operation == "cas"))
    operands = list(ins.operands)
    to = operands.pop(0) if returns else Sink()
    result = None if isinstance(to, Sink) else target(m, ins, to, type_name)
    where = memory_address(m, ins, operands[0], space)
    values = [source(m, ins, operand, type_name) for operand in operands[1:]]
    size, dtype = SIZES[type_name], DTYPES[type_name]

    def atomic() -> None:
        m.at = ins
        if release:
            m.fence()
        lanes, threads = m.lanes, m.active_threads
        addresses, operand = where()[lanes], [value[lanes] for value in values]
        old = np.zeros(addresses.size, dtype)
        for cells, rows, part in _cells(m, space, addresses, size, threads):
            order = np.arange(rows.size)
            if m.shuffled:
                order = m.random.permutation(order)
            chosen = [value[part][order] for value in operand]
            found = _update(operation, cells.view(dtype), rows[order], chosen, result is not None)
            if result is not None:
                old[np.arange(old.size)[part][order]] = found
        if result is not None:
            result[lanes] = old

    return atomic


def _cells(
    m: Machine, space: str, addresses: Array, size: int, threads: Array
) -> list[tuple[Array, Array, Array | slice]]:
    """Memory, places in it and which of the threads, checked as an atomic access."""
    if space == "shared":
        return [m.shared.atomic(addresses, size, m.now, m.access, threads)]
    shared = addresses >= np.uint64(SHARED_WINDOW)
    if space == "global" or not shared.any():
        return m.memory.atomic(addresses, size, m.now, m.access)
    if not shared.all():
        raise m.failure("an atomic on shared and global memory at once", m.access.who)
    narrow = (addresses - np.uint64(SHARED_WINDOW)).astype(np.uint32)
    return [m.shared.atomic(narrow, size, m.now, m.access, threads)]


def _update(operation: str, cells: Array, rows: Array, values: list[Array], returns: bool) -> Array:
    """Performs the operations one after another; the values before each of them."""
    if not returns and operation in UFUNCS:
        UFUNCS[operation].at(cells, rows, values[0])
        return values[0]
    if np.unique(rows).size == rows.size:
        old = cells[rows]
        cells[rows] = _new_value(operation, old, values)
        return old
    old = np.empty(rows.size, cells.dtype)
    for i, row in enumerate(rows):
        old[i] = cells[row]
        cells[row] = _new_value(operation, old[i : i + 1], [v[i : i + 1] for v in values])[0]
    return old


def _new_value(operation: str, old: Array, values: list[Array]) -> Array:
    if operation == "exch":
        return values[0]
    if operation == "cas":
        return np.where(old == values[0], values[1], old)
    new: Array = UFUNCS[operation](old, values[0])
    return new
