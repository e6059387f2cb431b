# SPDX-License-Identifier: Apache-2.0
"""Arguments of a launch: arrays, numbers, structures passed by value."""

import struct
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from .dtypes import DTYPES, Array
from .errors import PtxError
from .syntax import Parameter


class Uninitialised:
    """Device memory that nobody has written yet; reading an unwritten byte of it is an error.

    What launches have written is remembered from one launch to the next.
    """

    def __init__(self, array: Array) -> None:
        """Wraps ``array``, whose contents count as garbage."""
        self.array = array
        self.written = np.zeros(array.nbytes, np.uint8)  # 1: written


class Struct:
    """A structure as C lays it out: members in order, each at a multiple of its alignment.

    A member is an array or an ``Uninitialised`` (a device pointer), None (a null pointer), a numpy
    scalar, a nested ``Struct``, or a sequence of members (an array member).
    """

    def __init__(self, members: Iterable[Any]) -> None:
        """Lays out ``members``."""
        self.members: list[tuple[int, Any]] = []
        self.align, end = 1, 0
        for member in members:
            if isinstance(member, list | tuple):
                member = Struct(member)
            size, align = _extent(member)
            end = -(-end // align) * align
            self.members.append((end, member))
            self.align = max(self.align, align)
            end += size
        self.size = -(-end // self.align) * self.align


Argument = Any  # an array, an Uninitialised, None, a Struct, a numpy scalar or a Python number


def _extent(member: Any) -> tuple[int, int]:
    """Size and alignment of a member."""
    if isinstance(member, Struct):
        return member.size, member.align
    if member is None or isinstance(member, np.ndarray | Uninitialised):
        return 8, 8
    if isinstance(member, np.generic):
        return member.itemsize, member.itemsize
    raise PtxError(f"a member of a Struct must have a numpy type, not be {member!r}")


def pointers(arguments: Iterable[Argument]) -> list[Array | Uninitialised]:
    """The arrays among the arguments and in their structures, each once."""
    found: dict[tuple[int, int], Array | Uninitialised] = {}

    def visit(argument: Argument) -> None:
        if isinstance(argument, Struct):
            for _, member in argument.members:
                visit(member)
        elif isinstance(argument, np.ndarray | Uninitialised):
            found.setdefault(place_of(array_of(argument)), argument)

    for argument in arguments:
        visit(argument)
    return list(found.values())


def place_of(array: Array) -> tuple[int, int]:
    """Which memory the array is: two array objects may be one."""
    return array.__array_interface__["data"][0], array.nbytes


def array_of(argument: Array | Uninitialised) -> Array:
    """The array itself."""
    return argument.array if isinstance(argument, Uninitialised) else argument


def pack(
    parameters: list[Parameter], arguments: Iterable[Argument], address: Callable[[Array], int]
) -> bytes:
    """The bytes of all parameters. ``address`` gives the device address of an array."""
    arguments = list(arguments)
    if len(arguments) != len(parameters):
        raise PtxError(f"{len(arguments)} arguments for {len(parameters)} parameters")
    packed = bytearray(max((p.offset + p.size for p in parameters), default=0))
    for parameter, argument in zip(parameters, arguments, strict=True):
        data = _bytes_of(_typed(argument, parameter), address)
        align = argument.align if isinstance(argument, Struct) else parameter.align
        if len(data) != parameter.size or align != parameter.align:
            raise PtxError(
                f"{parameter.name} has {parameter.size} bytes aligned to {parameter.align}, "
                f"its argument {len(data)} aligned to {align}"
            )
        packed[parameter.offset : parameter.offset + len(data)] = data
    return bytes(packed)


def _typed(argument: Argument, parameter: Parameter) -> Argument:
    if isinstance(argument, bool | int | float) and not isinstance(argument, np.generic):
        if parameter.is_struct or isinstance(argument, float) != (parameter.type_name[0] == "f"):
            raise PtxError(f"{parameter.name} wants a numpy scalar, not {argument!r}")
        if parameter.type_name[0] == "f":
            return DTYPES[parameter.type_name](argument)
        bits = 8 * parameter.size
        if not -(1 << (bits - 1)) <= argument < 1 << bits:
            raise PtxError(f"{parameter.name} has {bits} bits, {argument} does not fit")
        return np.array(argument % (1 << bits), f"u{parameter.size}")[()]
    if isinstance(argument, np.floating) and parameter.type_name[0] in "us":
        raise PtxError(f"{parameter.name} is an integer, its argument {argument!r}")
    return argument


def _bytes_of(argument: Argument, address: Callable[[Array], int]) -> bytes:
    if isinstance(argument, Struct):
        packed = bytearray(argument.size)
        for offset, member in argument.members:
            data = _bytes_of(member, address)
            packed[offset : offset + len(data)] = data
        return bytes(packed)
    if argument is None:
        return bytes(8)
    if isinstance(argument, np.ndarray | Uninitialised):
        return struct.pack("<Q", address(array_of(argument)))
    if isinstance(argument, np.generic):
        return argument.tobytes()
    raise PtxError(f"not an argument of a kernel: {argument!r}")
