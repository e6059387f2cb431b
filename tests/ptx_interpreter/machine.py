# SPDX-License-Identifier: Apache-2.0
"""Runs a kernel: blocks side by side, threads in step, each instruction for all of them at once.

A machine is made for a kernel, a shape of block and a number of blocks that run together. It binds
each instruction once to its registers, arrays with one element a thread, and is kept for further
launches. Of the threads that can go on, those at the lowest place in the code go first: structured
code reconverges that way.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from .binder import Control, Step, bind, is_control
from .copies import Copies
from .dtypes import DTYPES, RAW, Array
from .errors import PtxError
from .memory import GlobalMemory, SharedMemory
from .shadow import WARP, Access
from .syntax import Instruction, Kernel, Register

POISON = 0xA5


@dataclass(slots=True)
class Segment:
    """Instructions that are executed one after another, and the control that ends them."""

    first: int
    end: int  # where the control is, which is a segment of its own too, or the next one begins
    control: bool
    steps: list[Step] | None = None
    leave: Callable[[int], int | None] | None = None


class Machine:
    """Registers and threads of the blocks that run together."""

    def __init__(self, kernel: Kernel, block: tuple[int, int, int], blocks: int) -> None:
        """For ``blocks`` blocks of the shape ``block``."""
        self.kernel = kernel
        self.block_threads = block[0] * block[1] * block[2]
        self.blocks = blocks
        threads = self.threads = self.block_threads * blocks
        self.threads_range = np.arange(threads)
        self.files: dict[int, Array] = {
            size: np.empty((count, threads), RAW[size] if size else np.bool_)
            for size, count in kernel.registers.items()
        }
        self.nbytes = sum(file.nbytes for file in self.files.values())
        self.specials = _specials(block, blocks)
        self.constants: dict[Any, Array] = {}
        self.random = np.random.default_rng(0)
        self.shuffled = False
        # Set by a launch.
        self.memory: GlobalMemory
        self.shared: SharedMemory
        self.parameters = np.zeros(0, np.uint8)
        self.copies = Copies(threads)
        self.count = 0
        # The instruction that is executed, for messages, where it can fail.
        self.at: Instruction | None = None
        # Active threads: as a mask, as an index; and as a mask for results, which is None where
        # it does not matter what the other threads' registers become.
        self.mask = np.ones(threads, np.bool_)
        self.where: Array | None = None
        self.active = threads
        self._lanes: Array | slice | None = None
        self._access: Access | None = None
        # Threads that have not left, and those that wait.
        self.live = self.mask
        self.live_count = threads
        self.ragged = False  # some warp has threads that have left and threads that have not
        self.ready: dict[int, Array] = {}
        self.at_barrier: dict[int, Array] = {}
        self.at_collective: dict[int, Array] = {}
        self.now = 0
        self.who = np.zeros(threads, np.int32)
        self.block_time = np.zeros(threads, np.int32)
        self.warp_time = np.zeros(threads, np.int32)
        self.segments = _segments(kernel)

    # ---- operands of bound instructions ----------------------------------------------------------

    def register(self, register: Register, dtype: Any) -> Array:
        """The values of a register, one a thread."""
        row: Array = self.files[register.size][register.index]
        return row if register.size == 0 else row.view(dtype)

    def constant(self, value: Any) -> Array:
        """An array that holds ``value`` for every thread; not to be written."""
        key = (value.dtype, value.tobytes())
        if key not in self.constants:
            self.constants[key] = np.full(self.threads, value)
            self.constants[key].flags.writeable = False
        return self.constants[key]

    # ---- active threads --------------------------------------------------------------------------

    def activate(self, mask: Array, active: int | None = None) -> None:
        """Makes the threads in ``mask`` the active ones."""
        self.mask = mask
        self.active = int(np.count_nonzero(mask)) if active is None else active
        self.where = None if self.active == self.live_count else mask
        self._lanes = self._access = None

    @property
    def lanes(self) -> Array | slice:
        """The active threads as an index."""
        if self._lanes is None:
            all_active = self.active == self.threads
            self._lanes = slice(None) if all_active else np.flatnonzero(self.mask)
        return self._lanes

    @property
    def active_threads(self) -> Array:
        """The numbers of the active threads."""
        lanes = self.lanes
        return self.threads_range if isinstance(lanes, slice) else lanes

    @property
    def access(self) -> Access:
        """Who the active threads are."""
        if self._access is None:
            self._access = self.access_of(self.lanes)
        return self._access

    def access_of(self, lanes: Array | slice) -> Access:
        """Who the threads with the given numbers are."""
        return Access(self.failure, self.who[lanes], self.block_time[lanes], self.warp_time[lanes])

    def failure(self, problem: str, who: Array | None = None) -> PtxError:
        """An exception that tells where and for which threads something went wrong."""
        at = self.at
        assert at is not None
        text = f"{problem}; {at.where}, kernel {self.kernel.name}: {at.text}"
        if who is not None and who.size:
            block = int(who.flat[0]) // self.block_threads
            ids = np.unique(who[who // self.block_threads == block]) - block * self.block_threads
            names = ", ".join(map(str, ids[:4])) + (", ..." if ids.size > 4 else "")
            text += f" (block {self.block_index(block)}, threads {names})"
        return PtxError(text)

    def block_index(self, block: Any) -> tuple[Any, Any, Any]:
        """The blockIdx of a block by its number, or of an array of them."""
        x, y, _ = self.grid
        return block % x, block // x % y, block // (x * y)

    # ---- a launch --------------------------------------------------------------------------------

    def start(
        self,
        memory: GlobalMemory,
        parameters: bytes,
        grid: tuple[int, int, int],
        smem_bytes: int,
        granule: int,
        seed: int,
    ) -> None:
        """Takes the arguments of a launch."""
        self.memory, self.grid = memory, grid
        self.parameters = np.frombuffer(parameters, np.uint8)
        self.shared = SharedMemory(smem_bytes, self.blocks, self.block_threads, granule)
        self.random, self.shuffled = np.random.default_rng(seed), seed != 0
        self.specials["%dynamic_smem_size"].fill(smem_bytes - self.kernel.shared_layout()[1])
        for axis, extent in zip("xyz", grid, strict=True):
            self.specials[f"%nctaid.{axis}"].fill(extent)
        for file in self.files.values():
            file.view(np.uint8).fill(POISON & 1 if file.dtype == np.bool_ else POISON)
        self.now = 0
        self.count = 0

    def run(self, blocks: Array) -> None:
        """Runs the blocks with these numbers, at most ``self.blocks``, to their end."""
        present = blocks.size * self.block_threads
        index = np.zeros(self.blocks, np.int64)
        index[: blocks.size] = blocks
        for axis, values in zip("xyz", self.block_index(index), strict=True):
            self.specials[f"%ctaid.{axis}"][:] = np.repeat(values, self.block_threads)
        local = np.tile(np.arange(self.block_threads), self.blocks)
        self.who = (np.repeat(index, self.block_threads) * self.block_threads + local).astype("i4")
        self.live = np.arange(self.threads) < present
        self.live_count = present
        self.ragged = False
        self.block_time = np.full(self.threads, self.now, np.int32)
        self.warp_time = self.block_time
        self.shared.reset()
        self.copies.reset()
        self.ready, self.at_barrier, self.at_collective = {0: self.live}, {}, {}
        while self.ready:
            self._advance()
        self._check_end()

    def _advance(self) -> None:
        """Runs the threads at the lowest pc until they part, stop or meet others."""
        start = min(self.ready)
        self.activate(self.ready.pop(start))
        pc: int | None = start
        while pc is not None:
            segment = self.segments.get(pc)
            if segment is None:
                raise PtxError(f"{self.kernel.name}: the code ends without ret")
            for step in segment.steps or self._bind(segment):
                step()
            self.count += segment.end - segment.first
            pc = segment.end
            if segment.leave is not None:
                self.count += 1
                pc = segment.leave(pc)
            if pc is not None and self.ready and pc >= min(self.ready):
                self.park(pc, self.mask)
                pc = None

    def _bind(self, segment: Segment) -> list[Step]:
        """Binds the instructions of a segment when it is first executed."""
        if segment.steps is None:
            code = self.kernel.code
            segment.steps = []
            for place in range(segment.first, segment.end):
                step = bind(self, code[place])
                assert not isinstance(step, Control)
                segment.steps.append(step)
            if segment.control:
                bound = bind(self, code[segment.end])
                assert isinstance(bound, Control)
                segment.leave = bound.at
        return segment.steps

    def park(self, pc: int, mask: Array) -> None:
        """Threads in ``mask`` are to go on at ``pc`` when it is their turn."""
        if pc in self.ready:
            mask = mask | self.ready[pc]
        self.ready[pc] = mask

    def meet(self, mask: Array, *, block: bool) -> None:
        """The threads in ``mask``, whole blocks or whole warps, have met at a barrier."""
        self.now += 1
        self.warp_time = np.where(mask, np.int32(self.now), self.warp_time)
        if block:
            self.block_time = np.where(mask, np.int32(self.now), self.block_time)
            if (mask | ~self.live).all():
                self.shared.shadow.forget_reads()
        self._access = None

    def fence(self) -> None:
        """The active threads have passed a memory fence."""
        self.now += 1
        self.memory.fence(self.now, self.access)

    def _check_end(self) -> None:
        """After all threads that could run have run: does any wait in vain?"""
        code = self.kernel.code
        if self.at_collective:
            pc, mask = min(self.at_collective.items())
            self.at = code[pc]
            raise self.failure("not all lanes that the instruction needs come here", self.who[mask])
        if self.at_barrier:
            pc, mask = min(self.at_barrier.items())
            self.at = code[pc]
            block = np.repeat(mask.reshape(-1, self.block_threads).any(1), self.block_threads)
            elsewhere = any(
                (other & block).any() for p, other in self.at_barrier.items() if p != pc
            )
            if elsewhere:
                raise self.failure("divergent barrier: others wait elsewhere", self.who[mask])
            raise self.failure("barrier after other threads have left", self.who[mask])
        if self.copies.flying:
            access = self.copies.flying[0].access
            raise self.failure("the kernel ends with a cp.async in flight", access.who)


def _specials(block: tuple[int, int, int], blocks: int) -> dict[str, Array]:
    """The special registers; those of the grid are filled in later."""
    x, y, z = block
    index = np.tile(np.arange(x * y * z, dtype=np.uint32), blocks)
    lane = index % WARP
    one, full = np.uint32(1), np.uint32(0xFFFFFFFF)
    values = {
        "%tid.x": index % x,
        "%tid.y": index // x % y,
        "%tid.z": index // (x * y),
        "%laneid": lane,
        "%lanemask_eq": one << lane,
        "%lanemask_lt": (one << lane) - one,
        "%lanemask_le": full >> (np.uint32(31) - lane),
        "%lanemask_gt": ~(full >> (np.uint32(31) - lane)),
        "%lanemask_ge": ~((one << lane) - one),
        "WARP_SZ": np.full_like(index, WARP),
    }
    for axis, extent in zip("xyz", block, strict=True):
        values[f"%ntid.{axis}"] = np.full_like(index, extent)
    for name in ("%ctaid.", "%nctaid."):
        values |= {name + axis: np.zeros_like(index) for axis in "xyz"}
    values["%dynamic_smem_size"] = np.zeros_like(index)
    return {name: np.ascontiguousarray(array, DTYPES["u32"]) for name, array in values.items()}


def _segments(kernel: Kernel) -> dict[int, Segment]:
    controls = {i for i, instruction in enumerate(kernel.code) if is_control(instruction)}
    starts = sorted({0, *kernel.labels.values(), *(i + 1 for i in controls)})
    segments = {pc: Segment(pc, pc, True) for pc in controls}
    for first, following in zip(starts, [*starts[1:], len(kernel.code)], strict=True):
        if first < following:
            control = following - 1 in controls
            segments[first] = Segment(first, following - control, control)
    return segments
