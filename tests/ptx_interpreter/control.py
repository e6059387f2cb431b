# SPDX-License-Identifier: Apache-2.0
"""Branches, barriers, and the gathering of lanes that warp-wide instructions need."""

from typing import Any

import numpy as np

from .binder import Control, Modifiers, Step, assign, condition, opcode, predicate, source, target
from .dtypes import Array
from .machine import Machine
from .shadow import WARP
from .syntax import Constant, Instruction, Operand, Symbol

FULL = np.uint32(0xFFFFFFFF)


@opcode("bra", control=True)
def _branch(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.flag("uni")
    mods.done()
    ins.expect(1)
    label = ins.operands[0]
    if not isinstance(label, Symbol) or label.name not in m.kernel.labels:
        raise ins.error(f"not known: label {label}")
    there = m.kernel.labels[label.name]
    if ins.predicate is None:
        return Control(lambda pc: there)
    holds = condition(m, ins)

    def branch(pc: int) -> int | None:
        taken = holds()
        count = int(np.count_nonzero(taken))
        if count == 0:
            return pc + 1
        if count == m.active:
            return there
        m.park(there, taken)
        m.activate(np.greater(m.mask, taken), m.active - count)
        return pc + 1

    return Control(branch, own_predicate=True)


@opcode("ret", "exit", control=True)
def _leave(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.flag("uni")
    mods.done()
    ins.expect(0)

    def leave(pc: int) -> None:
        m.live = np.greater(m.live, m.mask)
        m.live_count -= m.active
        lanes = m.live.reshape(-1, WARP).sum(1)
        m.ragged = bool(((lanes > 0) & (lanes < WARP)).any())
        # Lanes that waited for these need not wait any more.
        while m.at_collective:
            m.park(*m.at_collective.popitem())

    return Control(leave)


@opcode("trap")
def _trap(m: Machine, ins: Instruction) -> Step:
    Modifiers(ins).done()
    ins.expect(0)

    def trap() -> None:
        m.at = ins
        raise m.failure("the kernel trapped", m.access.who)

    return trap


# ---- barriers of a block -------------------------------------------------------------------------


@opcode("bar", "barrier", control=True)
def _barrier(m: Machine, ins: Instruction) -> Control:
    mods = Modifiers(ins)
    mods.flag("cta")
    kind = mods.one(("sync", "red"))
    mods.flag("aligned")
    operands = list(ins.operands)
    finish: Step | None = None
    if kind == "red":
        finish = _reduction(m, ins, mods, operands)
    mods.done()
    # Other barriers than number 0, and barriers of some of the threads, are not modelled.
    if len(operands) != 1 or operands[0] != Constant("0"):
        raise ins.error(f"not known: {ins.opcode} {operands}")

    def barrier(pc: int) -> int | None:
        waiting = m.at_barrier.pop(pc, None)
        waiting = m.mask if waiting is None else waiting | m.mask
        together = waiting.reshape(m.blocks, m.block_threads).all(1)
        if not together.any():
            m.at_barrier[pc] = waiting
            return None
        released = np.repeat(together, m.block_threads)
        rest = np.greater(waiting, released)
        if rest.any():
            m.at_barrier[pc] = rest
        m.activate(released)
        m.meet(released, block=True)
        if finish is not None:
            finish()
        return pc + 1

    return Control(barrier)


def _reduction(m: Machine, ins: Instruction, mods: Modifiers, operands: list[Operand]) -> Step:
    """bar.red: what is computed from the predicates of all threads of the block."""
    operation = mods.one(("and", "or", "popc"))
    type_name = mods.type("u32" if operation == "popc" else "pred")
    ins.expect(3)
    result = target(m, ins, ins.operands[0], type_name)
    value = predicate(m, ins, ins.operands[2])
    del operands[2], operands[0]
    functions: dict[str, Any] = {"and": np.all, "or": np.any, "popc": np.count_nonzero}
    function = functions[operation]

    def reduce() -> Array:
        of_block = function(value().reshape(m.blocks, m.block_threads), axis=1)
        return np.repeat(of_block.astype(result.dtype), m.block_threads)

    return assign(m, result, reduce)


# ---- lanes of a warp -----------------------------------------------------------------------------


def collective(m: Machine, ins: Instruction, members: Array | None, run: Step) -> Control:
    """An instruction that lanes of a warp execute together.

    ``members`` are the masks of the lanes that each thread waits for; lanes that have left are not
    waited for. None stands for an instruction that needs all 32 lanes.
    """

    def gather(pc: int) -> int | None:
        m.at = ins
        if m.active == m.live_count and not m.ragged:
            # The common case: all are here, and all name all.
            if members is None or bool((members[m.lanes] == FULL).all()):
                run()
                return pc + 1
        waiting = m.at_collective.pop(pc, None)
        here = m.mask if waiting is None else m.mask | waiting
        go = _complete(m, here, members)
        rest = np.greater(here, go)
        if rest.any():
            m.at_collective[pc] = rest
        if not go.any():
            return None
        m.activate(go)
        run()
        return pc + 1

    return Control(gather)


def _complete(m: Machine, here: Array, members: Array | None) -> Array:
    """Of the threads that are here, those whose fellow lanes are here too."""
    if members is None:
        return np.repeat(here.reshape(-1, WARP).all(1), WARP)
    lane = m.specials["%laneid"]
    if (here & (members >> lane & np.uint32(1) == 0)).any():
        bad = here & (members >> lane & np.uint32(1) == 0)
        raise m.failure("a lane executes it that is not in the mask", m.who[bad])
    missing = members & bits(m.live) & ~bits(here)
    go = here & (missing == 0)
    for warp in np.unique(np.flatnonzero(go) // WARP) if (members[go] != FULL).any() else ():
        lanes = slice(warp * WARP, (warp + 1) * WARP)
        masks, there = members[lanes], np.flatnonzero(here[lanes])
        for first in np.flatnonzero(go[lanes]):
            group = there[masks[first] >> there.astype(np.uint32) & np.uint32(1) == 1]
            if (masks[group] != masks[first]).any():
                raise m.failure("lanes of one group give different masks", m.who[lanes][group])
    result: Array = go
    return result


def bits(mask: Array) -> Array:
    """For every thread, the threads of its warp in ``mask`` as bits."""
    packed = np.packbits(mask.reshape(-1, WARP), axis=1, bitorder="little")
    return np.repeat(np.ascontiguousarray(packed).view("<u4")[:, 0], WARP)


@opcode("bar.warp", control=True)
def _warp_barrier(m: Machine, ins: Instruction) -> Control:
    Modifiers(ins).exactly("warp", "sync")
    ins.expect(1)
    members = source(m, ins, ins.operands[0], "b32")

    def synchronise() -> None:
        # A barrier of some lanes of a warp gathers them but gives no order, which is stricter
        # than the hardware: order is kept for warps as a whole.
        live = bits(m.live)
        whole = m.mask & (members & live == live)
        if whole.any():
            m.meet(whole, block=False)

    return collective(m, ins, members, synchronise)
