# SPDX-License-Identifier: Apache-2.0
"""What lanes of a warp tell each other: shfl, vote, match, redux, activemask."""

from collections.abc import Callable
from typing import Any

import numpy as np

from .binder import Control, Modifiers, Step, assign, opcode, predicate, source, target
from .control import FULL, bits, collective
from .dtypes import DTYPES, Array
from .machine import Machine
from .shadow import WARP
from .syntax import Instruction, Pair


@opcode("shfl", control=True)
def _shuffle(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.one(("sync",))
    kind = mods.one(("bfly", "down", "up", "idx"))
    mods.exactly("b32")
    ins.expect(5)
    to = ins.operands[0]
    result = target(m, ins, to.first if isinstance(to, Pair) else to, "b32")
    inside = target(m, ins, to.second, "pred") if isinstance(to, Pair) else None
    value, offset, clamp, members = (source(m, ins, o, "b32") for o in ins.operands[1:])
    lane = m.specials["%laneid"].astype(np.int64)
    first = np.arange(m.threads) - lane
    known: dict[tuple[int, int], tuple[Array, Array]] = {}

    def sources() -> tuple[Array, Array]:
        """Where lanes read, kept if all of them have the same operands."""
        offsets, clamps = offset[m.lanes], clamp[m.lanes]
        key = int(offsets[0]), int(clamps[0])
        if (offsets != offsets[0]).any() or (clamps != clamps[0]).any():
            return _source_lanes(kind, lane, offset, clamp)
        if key not in known:
            one = np.uint32(key[0]), np.uint32(key[1])
            known[key] = _source_lanes(kind, lane, *one)
        return known[key]

    def shuffle() -> None:
        valid, lanes = sources()
        come_from = first + lanes
        if m.where is not None or m.ragged or not (members[m.lanes] == FULL).all():
            there = m.mask[come_from] & (members >> lanes.astype(np.uint32) & np.uint32(1) == 1)
            if (m.mask & ~there).any():
                raise m.failure("reads a lane that takes no part", m.who[m.mask & ~there])
        got = value[come_from]
        np.putmask(result, m.mask, got)
        if inside is not None:
            np.putmask(inside, m.mask, valid)

    return collective(m, ins, members, shuffle)


def _source_lanes(kind: str, lane: Array, offset: Any, clamp: Any) -> tuple[Array, Array]:
    """Whether the wanted lane is in the segment, and the lane that is read."""
    offset = offset.astype(np.int64) & 31
    segment, bound = clamp.astype(np.int64) >> 8 & 31, clamp.astype(np.int64) & 31
    last = lane & segment | bound & ~segment
    wanted = {
        "bfly": lambda: lane ^ offset,
        "down": lambda: lane + offset,
        "up": lambda: lane - offset,
        "idx": lambda: lane & segment | offset & ~segment,
    }[kind]()
    valid = wanted >= last if kind == "up" else wanted <= last
    return valid, np.where(valid, wanted, lane)


def _groups(
    m: Machine, members: Array, compute: Callable[[Array, Array], Array], values: Array
) -> Array:
    """``compute(values, lanes)`` for each group of lanes that goes together, for all threads.

    values are [n, lanes]: a row for each group of the same lanes; the result [n] or [n, lanes].
    """
    if m.where is None and not m.ragged and bool((members[m.lanes] == FULL).all()):
        lanes = np.arange(WARP, dtype=np.uint32)
        out = compute(values.reshape(-1, WARP), lanes)
        return out.ravel() if out.ndim == 2 else out.repeat(WARP)
    groups = []
    for start in np.unique(np.flatnonzero(m.mask) // WARP) * WARP:
        there = np.flatnonzero(m.mask[start : start + WARP])
        for mask in np.unique(members[start + there]):
            lanes = there[members[start + there] == mask]
            groups.append((start + lanes, compute(values[start + lanes][None], lanes)[0]))
    out = np.zeros(m.threads, np.asarray(groups[0][1]).dtype)
    for threads, value in groups:
        out[threads] = value
    return out


@opcode("vote", control=True)
def _vote(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.one(("sync",))
    kind = mods.one(("any", "all", "uni", "ballot"))
    type_name = mods.type("b32" if kind == "ballot" else "pred")
    mods.done()
    ins.expect(3)
    result = target(m, ins, ins.operands[0], type_name)
    value = predicate(m, ins, ins.operands[1])
    members = source(m, ins, ins.operands[2], "b32")

    def compute(values: Array, lanes: Array) -> Array:
        if kind == "ballot":
            weight = np.left_shift(np.uint32(1), lanes.astype(np.uint32))
            ballot: Array = np.where(values, weight, np.uint32(0)).sum(1, dtype=np.uint32)
            return ballot
        some, every = np.asarray(values.any(1)), np.asarray(values.all(1))
        return {"any": some, "all": every, "uni": every | ~some}[kind]

    vote = assign(m, result, lambda: _groups(m, members, compute, value()))
    return collective(m, ins, members, vote)


@opcode("match", control=True)
def _match(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    kind = mods.one(("any", "all"))
    mods.one(("sync",))
    type_name = mods.type("b32", "b64")
    mods.done()
    ins.expect(3)
    to = ins.operands[0]
    if isinstance(to, Pair) and kind == "any":
        raise ins.unknown()
    result = target(m, ins, to.first if isinstance(to, Pair) else to, "b32")
    same = target(m, ins, to.second, "pred") if isinstance(to, Pair) else None
    value = source(m, ins, ins.operands[1], type_name)
    members = source(m, ins, ins.operands[2], "b32")

    def compute(values: Array, lanes: Array) -> Array:
        weight = np.left_shift(np.uint32(1), lanes.astype(np.uint32))
        equal = values[:, :, None] == values[:, None, :]
        found = np.where(equal, weight, np.uint32(0)).sum(2, dtype=np.uint32)
        return found if kind == "any" else np.where(equal.all((1, 2))[:, None], found, np.uint32(0))

    def match() -> None:
        found = _groups(m, members, compute, value)
        np.putmask(result, m.mask, found)
        if same is not None:
            np.putmask(same, m.mask, found != 0)

    return collective(m, ins, members, match)


@opcode("redux", control=True)
def _reduce(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.one(("sync",))
    operation = mods.one(("add", "min", "max", "and", "or", "xor"))
    type_name = mods.type(*(("u32", "s32") if operation in ("add", "min", "max") else ("b32",)))
    mods.done()
    ins.expect(3)
    function = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
    }[operation]
    result = target(m, ins, ins.operands[0], type_name)
    value = source(m, ins, ins.operands[1], type_name)
    members = source(m, ins, ins.operands[2], "b32")

    def compute(values: Array, lanes: Array) -> Array:
        reduced: Array = function.reduce(values, axis=1, dtype=DTYPES[type_name])
        return reduced

    return collective(
        m, ins, members, assign(m, result, lambda: _groups(m, members, compute, value))
    )


@opcode("activemask")
def _active_mask(m: Machine, ins: Instruction) -> Step:
    Modifiers(ins).exactly("b32")
    ins.expect(1)
    return assign(m, target(m, ins, ins.operands[0], "b32"), lambda: bits(m.mask))
