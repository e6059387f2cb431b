# SPDX-License-Identifier: Apache-2.0
"""Kernels of a single instruction, for tests of what it computes."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from . import launch, parse
from .dtypes import DTYPES, SIZES, Array

HEAD = ".version 8.6\n.target sm_90\n.address_size 64\n"


def kernel_text(body: str, parameters: int, name: str = "k") -> str:
    """A kernel with pointers p0, p1, ... and the given body."""
    declared = ", ".join(f".param .u64 p{i}" for i in range(parameters))
    return f"{HEAD}.visible .entry {name}({declared})\n{{\n{body}\nret;\n}}\n"


def _register_type(type_name: str) -> str:
    return f"b{max(16, 8 * SIZES[type_name])}"


def execute(
    opcode: str, result: str, operands: Sequence[tuple[str, Array]], immediates: Sequence[str] = ()
) -> Array:
    """``opcode d, operands.., immediates..`` for each element; the result has the type ``result``.

    A predicate among the operands or the results is a u32 that is 0 or not.
    """
    count = len(operands[0][1])
    threads = -(-count // 32) * 32
    lines = [".reg .b64 %rd<9>;", ".reg .b32 %r<9>;", ".reg .pred %q<9>;", "mov.u32 %r0, %tid.x;"]
    names, arrays = [], []
    for i, (type_name, values) in enumerate([*operands, (result, np.zeros(count))]):
        stored = "u32" if type_name == "pred" else type_name
        size = SIZES[stored]
        arrays.append(np.resize(np.asarray(values).astype(DTYPES[stored]), threads))
        lines += [
            f".reg .{_register_type(stored)} v{i};",
            f"ld.param.u64 %rd{i}, [p{i}];",
            f"mad.wide.u32 %rd{i}, %r0, {size}, %rd{i};",
        ]
        if i < len(operands):
            lines.append(f"ld.global.b{8 * size} v{i}, [%rd{i}];")
        if type_name == "pred" and i < len(operands):
            lines.append(f"setp.ne.u32 %q{i}, v{i}, 0;")
        names.append(f"%q{i}" if type_name == "pred" else f"v{i}")
    last = len(operands)
    lines.append(f"{opcode} {names[last]}, {', '.join([*names[:last], *immediates])};")
    if result == "pred":
        lines.append(f"selp.u32 v{last}, 1, 0, %q{last};")
    size = SIZES["u32" if result == "pred" else result]
    lines.append(f"st.global.b{8 * size} [%rd{last}], v{last};")
    kernel = parse(kernel_text("\n".join(lines), last + 1))["k"]
    launch(kernel, arrays, 1, threads)
    return arrays[-1][:count]


def same(got: Array, expected: Any) -> None:
    """Asserts that all bits are equal, signs of zeros included; NaN is equal to NaN."""
    expected = np.asarray(expected).astype(got.dtype)
    if got.dtype.kind == "f":
        assert (np.isnan(got) == np.isnan(expected)).all()
        got, expected = (np.where(np.isnan(v), 0, v).astype(v.dtype) for v in (got, expected))
    assert got.tobytes() == expected.tobytes(), f"{got} is not {expected}"
