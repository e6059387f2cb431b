# SPDX-License-Identifier: Apache-2.0
"""Asynchronous copies to shared memory: in flight from cp.async until the thread has waited."""

from dataclasses import dataclass

import numpy as np

from .dtypes import Array
from .memory import SharedMemory, granules
from .shadow import Access


@dataclass(slots=True)
class _Copy:
    lanes: Array
    group: Array  # which of each thread's groups it belongs to
    offset: Array  # in shared memory
    data: Array  # [n, words]
    access: Access

    def part(self, which: Array) -> "_Copy":
        """The copies of some of the threads."""
        lanes, group, offset = self.lanes[which], self.group[which], self.offset[which]
        return _Copy(lanes, group, offset, self.data[which], self.access.part(which))

    def land(self, shared: SharedMemory, now: int) -> None:
        """The data is there."""
        count = self.data.shape[1]
        row = self.offset >> ((4 * count).bit_length() - 1)
        shared.rows(4, count)[row] = self.data if count > 1 else self.data[:, 0]
        shared.shadow.finish_copy(*granules(self.offset, 4 * count, shared.granule), now)


class Copies:
    """The copies in flight. Data lands when it is waited for, never before."""

    def __init__(self, threads: int) -> None:
        """None are in flight."""
        self.committed = np.zeros(threads, np.int64)  # groups that each thread has closed
        self.flying: list[_Copy] = []

    def reset(self) -> None:
        """New blocks begin."""
        self.committed.fill(0)
        self.flying.clear()

    def issue(
        self,
        shared: SharedMemory,
        lanes: Array,
        address: Array,
        data: Array,
        now: int,
        access: Access,
    ) -> None:
        """Copies ``data``, [n, words], to the shared ``address`` of each of the threads."""
        length = 4 * data.shape[1]
        offset = shared.offset(address, length, access, lanes)
        shared.shadow.issue_copy(*granules(offset, length, shared.granule), now, access)
        self.flying.append(_Copy(lanes, self.committed[lanes], offset, data, access))

    def commit(self, lanes: Array | slice) -> None:
        """Closes the group of each of the threads."""
        self.committed[lanes] += 1

    def wait(self, shared: SharedMemory, mask: Array, pending: int, now: int) -> None:
        """The threads in ``mask`` wait until at most ``pending`` of their groups are in flight."""
        # The first group of each thread that stays in flight; of threads that do not wait, all.
        limit = np.where(mask, self.committed - pending, 0)
        still = []
        for copy in self.flying:
            done = copy.group < limit[copy.lanes]
            count = int(np.count_nonzero(done))
            if count == done.size:
                copy.land(shared, now)
            elif count:
                copy.part(done).land(shared, now)
                still.append(copy.part(~done))
            else:
                still.append(copy)
        self.flying = still
