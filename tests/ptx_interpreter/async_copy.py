# SPDX-License-Identifier: Apache-2.0
"""The cp.async instructions."""

import numpy as np

from .binder import Modifiers, Step, opcode, source
from .dtypes import Array
from .load_store import PREFETCH, memory_address
from .machine import Machine
from .syntax import Instruction


@opcode("cp")
def _copy(m: Machine, ins: Instruction) -> Step:
    mods = Modifiers(ins)
    mods.one(("async",))
    action = mods.one(("ca", "cg", "commit_group", "wait_group", "wait_all"))
    if action == "commit_group":
        mods.done()
        ins.expect(0)
        return lambda: m.copies.commit(m.lanes)
    if action in ("wait_group", "wait_all"):
        mods.done()
        ins.expect(int(action == "wait_group"))
        pending = None
        if action == "wait_group":
            pending = int(source(m, ins, ins.operands[0], "u32")[0])

        def wait() -> None:
            if pending is None:
                m.copies.commit(m.lanes)
            m.copies.wait(m.shared, m.mask, pending or 0, m.now)

        return wait
    return _issue(m, ins, mods, action)


def _issue(m: Machine, ins: Instruction, mods: Modifiers, action: str) -> Step:
    space = mods.one(("shared", "shared::cta"))
    mods.one(("global",))
    mods.maybe(PREFETCH)
    mods.done()
    ins.expect(3, 4)
    length = int(source(m, ins, ins.operands[2], "u32")[0])
    if length not in ((16,) if action == "cg" else (4, 8, 16)):
        raise ins.error(f"not known: cp.async.{action} of {length} bytes")
    to = memory_address(m, ins, ins.operands[0], space.split(":")[0])
    of = memory_address(m, ins, ins.operands[1], "global")
    taken = source(m, ins, ins.operands[3], "u32") if len(ins.operands) == 4 else None

    words = length // 4

    def issue() -> None:
        m.at = ins
        threads = m.active_threads
        sources = of()[threads]
        sizes = None if taken is None else taken[threads]
        if sizes is None or int(sizes.min()) == length == int(sizes.max()):
            data = m.memory.load(sources, 4, words, m.now, m.access).reshape(-1, words)
        else:
            data = _read_some(m, threads, sources, sizes, length)
        m.copies.issue(m.shared, threads, to()[threads], data, m.now, m.access)

    return issue


def _read_some(m: Machine, threads: Array, sources: Array, sizes: Array, length: int) -> Array:
    """Reads the first ``sizes`` of ``length`` bytes a thread; the others are zero. [n, words]."""
    data = np.zeros((threads.size, length), np.uint8)
    if (sizes > length).any():
        raise m.failure("cp.async: src-size is larger than cp-size", m.who[threads[sizes > length]])
    bad = (sizes > 0) & (sources % np.uint64(length) != 0)
    if bad.any():
        raise m.failure("misaligned source of a cp.async", m.who[threads[bad]])
    for size in np.unique(sizes):
        rows = np.flatnonzero(sizes == size)
        access = m.access_of(threads[rows])
        done = 0
        # In the widest pieces that are aligned: 12 bytes are 8 and 4.
        for piece in (16, 8, 4, 2, 1):
            if int(size) & piece:
                width = min(piece, 4)
                part = m.memory.load(
                    sources[rows] + np.uint64(done), width, piece // width, m.now, access
                )
                part = np.ascontiguousarray(part).view(np.uint8).reshape(-1, piece)
                data[rows, done : done + piece] = part
                done += piece
    return data.view(np.uint32)
