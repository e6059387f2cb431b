# SPDX-License-Identifier: Apache-2.0
"""Global and shared memory: data, bounds, alignment, and a shadow of each."""

from collections.abc import Iterable

import numpy as np

from .arguments import Uninitialised, array_of, place_of
from .dtypes import RAW, Array
from .errors import PtxError
from .shadow import Access, Shadow

# Each buffer has a range of addresses of its own, with room on both sides: an index that is out of
# bounds of one buffer never falls into another.
RANGE_BITS = 40
MIDDLE = 1 << 30
# Where generic addresses mean shared memory.
SHARED_WINDOW = 1 << 62


def address_of(number: int) -> int:
    """Where the buffer with this number among those of a launch begins; tables come first."""
    return ((number + 1) << RANGE_BITS) + MIDDLE


class Cells:
    """Bytes seen as rows of ``count`` elements of ``size`` bytes."""

    def __init__(self, data: Array) -> None:
        """Of the bytes ``data``."""
        self.data = data
        self.views: dict[tuple[int, int], Array] = {}

    def rows(self, size: int, count: int) -> Array:
        """[n, count] elements, or [n] if ``count`` is 1."""
        view = self.views.get((size, count))
        if view is None:
            whole = self.data[: self.data.size // (size * count) * (size * count)]
            view = whole.view(RAW[size])
            view = self.views[size, count] = view if count == 1 else view.reshape(-1, count)
        return view


def granules(offset: Array, length: int, size: int) -> tuple[Array, int]:
    """The granules of ``size`` bytes that ``length`` bytes touch: rows of so many granules."""
    if length <= size:
        return offset >> (size.bit_length() - 1), 1
    return offset >> (length.bit_length() - 1), length // size


class Buffer(Cells):
    """An array of the caller in global memory."""

    def __init__(self, argument: Array | Uninitialised, number: int) -> None:
        """The buffer with the given ``number`` among those of the launch."""
        array = array_of(argument)
        if not array.flags.c_contiguous or not array.flags.writeable:
            raise PtxError("an array argument must be contiguous and writeable")
        super().__init__(array.reshape(-1).view(np.uint8))
        self.place = place_of(array)
        self.number = number
        self.base = np.uint64(address_of(number))
        self.written = Cells(argument.written) if isinstance(argument, Uninitialised) else None
        self.shadow: Shadow

    def offset(self, address: Array, length: int) -> Array | None:
        """Offsets of the accesses in the buffer, or None if not all are allowed."""
        offset: Array = address - self.base
        if int(offset.max()) > self.data.size - length:
            return None
        return None if int(np.bitwise_or.reduce(offset)) & (length - 1) else offset.view(np.int64)

    def refusal(self, address: Array, length: int, access: Access) -> Exception:
        """Why ``offset`` does not allow the accesses, all of which are in this buffer's range."""
        offset = (address - self.base).view(np.int64)
        bad = (offset < 0) | (offset > self.data.size - length)
        if bad.any():
            text = f"{length} bytes at offset {offset[bad][0]} of array {self.number}, which has "
            text += f"{self.data.size} bytes"
            return access.fail(f"global access out of bounds: {text}", access.who[bad])
        bad = offset % length != 0
        return access.fail(f"misaligned global access of {length} bytes", access.who[bad])

    def check_written(self, offset: Array, size: int, count: int, access: Access) -> None:
        """Refuses to read what nobody has written."""
        if self.written is None:
            return
        rows = self.written.rows(size, count)[offset >> ((size * count).bit_length() - 1)]
        bad = rows != RAW[size](int.from_bytes(b"\1" * size, "little"))
        if bad.any():
            lanes = bad.reshape(offset.size, -1).any(1)
            raise access.fail(
                f"global memory read that nobody has written (array {self.number}, offset "
                f"{int(offset[lanes][0])})",
                access.who[lanes],
            )


class GlobalMemory:
    """The arrays of a launch."""

    def __init__(self, arguments: Iterable[Array | Uninitialised], shared_buffers: Iterable[Array]):
        """Of all array arguments; ``shared_buffers`` are exchanged between blocks on purpose."""
        self.buffers = [Buffer(argument, number) for number, argument in enumerate(arguments)]
        self.places = {buffer.place: buffer for buffer in self.buffers}
        self.shared = {place_of(array_of(array)) for array in shared_buffers}
        if not self.shared <= self.places.keys():
            raise PtxError("an array of shared_buffers is not an argument of the launch")
        spans = sorted(
            (buffer.data.ctypes.data, buffer.data.size)
            for buffer in self.buffers
            if buffer.data.size
        )
        for (start, size), (following, _) in zip(spans, spans[1:], strict=False):
            if start + size > following:
                raise PtxError("two array arguments overlap")
        self.granule = 4

    def start(self, granule: int, block_threads: int, blocks: int) -> None:
        """Begins a launch whose narrowest access has ``granule`` bytes."""
        self.granule = granule
        self.block_threads = block_threads
        fences = np.zeros(blocks, np.int32)  # the time of each block's last fence
        self.fences = fences
        for buffer in self.buffers:
            across = buffer.place in self.shared
            size = -(-buffer.data.size // granule)
            buffer.shadow = Shadow(
                f"array {buffer.number}",
                size,
                block_threads,
                private=False,
                fences=fences if across else None,
            )

    def address(self, array: Array) -> int:
        """The device address of an array argument."""
        return int(self.places[place_of(array)].base)

    def locate(
        self, address: Array, length: int, access: Access
    ) -> list[tuple[Buffer, Array, Access, Array | None]]:
        """Splits accesses by buffer: buffer, offsets, who, which of the threads (None: all)."""
        number = (int(address[0]) >> RANGE_BITS) - 1
        if 0 <= number < len(self.buffers):
            buffer = self.buffers[number]
            offset = buffer.offset(address, length)
            if offset is not None:
                return [(buffer, offset, access, None)]
        parts: list[tuple[Buffer, Array, Access, Array | None]] = []
        numbers = (address >> np.uint64(RANGE_BITS)).astype(np.int64) - 1
        for number in np.unique(numbers):
            lanes = np.flatnonzero(numbers == number)
            who = access.part(lanes)
            if not 0 <= number < len(self.buffers):
                where = f"{int(address[lanes[0]]):#x}"
                raise access.fail(f"global access at {where}, which is in no array", who.who)
            buffer = self.buffers[number]
            offset = buffer.offset(address[lanes], length)
            if offset is None:
                raise buffer.refusal(address[lanes], length, who)
            parts.append((buffer, offset, who, lanes))
        return parts

    def fence(self, now: int, access: Access) -> None:
        """What the blocks of the threads have written is visible to others from now on."""
        self.fences[access.who // self.block_threads] = now

    def load(
        self,
        address: Array,
        size: int,
        count: int,
        now: int,
        access: Access,
        constant: bool = False,
        strong: bool = False,
    ) -> Array:
        """Reads ``count`` elements of ``size`` bytes a thread; [n] or [n, count].

        ``constant``: through the read-only cache. ``strong``: in order with atomic operations.
        """
        length = size * count
        shift = length.bit_length() - 1
        result = None
        for buffer, offset, who, lanes in self.locate(address, length, access):
            touched, each = granules(offset, length, self.granule)
            if constant:
                buffer.shadow.read_constant(touched, each, who)
            elif strong:
                buffer.shadow.atomic(touched, each, now, who)
            else:
                buffer.shadow.read(touched, each, now, who)
            buffer.check_written(offset, size, count, who)
            rows: Array = buffer.rows(size, count)[offset >> shift]
            if lanes is None:
                return rows
            if result is None:
                result = np.zeros((address.size, *rows.shape[1:]), rows.dtype)
            result[lanes] = rows
        assert result is not None
        return result

    def store(
        self,
        address: Array,
        values: Array,
        size: int,
        now: int,
        access: Access,
        strong: bool = False,
    ) -> None:
        """Writes values, [n] or [n, count] elements of ``size`` bytes."""
        count = 1 if values.ndim == 1 else values.shape[1]
        length = size * count
        for buffer, offset, who, lanes in self.locate(address, length, access):
            touched, each = granules(offset, length, self.granule)
            (buffer.shadow.atomic if strong else buffer.shadow.write)(touched, each, now, who)
            row = offset >> (length.bit_length() - 1)
            buffer.rows(size, count)[row] = values if lanes is None else values[lanes]
            if buffer.written is not None:
                buffer.written.rows(1, length)[row] = 1

    def atomic(
        self, address: Array, size: int, now: int, access: Access
    ) -> list[tuple[Array, Array, Array | slice]]:
        """For atomic operations: cells, places among them, and which of the threads."""
        parts: list[tuple[Array, Array, Array | slice]] = []
        for buffer, offset, who, lanes in self.locate(address, size, access):
            touched, each = granules(offset, size, self.granule)
            buffer.shadow.atomic(touched, each, now, who)
            buffer.check_written(offset, size, 1, who)
            row = offset >> (size.bit_length() - 1)
            parts.append((buffer.rows(size, 1), row, slice(None) if lanes is None else lanes))
        return parts


class SharedMemory(Cells):
    """The shared memory of the blocks that run together; addresses count from each one's start."""

    def __init__(self, size: int, blocks: int, block_threads: int, granule: int) -> None:
        """``size`` bytes for each of ``blocks``."""
        self.size = size
        self.stride = -(-size // 128) * 128
        super().__init__(np.empty(self.stride * blocks, np.uint8))
        self.granule = granule
        self.shadow = Shadow(
            "shared memory", self.data.size // granule, block_threads, private=True
        )
        self.start = np.repeat(np.arange(blocks, dtype=np.int64) * self.stride, block_threads)
        self.reset()

    def reset(self) -> None:
        """New blocks begin; as float or half what they find is NaN."""
        self.data.fill(0xFF)
        self.shadow.reset()

    def offset(
        self, address: Array, length: int, access: Access, lanes: Array | slice, align: int = 0
    ) -> Array:
        """Offsets in ``data`` of accesses by the given ``lanes``."""
        if int(address.max()) > self.size - length:
            bad = address.astype(np.int64) > self.size - length
            raise access.fail(
                f"shared access out of bounds: {length} bytes at offset "
                f"{int(address[bad][0].astype(np.int32))} of {self.size}",
                access.who[bad],
            )
        align = align or length
        if int(np.bitwise_or.reduce(address)) & (align - 1):
            bad = address & np.uint32(align - 1) != 0
            raise access.fail(f"misaligned shared access of {length} bytes", access.who[bad])
        return self.start[lanes] + address

    def load(
        self,
        address: Array,
        size: int,
        count: int,
        now: int,
        access: Access,
        lanes: Array | slice,
        strong: bool = False,
    ) -> Array:
        """Reads ``count`` elements of ``size`` bytes a thread; [n] or [n, count]."""
        length = size * count
        offset = self.offset(address, length, access, lanes)
        touched, each = granules(offset, length, self.granule)
        (self.shadow.atomic if strong else self.shadow.read)(touched, each, now, access)
        rows: Array = self.rows(size, count)[offset >> (length.bit_length() - 1)]
        return rows

    def store(
        self,
        address: Array,
        values: Array,
        size: int,
        now: int,
        access: Access,
        lanes: Array | slice,
    ) -> None:
        """Writes values, [n] or [n, count] elements of ``size`` bytes."""
        count = 1 if values.ndim == 1 else values.shape[1]
        length = size * count
        offset = self.offset(address, length, access, lanes)
        touched, each = granules(offset, length, self.granule)
        self.shadow.write(touched, each, now, access)
        self.rows(size, count)[offset >> (length.bit_length() - 1)] = values

    def atomic(
        self, address: Array, size: int, now: int, access: Access, lanes: Array | slice
    ) -> tuple[Array, Array, Array | slice]:
        """For atomic operations: cells, places among them, and which of the threads."""
        offset = self.offset(address, size, access, lanes)
        touched, each = granules(offset, size, self.granule)
        self.shadow.atomic(touched, each, now, access)
        return self.rows(size, 1), offset >> (size.bit_length() - 1), slice(None)
