# SPDX-License-Identifier: Apache-2.0
"""Text of a PTX module -> its kernels.

Written for what nvcc emits, one kernel after another with inline assembler between braces. What is
not recognised in a kernel is an error when that kernel is launched; what is outside of kernels
(debug sections, functions, most variables) is passed over, and a kernel that refers to it fails.
"""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from .dtypes import SIZES, Array, is_constant
from .errors import PtxError
from .syntax import (
    Address,
    Constant,
    Instruction,
    Kernel,
    Negated,
    Operand,
    Pair,
    Parameter,
    Register,
    SharedVariable,
    Sink,
    Special,
    Symbol,
    Vector,
)

SPECIALS = {
    *(f"%{name}.{axis}" for name in ("tid", "ntid", "ctaid", "nctaid") for axis in "xyz"),
    "%laneid",
    *(f"%lanemask_{name}" for name in ("eq", "lt", "le", "gt", "ge")),
    "%dynamic_smem_size",
    "WARP_SZ",
}

_FILE = re.compile(r'\s*\.file\s+(\d+)\s+"(?:[^"]*/)?([^"/]+)"')
_LOC = re.compile(r"\.loc\s+(\d+)\s+(\d+)\s+\d+")
_ENTRY = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.entry\s+([\w$]+)")
_FUNCTION = re.compile(r"(?:\.visible\s+|\.weak\s+)*\.func\b")
_PARAMETER = re.compile(
    r"\.param\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+(?:\.ptr\s+(?:\.\w+\s+)?(?:\.align\s+\d+\s+)?)?"
    r"([\w$]+)(?:\[(\d+)\])?"
)
_SHARED = re.compile(
    r"(\.extern\s+)?\.shared\s+(?:\.align\s+(\d+)\s+)?\.(\w+)\s+([\w$]+)(?:\[(\d*)\])?"
)
# A table of numbers in global memory, such as the compiler's own of polynomials.
_TABLE = re.compile(r"\.global\s+\.align\s+\d+\s+\.b8\s+([\w$]+)\[(\d+)\]\s*=\s*\{([\d,\s]+)\};")
_THREADS = re.compile(r"\.(?:maxntid|reqntid)\s+(\d+)(?:\s*,\s*(\d+))?(?:\s*,\s*(\d+))?")
_DIRECTIVES = re.compile(r"\.(?:maxntid|reqntid)\s+[\d\s,]+|\.minnctapersm\s+\d+|\.maxnreg\s+\d+")
_LABEL = re.compile(r"([$\w]+)\s*:(?!:)\s*")
_INSTRUCTION = re.compile(r"(?:@(!?)([%$\w]+)\s+)?([a-z]\S*)\s*(.*)", re.DOTALL)
_OPCODE = re.compile(r"([a-z][a-z0-9_]*)((?:\.[A-Za-z0-9_:]+)*)")
_DECLARED = re.compile(r"([%$\w]+)(?:<(\d+)>)?")
_REGISTER = re.compile(r"([%$\w]*?)(\d+)")
_ADDRESS = re.compile(r"([%$\w.]+)\s*(?:\+\s*(-?\d+))?")


class Module(dict[str, Kernel]):
    """The kernels of a module by their mangled names."""

    def find(self, *fragments: str) -> Kernel:
        """The one kernel whose name contains all ``fragments``."""
        names = [name for name in self if all(fragment in name for fragment in fragments)]
        if len(names) != 1:
            raise PtxError(
                f"{len(names)} kernels are named like {fragments}: {names or list(self)}"
            )
        return self[names[0]]


