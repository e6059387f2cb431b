# SPDX-License-Identifier: Apache-2.0
"""Launches a kernel in the interpreter."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

# Imported for the opcodes that they register.
from . import (  # noqa: F401
    async_copy,
    atomics,
    control,
    convert,
    floating,
    integer,
    load_store,
    matrix,
    moves,
    warp,
)
from .arguments import Argument, pack, pointers
from .binder import bind
from .errors import PtxError
from .load_store import width_of_access
from .machine import Machine
from .memory import GlobalMemory
from .shadow import WARP
from .syntax import Kernel

# Blocks run side by side up to this many threads: numpy takes little longer for 1024 than for 128.
SIDE_BY_SIDE = 1024
# Shared memory that a block may have, in KiB, by compute capability.
SHARED_LIMIT = {75: 64, 80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 120: 99}
# Register files that are kept for further launches.
KEPT_BYTES = 512 << 20
_recent: list[Machine] = []

Shape = int | Sequence[int]


def launch(
    kernel: Kernel,
    arguments: Iterable[Argument],
    grid: Shape,
    block: Shape,
    *,
    smem_bytes: int = 0,
    seed: int = 0,
    shared_buffers: Iterable[Any] = (),
) -> int:
    """Runs ``kernel`` and returns how many instructions it took.

    Args:
        kernel: From ``parse``.
        arguments: In the kernel's order: arrays (written in place) for pointers, None for a null
            pointer, numpy scalars or Python numbers, ``Uninitialised``, ``Struct``.
        grid: The number of blocks, or up to three of them.
        block: The number of threads, or up to three of them; a multiple of 32 in all.
        smem_bytes: The size of the dynamic shared memory.
        seed: Not 0: blocks, and atomic operations of one instruction, run in a random order.
        shared_buffers: Arrays through which blocks communicate by atomics and fences. In the others
            a word that one block writes is no business of another's.

    Raises:
        PtxError: If the kernel does what it must not, or the interpreter does not know something.
    """
    grid, block = _extents(grid), _extents(block)
    threads = block[0] * block[1] * block[2]
    if threads % WARP or not 0 < threads <= 1024 or min(grid) < 1:
        raise PtxError(f"a grid of {grid} blocks of {block} threads cannot be launched")
    if kernel.max_threads is not None and threads > kernel.max_threads:
        raise PtxError(f"{threads} threads, the kernel is bounded to {kernel.max_threads}")
    smem_bytes = _shared_bytes(kernel, smem_bytes)
    arguments = list(arguments)
    memory = GlobalMemory([*kernel.tables.values(), *pointers(arguments)], shared_buffers)
    parameters = pack(kernel.parameters, arguments, memory.address)
    granules = _granules(kernel)
    count = grid[0] * grid[1] * grid[2]
    memory.start(granules["global"], threads, count)
    side_by_side = min(max(1, SIDE_BY_SIDE // threads), 1 << (count - 1).bit_length())
    with np.errstate(all="ignore"):
        machine = _machine(kernel, block, side_by_side)
        machine.start(memory, parameters, grid, smem_bytes, granules["shared"], seed)
        order = np.arange(count)
        if seed:
            order = machine.random.permutation(order)
        for first in range(0, count, side_by_side):
            machine.run(order[first : first + side_by_side])
    return machine.count


def _extents(shape: Shape) -> tuple[int, int, int]:
    extents = (shape,) if isinstance(shape, int | np.integer) else tuple(shape)
    x, y, z = (*map(int, extents), 1, 1, 1)[:3]
    return x, y, z


def _shared_bytes(kernel: Kernel, dynamic: int) -> int:
    """Static and dynamic shared memory of a block."""
    _, static = kernel.shared_layout()
    if static > 48 * 1024:
        raise PtxError(f"{static} bytes of static shared memory, 49152 are allowed")
    limit = SHARED_LIMIT.get(kernel.target)
    if limit is None:
        raise PtxError(f"not known: the shared memory of sm_{kernel.target}")
    if static + dynamic > 1024 * limit:
        raise PtxError(
            f"{static + dynamic} bytes of shared memory, sm_{kernel.target} has {1024 * limit}"
        )
    return static + dynamic


def _granules(kernel: Kernel) -> dict[str, int]:
    """The width of the narrowest access to each memory; also checks every instruction once."""
    found: dict[str, int] | None = kernel.cache.get("granules")
    if kernel.problems:
        raise kernel.problems[0]
    if found is None:
        found = {"global": 4, "shared": 4}
        tester = Machine(kernel, (WARP, 1, 1), 1)
        for ins in kernel.code:
            bind(tester, ins)
            if width := width_of_access(ins):
                for space in found if width[0] == "any" else (width[0],):
                    found[space] = min(found[space], width[1])
        kernel.cache["granules"] = found
    return found


def _machine(kernel: Kernel, block: tuple[int, int, int], blocks: int) -> Machine:
    """A machine of this shape, kept for further launches; the least recent ones go."""
    machines: dict[Any, Machine] = kernel.cache.setdefault("machines", {})
    machine = machines.get((block, blocks))
    if machine is None:
        machine = machines[block, blocks] = Machine(kernel, block, blocks)
    else:
        _recent.remove(machine)
    _recent.append(machine)
    while len(_recent) > 1 and sum(kept.nbytes for kept in _recent) > KEPT_BYTES:
        oldest = _recent.pop(0)
        oldest.kernel.cache["machines"] = {
            key: kept for key, kept in oldest.kernel.cache["machines"].items() if kept is not oldest
        }
    return machine
