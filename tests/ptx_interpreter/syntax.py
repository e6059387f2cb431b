# SPDX-License-Identifier: Apache-2.0
"""What the parser makes of PTX: kernels, instructions, operands."""

from dataclasses import dataclass, field
from typing import Any

from .dtypes import Array
from .errors import PtxError


@dataclass(frozen=True, slots=True)
class Register:
    """A declared register: row ``index`` of the register file of its size."""

    name: str
    size: int  # bytes; 0 for a predicate
    index: int


@dataclass(frozen=True, slots=True)
class Constant:
    """A number, as written."""

    text: str


@dataclass(frozen=True, slots=True)
class Special:
    """A read-only register of the hardware, such as %tid.x."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A shared variable, a parameter or a label."""

    name: str


@dataclass(frozen=True, slots=True)
class Address:
    """A memory operand ``[base + offset]``."""

    base: "Register | Symbol"
    offset: int


@dataclass(frozen=True, slots=True)
class Vector:
    """Operands in braces."""

    items: "tuple[Operand, ...]"


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results, ``p|q``."""

    first: "Operand"
    second: "Operand"


@dataclass(frozen=True, slots=True)
class Negated:
    """A predicate operand with an exclamation mark."""

    register: Register


@dataclass(frozen=True, slots=True)
class Sink:
    """The operand ``_``: a result that nobody wants."""


Operand = Register | Constant | Special | Symbol | Address | Vector | Pair | Negated | Sink


@dataclass(slots=True)
class Instruction:
    """One instruction and where it was written."""

    text: str
    head: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...]
    predicate: Register | None
    negated: bool
    where: str
    kernel: "Kernel"

    @property
    def opcode(self) -> str:
        """The whole opcode, with its modifiers."""
        return ".".join((self.head, *self.modifiers))

    def error(self, problem: str) -> PtxError:
        """An exception that names the line and the instruction."""
        return PtxError(f"{problem}; {self.where}, kernel {self.kernel.name}: {self.text}")

    def unknown(self) -> PtxError:
        """The exception for an instruction that the interpreter does not know."""
        return self.error(f"not known: {self.opcode}")

    def expect(self, *counts: int) -> None:
        """Refuses another number of operands than one of ``counts``."""
        if len(self.operands) not in counts:
            raise self.error(f"not known: {self.opcode} with {len(self.operands)} operands")


@dataclass(frozen=True, slots=True)
class Parameter:
    """A kernel parameter: a value, or bytes if it is a structure passed by value."""

    name: str
    type_name: str
    align: int
    size: int
    offset: int
    is_struct: bool


@dataclass(frozen=True, slots=True)
class SharedVariable:
    """A variable in shared memory; ``size`` is None for the one of dynamic size."""

    align: int
    size: int | None


@dataclass(slots=True)
class Kernel:
    """A parsed kernel.

    ``problems`` are statements that the parser did not understand; ``cache`` holds what launches
    have prepared for the next one.
    """

    name: str
    target: int
    parameters: list[Parameter] = field(default_factory=list)
    code: list[Instruction] = field(default_factory=list)
    labels: dict[str, int] = field(default_factory=dict)
    shared: dict[str, SharedVariable] = field(default_factory=dict)
    tables: dict[str, Array] = field(default_factory=dict)  # initialised memory of the module
    registers: dict[int, int] = field(default_factory=dict)  # size -> number of registers
    max_threads: int | None = None
    problems: list[PtxError] = field(default_factory=list)
    cache: dict[Any, Any] = field(default_factory=dict)

    @property
    def parameter_bytes(self) -> int:
        """The size of all parameters together."""
        return max((p.offset + p.size for p in self.parameters), default=0)

    def shared_layout(self) -> tuple[dict[str, int], int]:
        """Offsets of the shared variables, and where the dynamic part begins.

        Static variables come first, as the hardware's tools place them.
        """
        offsets, end = {}, 0
        for name, variable in self.shared.items():
            if variable.size is not None:
                end = -(-end // variable.align) * variable.align
                offsets[name] = end
                end += variable.size
        dynamic = [(name, v.align) for name, v in self.shared.items() if v.size is None]
        for _, align in dynamic:
            end = -(-end // align) * align
        return offsets | {name: end for name, _ in dynamic}, end