def parse(text: str | Path) -> Module:
    """The kernels of a module, given as text or as the path of a file."""
    if isinstance(text, Path):
        text = text.read_text()
    files = dict(_FILE.findall(text))
    match = re.search(r"^\.target\s+sm_(\d+)", text, re.MULTILINE)
    if match is None:
        raise PtxError("not known: a module without .target sm_..")
    target = int(match[1])
    module = Module()
    common: dict[str, SharedVariable] = {}
    tables: dict[str, Array] = {}
    lines = _lines(text)
    for number, line in lines:
        if found := _ENTRY.match(line):
            kernel = Kernel(found[1], target, shared=dict(common), tables=tables)
            header = line
            while not line.endswith("{"):
                number, line = next(lines)
                header += " " + line
            _read_header(kernel, header)
            _Body(kernel, files).read(lines)
            module[kernel.name] = kernel
        elif found := _TABLE.fullmatch(line):
            tables[found[1]] = np.zeros(int(found[2]), np.uint8)
            values = [int(value) for value in found[3].split(",")]
            tables[found[1]][: len(values)] = values
        elif _FUNCTION.match(line):
            _skip_function(line, lines)
        elif ".shared" in line.split('"')[0].split():
            name, variable = _shared_variable(line)
            common[name] = variable
    return module


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, without comments and blank lines."""
    text = re.sub(r"/\*.*?\*/", lambda found: "\n" * found[0].count("\n"), text, flags=re.DOTALL)
    for number, line in enumerate(text.split("\n"), 1):
        line = line.split("//", 1)[0].strip()
        if line:
            yield number, line


def _skip_function(line: str, lines: Iterator[tuple[int, str]]) -> None:
    depth = line.count("{") - line.count("}")
    while not (line.endswith(";") and depth == 0 or line.endswith("}") and depth == 0):
        _, line = next(lines)
        depth += line.count("{") - line.count("}")


def _shared_variable(line: str) -> tuple[str, SharedVariable]:
    match = _SHARED.search(line)
    if match is None or match[3] not in SIZES:
        raise PtxError(f"not known: {line}")
    size = SIZES[match[3]]
    align = int(match[2] or size)
    if match[1] and not match[5]:
        return match[4], SharedVariable(align, None)
    return match[4], SharedVariable(align, size * int(match[5] or 1))


def _read_header(kernel: Kernel, header: str) -> None:
    start, end = header.find("("), header.rfind(")")
    if threads := _THREADS.search(header):
        kernel.max_threads = 1
        for extent in threads.groups():
            kernel.max_threads *= int(extent or 1)
    if rest := _DIRECTIVES.sub("", header[end + 1 :] if end >= 0 else "").strip(" {"):
        raise PtxError(f"not known: {rest!r} in the head of {kernel.name}")
    offset = 0
    for text in header[start + 1 : end].split(",") if start >= 0 else []:
        if not text.strip():
            continue
        match = _PARAMETER.fullmatch(text.strip())
        if match is None or match[2] not in SIZES:
            raise PtxError(f"not known: parameter {text.strip()!r} of {kernel.name}")
        size = SIZES[match[2]] * int(match[4] or 1)
        align = int(match[1] or SIZES[match[2]])
        offset = -(-offset // align) * align
        is_struct = match[4] is not None
        kernel.parameters.append(Parameter(match[3], match[2], align, size, offset, is_struct))
        offset += size


class _Body:
    """Reads the statements of one kernel."""

    def __init__(self, kernel: Kernel, files: dict[str, str]) -> None:
        self.kernel = kernel
        self.files = files
        self.location = ""
        self.number = 0
        # A scope of registers: single names, and families such as %r<41> by their prefix.
        self.scopes: list[dict[str, Register | tuple[int, int, int]]] = [{}]

    def read(self, lines: Iterator[tuple[int, str]]) -> None:
        pending = ""
        for self.number, line in lines:
            if match := _LOC.match(line):
                self.location = f"{self.files.get(match[1], '?')}:{match[2]}, "
                continue
            rest = line
            while rest:
                if not pending and rest[0] in "{}":
                    if rest[0] == "{":
                        self.scopes.append({})
                    else:
                        self.scopes.pop()
                        if not self.scopes:
                            return
                    rest = rest[1:].lstrip()
                    continue
                if not pending and (label := _LABEL.match(rest)):
                    if label[1] in self.kernel.labels:
                        raise self.error(f"label {label[1]} twice")
                    self.kernel.labels[label[1]] = len(self.kernel.code)
                    rest = rest[label.end() :]
                    continue
                end = rest.find(";")
                if end < 0:
                    pending, rest = pending + rest + " ", ""
                else:
                    try:
                        self.statement((pending + rest[:end]).strip())
                    except PtxError as problem:
                        self.kernel.problems.append(problem)
                    pending, rest = "", rest[end + 1 :].lstrip()
        raise PtxError(f"{self.kernel.name}: the text ends within the kernel")

    def error(self, text: str) -> PtxError:
        return PtxError(f"not known: {text} (PTX line {self.number}, kernel {self.kernel.name})")

    def statement(self, text: str) -> None:
        if not text or text.startswith(".pragma"):
            return
        if text.startswith(".reg"):
            self.declare(text)
        elif text.startswith(".shared"):
            name, variable = _shared_variable(text)
            self.kernel.shared[name] = variable
        elif text.startswith(".local"):
            raise self.error(f"local memory is not allowed: {text}")
        elif text.startswith("."):
            raise self.error(text)
        else:
            self.instruction(text)

    def declare(self, text: str) -> None:
        match = re.fullmatch(r"\.reg\s+\.(\w+)\s+(.*)", text, re.DOTALL)
        if match is None or match[1] not in SIZES or SIZES[match[1]] == 1 and match[1] != "pred":
            raise self.error(text)
        size = 0 if match[1] == "pred" else SIZES[match[1]]
        for part in match[2].split(","):
            name = _DECLARED.fullmatch(part.strip())
            if name is None:
                raise self.error(text)
            first = self.kernel.registers.get(size, 0)
            count = int(name[2]) if name[2] else 1
            self.kernel.registers[size] = first + count
            if name[2]:
                self.scopes[-1][name[1] + "<>"] = (size, first, count)
            else:
                self.scopes[-1][name[1]] = Register(name[1], size, first)

    def register(self, name: str) -> Register | None:
        for scope in reversed(self.scopes):
            found = scope.get(name)
            if isinstance(found, Register):
                return found
            match = _REGISTER.fullmatch(name)
            family = scope.get(match[1] + "<>") if match else None
            if match and isinstance(family, tuple) and int(match[2]) < family[2]:
                register = scope[name] = Register(name, family[0], family[1] + int(match[2]))
                return register
        return None

    def instruction(self, text: str) -> None:
        match = _INSTRUCTION.fullmatch(text)
        opcode = _OPCODE.fullmatch(match[3]) if match else None
        if match is None or opcode is None:
            raise self.error(text)
        predicate = None
        if match[2]:
            predicate = self.register(match[2])
            if predicate is None or predicate.size != 0:
                raise self.error(f"predicate {match[2]} in {text}")
        self.kernel.code.append(
            Instruction(
                text=" ".join(text.split()),
                head=opcode[1],
                modifiers=tuple(opcode[2].split(".")[1:]),
                operands=tuple(self.operand(part) for part in _split(match[4])),
                predicate=predicate,
                negated=match[1] == "!",
                where=f"{self.location}PTX line {self.number}",
                kernel=self.kernel,
            )
        )

    def operand(self, text: str) -> Operand:
        first, last = text[:1], text[-1:]
        if first == "{" and last == "}":
            return Vector(tuple(self.operand(part) for part in _split(text[1:-1])))
        if first == "[" and last == "]":
            return self.address(text[1:-1].strip())
        if "|" in text:
            one, two = text.split("|")
            return Pair(self.operand(one.strip()), self.operand(two.strip()))
        if text == "_":
            return Sink()
        if found := self.register(text.lstrip("!")):
            if first != "!":
                return found
            if found.size == 0:
                return Negated(found)
        elif text in SPECIALS:
            return Special(text)
        elif is_constant(text):
            return Constant(text)
        elif re.fullmatch(r"[$A-Za-z_][\w$]*", text):
            return Symbol(text)
        raise self.error(f"operand {text!r}")

    def address(self, text: str) -> Address:
        match = _ADDRESS.fullmatch(text)
        base = self.operand(match[1]) if match else None
        if match is None or not isinstance(base, Register | Symbol):
            raise self.error(f"address [{text}]")
        return Address(base, int(match[2] or 0))


def _split(text: str) -> list[str]:
    """Operands between commas that are not within braces or brackets."""
    if "{" not in text and "[" not in text:
        return [part.strip() for part in text.split(",")] if text else []
    parts, depth, part = [], 0, ""
    for character in text:
        if character in "{[":
            depth += 1
        elif character in "}]":
            depth -= 1
        if character == "," and depth == 0:
            parts.append(part.strip())
            part = ""
        else:
            part += character
    return [*parts, part.strip()] if part.strip() or parts else []
