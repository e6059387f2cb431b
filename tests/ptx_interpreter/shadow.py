# SPDX-License-Identifier: Apache-2.0
"""Who touched which memory when: races, unwritten reads, copies in flight.

Time is a counter that advances at every barrier. Of each granule of memory the shadow knows the
last write and the reads and atomic operations that came after. Two accesses of different threads
are in order if a barrier of their block, or of their warp where they share one, lies between them;
anything else is a race, whatever the values were. That does not depend on the order in which the
interpreter happens to run threads.
"""

import functools
from collections.abc import Callable

import numpy as np

from .dtypes import Array

WARP = 32
NOBODY = -1  # as a time: before all others
PENDING = 2**31 - 2  # as the time of a write: a cp.async is in flight
UNWRITTEN = 2**31 - 1
MAX_LOG = 1 << 20


class Access:
    """The threads that access memory: who they are, and since when they are in order."""

    def __init__(
        self,
        fail: Callable[[str, Array], Exception],
        who: Array,
        block_time: Array,
        warp_time: Array,
    ) -> None:
        """``who`` are numbers within the launch; the times are those of the last barriers."""
        self.fail = fail
        self.who = who
        self.block_time = block_time
        self.warp_time = warp_time

    @functools.cached_property
    def oldest(self) -> int:
        """The earliest of the block barriers."""
        return int(self.block_time.min())

    def part(self, lanes: Array) -> "Access":
        """Some of the threads."""
        times = self.block_time[lanes], self.warp_time[lanes]
        return Access(self.fail, self.who[lanes], *times)

    def repeat(self, count: int) -> "Access":
        """The same for ``count`` consecutive granules a thread."""
        if count == 1:
            return self
        times = self.block_time.repeat(count), self.warp_time.repeat(count)
        return Access(self.fail, self.who.repeat(count), *times)


class _Touches:
    """The last unordered accesses of one kind: one thread, and how far the others are spread."""

    def __init__(self, size: int) -> None:
        self.who = np.full(size, NOBODY, np.int32)
        self.time = np.full(size, NOBODY, np.int32)
        self.spread = np.zeros(size, np.int8)  # 0 one thread, 1 one warp, 2 one block, 3 several


