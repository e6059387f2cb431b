# SPDX-License-Identifier: Apache-2.0
"""From an instruction to a function that executes it: the table of opcodes, operands, modifiers.

A handler is called once for each instruction and machine. It looks at every modifier and operand,
refuses what it does not know, and returns a function of no arguments that works on arrays that it
has found by then; or a ``Control``.
"""

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from .dtypes import DTYPES, RAW, SIGNED, SIZES, Array, constant, is_signed
from .errors import PtxError
from .memory import address_of
from .syntax import Address, Constant, Instruction, Negated, Operand, Register, Special, Symbol

if TYPE_CHECKING:
    from .machine import Machine

Step = Callable[[], None]


class Control:
    """An instruction that moves, stops or gathers threads.

    ``at(pc)`` gives the next pc of the active threads, or None if there are none any more. It may
    narrow the active threads, having parked the others.
    """

    def __init__(self, at: Callable[[int], int | None], *, own_predicate: bool = False) -> None:
        """``own_predicate``: ``at`` sees to the predicate of the instruction itself."""
        self.at = at
        self.own_predicate = own_predicate


Handler = Callable[["Machine", Instruction], Step | Control]
HANDLERS: dict[str, Handler] = {}
CONTROLS: set[str] = set()


def opcode(*names: str, control: bool = False) -> Callable[[Handler], Handler]:
    """Registers a handler for opcodes that begin with ``names``, up to the first dot."""

    def register(handler: Handler) -> Handler:
        for name in names:
            assert name not in HANDLERS, name
            HANDLERS[name] = handler
            if control:
                CONTROLS.add(name)
        return handler

    return register


def is_control(ins: Instruction) -> bool:
    """Whether the instruction ends a segment."""
    return (
        ins.head in CONTROLS
        or f"{ins.head}.{ins.modifiers[0] if ins.modifiers else ''}" in CONTROLS
    )


def bind(m: "Machine", ins: Instruction) -> Step | Control:
    """The function that executes ``ins`` on ``m``."""
    key = f"{ins.head}.{ins.modifiers[0]}" if ins.modifiers else ins.head
    handler = HANDLERS.get(key) or HANDLERS.get(ins.head)
    if handler is None:
        raise ins.unknown()
    bound = handler(m, ins)
    if ins.predicate is None:
        return bound
    if isinstance(bound, Control):
        return bound if bound.own_predicate else Control(_split(m, ins, bound.at))
    return _guarded(m, ins, bound)


def condition(m: "Machine", ins: Instruction) -> Callable[[], Array]:
    """The active threads for which the predicate of ``ins`` holds."""
    assert ins.predicate is not None
    predicate = m.register(ins.predicate, np.bool_)
    if ins.negated:
        return lambda: np.greater(m.mask, predicate)
    return lambda: np.logical_and(m.mask, predicate)


def _guarded(m: "Machine", ins: Instruction, step: Step) -> Step:
    holds = condition(m, ins)

    def guarded() -> None:
        mask = holds()
        active = int(np.count_nonzero(mask))
        if active == m.active:
            step()
        elif active:
            saved, count = m.mask, m.active
            m.activate(mask, active)
            step()
            m.activate(saved, count)

    return guarded


def _split(
    m: "Machine", ins: Instruction, at: Callable[[int], int | None]
) -> Callable[[int], int | None]:
    holds = condition(m, ins)

    def split(pc: int) -> int | None:
        mask = holds()
        active = int(np.count_nonzero(mask))
        if active == 0:
            return pc + 1
        if active < m.active:
            m.park(pc + 1, m.mask & ~mask)
            m.activate(mask, active)
        return at(pc)

    return split


# ---- operands ------------------------------------------------------------------------------------


def source(m: "Machine", ins: Instruction, operand: Operand, type_name: str) -> Array:
    """The array that holds the operand's value for every thread whenever ``ins`` is executed."""
    dtype = DTYPES[type_name]
    if isinstance(operand, Register):
        if operand.size != (0 if type_name == "pred" else SIZES[type_name]):
            raise ins.error(f"not known: {operand.name} as {type_name}")
        return m.register(operand, dtype)
    if isinstance(operand, Constant):
        try:
            return m.constant(constant(operand.text, type_name))
        except PtxError as problem:
            raise ins.error(str(problem)) from None
    if isinstance(operand, Special) and SIZES[type_name] == 4:
        return m.specials[operand.name].view(dtype)
    if isinstance(operand, Symbol) and SIZES[type_name] in (4, 8):
        return m.constant(np.array(symbol(m, ins, operand), RAW[SIZES[type_name]])[()]).view(dtype)
    raise ins.error(f"not known: operand {operand}")


def symbol(m: "Machine", ins: Instruction, operand: Symbol) -> int:
    """The address of a shared variable, in shared memory, or of a table, in global memory."""
    if operand.name in m.kernel.tables:
        return address_of(list(m.kernel.tables).index(operand.name))
    offsets, _ = m.kernel.shared_layout()
    if operand.name not in offsets:
        raise ins.error(f"not known: symbol {operand.name}")
    return offsets[operand.name]


def target(m: "Machine", ins: Instruction, operand: Operand, type_name: str) -> Array:
    """The array that a result of the type goes to."""
    if not isinstance(operand, Register):
        raise ins.error(f"not known: result in {operand}")
    return source(m, ins, operand, type_name)


def wide_target(m: "Machine", ins: Instruction, operand: Operand, type_name: str) -> Array:
    """The same, of a register that may be wider: then the value is extended by its sign or zero."""
    size = operand.size if isinstance(operand, Register) else 0
    if size < SIZES[type_name]:
        raise ins.error(f"not known: result of type {type_name} in {operand}")
    if size == SIZES[type_name]:
        return target(m, ins, operand, type_name)
    if type_name[0] == "f" or not isinstance(operand, Register):
        raise ins.error(f"not known: result of type {type_name} in {operand}")
    return m.register(operand, (SIGNED if is_signed(type_name) else RAW)[size])


def wide_source(m: "Machine", ins: Instruction, operand: Operand, type_name: str) -> Array:
    """The operand, of a register that may be wider: its low bits, as a strided view."""
    if isinstance(operand, Register) and operand.size > SIZES[type_name]:
        dtype = DTYPES[type_name]
        return m.register(operand, dtype)[:: operand.size // SIZES[type_name]]
    return source(m, ins, operand, type_name)


def predicate(m: "Machine", ins: Instruction, operand: Operand) -> Callable[[], Array]:
    """A predicate operand, which may be negated."""
    if isinstance(operand, Negated):
        values = m.register(operand.register, np.bool_)
        return lambda: np.logical_not(values)
    plain = source(m, ins, operand, "pred")
    return lambda: plain


def address(
    m: "Machine", ins: Instruction, operand: Operand, type_name: str
) -> Callable[[], Array]:
    """A memory operand: gives the addresses of all threads as u32 or u64."""
    if not isinstance(operand, Address):
        raise ins.error(f"not known: {operand} as an address")
    base = source(m, ins, operand.base, type_name)
    if operand.offset == 0:
        return lambda: base
    dtype = DTYPES[type_name]
    offset = m.constant(np.array(operand.offset % (1 << 8 * SIZES[type_name]), dtype)[()])
    return lambda: np.add(base, offset)


# ---- results -------------------------------------------------------------------------------------


def elementwise(m: "Machine", function: Any, result: Array, *sources: Array) -> Step:
    """A step: result = function(*sources) for the active threads; ``function`` is a ufunc."""
    if len(sources) == 1:
        (a,) = sources

        def unary() -> None:
            if m.where is None:
                function(a, out=result)
            else:
                np.putmask(result, m.where, function(a))

        return unary
    a, b = sources

    def binary() -> None:
        if m.where is None:
            function(a, b, out=result)
        else:
            np.putmask(result, m.where, function(a, b))

    return binary


def assign(m: "Machine", result: Array, compute: Callable[..., Array], *sources: Array) -> Step:
    """A step: result = compute(*sources) for the active threads."""

    def step() -> None:
        value = compute(*sources)
        if m.where is None:
            result[:] = value
        else:
            np.putmask(result, m.where, value)

    return step


# ---- modifiers -----------------------------------------------------------------------------------


class Modifiers:
    """The modifiers of an opcode. Each must be asked for by name; ``done`` refuses the rest."""

    def __init__(self, ins: Instruction) -> None:
        """Of ``ins``."""
        self.ins = ins
        self.left = list(ins.modifiers)

    def maybe(self, allowed: Iterable[str]) -> str | None:
        """The modifier among ``allowed``, if there is one."""
        for name in self.left:
            if name in allowed:
                self.left.remove(name)
                return name
        return None

    def one(self, allowed: Iterable[str]) -> str:
        """The modifier among ``allowed`` that must be there."""
        found = self.maybe(allowed)
        if found is None:
            raise self.ins.unknown()
        return found

    def flag(self, name: str) -> bool:
        """Whether the modifier is there."""
        return self.maybe((name,)) is not None

    def type(self, *allowed: str) -> str:
        """The last modifier, a type."""
        if not self.left or self.left[-1] not in allowed:
            raise self.ins.unknown()
        return self.left.pop()

    def exactly(self, *names: str) -> None:
        """The remaining modifiers are these, in this order."""
        if tuple(self.left) != names:
            raise self.ins.unknown()
        self.left = []

    def done(self) -> None:
        """No modifier is left."""
        if self.left:
            raise self.ins.unknown()