class Shadow:
    """The shadow of one memory. ``block_threads`` is the number of threads of a block."""

    def __init__(
        self,
        name: str,
        size: int,
        block_threads: int,
        *,
        private: bool,
        fences: Array | None = None,
    ) -> None:
        """Of ``size`` granules of the memory that messages call ``name``.

        ``private``: each granule belongs to one block, and is unwritten at first (shared memory).
        ``fences``: blocks exchange data here (the "last block" pattern). Accesses of different
        blocks are not compared, but a write must have been followed by a fence of its block, whose
        last time ``fences`` has, when another block reads it.
        """
        size = -(-size // 16) * 16  # so that it can be seen as rows
        self.name = name
        self.block_threads = block_threads
        self.private = private
        self.fences = fences
        self.writer = np.full(size, NOBODY, np.int32)
        self.write_time = np.full(size, UNWRITTEN if private else NOBODY, np.int32)
        self.written = False
        self.reads = _Touches(size)
        self.atomics: _Touches | None = None
        self.read_only: Array | None = None
        # Reads are entered into `reads` when a write wants to know, or many have come together.
        self.log: list[tuple[int, Array, int, Access]] = []
        self.log_size = 0

    def reset(self) -> None:
        """A new block has the memory."""
        self.writer.fill(NOBODY)
        self.write_time.fill(UNWRITTEN if self.private else NOBODY)
        self.reads.time.fill(NOBODY)
        if self.atomics is not None:
            self.atomics.time.fill(NOBODY)
        self.forget_reads()

    def forget_reads(self) -> None:
        """All threads have met at a barrier: no read so far can be unordered with what follows."""
        self.log.clear()
        self.log_size = 0

    # ---- accesses, each of ``count`` granules: a row of so many ----------------------------------

    def read(self, rows: Array, count: int, now: int, access: Access) -> None:
        """Checks a read and remembers it."""
        if self.private or self.written:
            self._after_write(rows, count, access, "read")
        if self.atomics is not None:
            self._after(self.atomics, rows, count, access, "read", "updated atomically")
        self.log.append((now, rows, count, access))
        self.log_size += rows.size * count
        if self.log_size > MAX_LOG:
            self._enter_reads()

    def read_constant(self, rows: Array, count: int, access: Access) -> None:
        """Checks a read through the read-only cache: nobody may write there in this launch."""
        if self.read_only is None:
            self.read_only = np.zeros(self.writer.size, np.bool_)
        for times in (self.write_time, self.atomics.time if self.atomics else None):
            if times is None or not self.written and times is self.write_time:
                continue
            granules, by = _expand(rows, count, access)
            if (touched := times[granules] != NOBODY).any():
                raise access.fail(
                    f"{self.name} read by ld.global.nc, but written in this launch",
                    by.who[touched],
                )
        _rows(self.read_only, count)[rows] = True

    def write(self, rows: Array, count: int, now: int, access: Access) -> None:
        """Checks a write and remembers it."""
        self._after_write(rows, count, access, "written")
        self._before_change(rows, count, access, "written")
        if self.atomics is not None:
            self._after(self.atomics, rows, count, access, "written", "updated atomically")
        self.written = True
        who = access.who if count == 1 else access.who[:, None]
        writer = _rows(self.writer, count)
        writer[rows] = who
        last = writer[rows]
        twice = last != who
        if np.count_nonzero(twice):
            both = np.unique([np.broadcast_to(who, last.shape)[twice], last[twice]])
            raise access.fail(f"race: {self.name} written by two threads at once", both)
        _rows(self.write_time, count)[rows] = now

    def atomic(self, rows: Array, count: int, now: int, access: Access) -> None:
        """Checks an atomic operation, which is in order with other atomic operations."""
        if self.private or self.written:
            self._after_write(rows, count, access, "updated atomically")
        self._before_change(rows, count, access, "updated atomically")
        if self.atomics is None:
            self.atomics = _Touches(self.writer.size)
        self._touch(self.atomics, *_expand(rows, count, access), now)

    def issue_copy(self, rows: Array, count: int, now: int, access: Access) -> None:
        """A cp.async into the granules is under way."""
        self.write(rows, count, now, access)
        self.finish_copy(rows, count, PENDING)

    def finish_copy(self, rows: Array, count: int, now: int) -> None:
        """The thread that issued the copy has waited for it; for others it is a write like any."""
        _rows(self.write_time, count)[rows] = now

    # ---- order -----------------------------------------------------------------------------------

    def _unordered(self, prior: Array, time: Array, spread: Array | int, access: Access) -> Array:
        """Whether accesses by ``prior`` at ``time`` are in no order with those of now."""
        who = access.who
        block = prior // self.block_threads == who // self.block_threads
        warp = (prior // WARP == who // WARP) & (np.less_equal(spread, 1))
        horizon = np.where(warp, access.warp_time, np.where(block, access.block_time, 0))
        if not self.private:
            horizon[np.greater(spread, 2) & block] = 0
        clash: Array = (time >= horizon) & ((prior != who) | np.greater(spread, 0))
        if self.fences is not None:
            clash &= block & np.less_equal(spread, 2)
        return clash

    def _settled(self, times: Array, access: Access) -> bool:
        """Whether all happened before the last barrier: the common case, at one stroke."""
        latest = int(times.max())
        return latest < access.oldest if self.private else latest == NOBODY

    def _after_write(self, rows: Array, count: int, access: Access, verb: str) -> None:
        times = _rows(self.write_time, count)[rows]
        if self._settled(times, access) or verb == "written" and int(times.min()) == UNWRITTEN:
            return
        granules, access = _expand(rows, count, access)
        time = times.ravel()
        if self.private:
            pending = time == PENDING
            if pending.any():
                text = "read before its cp.async has been waited for"
                if verb != "read":
                    text = f"{verb} while a cp.async into it is in flight"
                raise access.fail(f"race: {self.name} {text}", access.who[pending])
            unwritten = time == UNWRITTEN
            if verb != "written" and unwritten.any():
                raise access.fail(f"{self.name} read before it was written", access.who[unwritten])
            time = np.where(unwritten, NOBODY, time)
        prior = self.writer[granules]
        if self.fences is not None and verb == "read":
            block = prior // self.block_threads
            hidden = (time != NOBODY) & (time >= self.fences[block])
            hidden &= block != access.who // self.block_threads
            if hidden.any():
                raise access.fail(
                    f"race: {self.name} read after another block has written it without a fence",
                    access.who[hidden],
                )
        clash = self._unordered(prior, time, 0, access)
        if clash.any():
            self._race(access, clash, prior, verb, "written")

    def _before_change(self, rows: Array, count: int, access: Access, verb: str) -> None:
        if self.read_only is not None:
            granules, by = _expand(rows, count, access)
            if (bad := self.read_only[granules]).any():
                raise access.fail(
                    f"{self.name} {verb}, but read by ld.global.nc in this launch", by.who[bad]
                )
        self._enter_reads()
        self._after(self.reads, rows, count, access, verb, "read")

    def _after(
        self, touches: _Touches, rows: Array, count: int, access: Access, verb: str, before: str
    ) -> None:
        if self._settled(_rows(touches.time, count)[rows], access):
            return
        granules, access = _expand(rows, count, access)
        prior = touches.who[granules]
        time, spread = touches.time[granules], touches.spread[granules]
        clash = self._unordered(prior, time, spread, access)
        if clash.any():
            self._race(access, clash, prior, verb, before)

    def _race(self, access: Access, clash: Array, prior: Array, verb: str, before: str) -> None:
        first = int(np.flatnonzero(clash)[0])
        block, thread = divmod(int(prior[first]), self.block_threads)
        place = f"thread {thread}"
        if block != int(access.who[first]) // self.block_threads:
            place = f"another block (number {block})"
        text = f"race: {self.name} {verb} after {place} has {before} it, with no barrier between"
        raise access.fail(text, access.who[clash])

    # ---- reads and atomics -----------------------------------------------------------------------

    def _enter_reads(self) -> None:
        self.log_size = 0
        while self.log:
            now = self.log[0][0]
            end = next((i for i, e in enumerate(self.log) if e[0] != now), len(self.log))
            batch = [_expand(rows, count, access) for _, rows, count, access in self.log[:end]]
            del self.log[:end]
            granules, access = batch[0]
            if end > 1:
                granules = np.concatenate([granules for granules, _ in batch])
                access = Access(
                    access.fail,
                    np.concatenate([access.who for _, access in batch]),
                    np.concatenate([access.block_time for _, access in batch]),
                    np.concatenate([access.warp_time for _, access in batch]),
                )
            self._touch(self.reads, granules, access, now)

    def _touch(self, touches: _Touches, granules: Array, access: Access, now: int) -> None:
        who = access.who
        prior, time = touches.who[granules], touches.time[granules]
        spread = np.where(time == NOBODY, 0, touches.spread[granules]).astype(np.int8)
        # What is in order with this access need not be remembered beside it.
        keep = self._unordered(prior, time, spread, access) & (time != NOBODY)
        spread = np.where(keep, np.maximum(spread, self._distance(prior, who)), 0)
        touches.spread[granules] = spread
        touches.who[granules] = who
        touches.time[granules] = now
        others = touches.who[granules] != who
        if others.any():
            where, mine = granules[others], who[others]
            distance = self._distance(touches.who[where], mine).astype(np.int8)
            np.maximum.at(touches.spread, where, distance)

    def _distance(self, one: Array, other: Array) -> Array:
        """0: the same thread, 1: of the same warp, 2: of the same block, 3: of different ones."""
        different: Array = (one != other).astype(np.int8)
        different += one // WARP != other // WARP
        different += one // self.block_threads != other // self.block_threads
        return different


def _rows(values: Array, count: int) -> Array:
    return values if count == 1 else values.reshape(-1, count)


def _expand(rows: Array, count: int, access: Access) -> tuple[Array, Access]:
    """The granules of the rows one by one, and who touches each."""
    if count == 1:
        return rows, access
    return (rows[:, None] * count + np.arange(count)).ravel(), access.repeat(count)
