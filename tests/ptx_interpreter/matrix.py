# SPDX-License-Identifier: Apache-2.0
"""ldmatrix and mma.sync: 8 x 8 matrices in shared memory and in the registers of a warp."""

from collections.abc import Callable

import numpy as np

from .binder import Control, Modifiers, address, opcode, source, target
from .control import collective
from .dtypes import Array
from .machine import Machine
from .rounding import from_bf16
from .shadow import WARP
from .syntax import Instruction, Operand, Vector


def _items(ins: Instruction, operand: Operand, count: int) -> tuple[Operand, ...]:
    items = operand.items if isinstance(operand, Vector) else (operand,)
    if len(items) != count:
        raise ins.error(f"not known: {len(items)} registers where {ins.opcode} has {count}")
    return items


@opcode("ldmatrix", control=True)
def _load_matrix(m: Machine, ins: Instruction) -> Control:
    """Lane l of the first 8 ``count`` gives the address of row l % 8 of matrix l / 8."""
    mods = Modifiers(ins)
    for name in ("sync", "aligned", "m8n8"):
        mods.one((name,))
    count = int(mods.one(("x1", "x2", "x4"))[1])
    transposed = mods.flag("trans")
    mods.one(("shared", "shared::cta"))
    mods.exactly("b16")
    ins.expect(2)
    results = [target(m, ins, item, "b32") for item in _items(ins, ins.operands[0], count)]
    where = address(m, ins, ins.operands[1], "u32")
    rows = np.arange(m.threads).reshape(-1, WARP)[:, : 8 * count]

    def load() -> None:
        if m.active == m.threads and count == 4:
            warps: Array | slice = slice(None)
            words = m.shared.load(where(), 4, 4, m.now, m.access, slice(None))
        else:
            warps = np.flatnonzero(m.mask[::WARP])
            lanes = rows[warps].ravel()
            words = m.shared.load(where()[lanes], 4, 4, m.now, m.access_of(lanes), lanes)
        # [warp, matrix, row, word] -> a row of 32 lanes for each matrix
        matrices = words.reshape(-1, count, 8, 4)
        if transposed:
            halves = matrices.view(np.uint16).transpose(0, 1, 3, 2)
            matrices = np.ascontiguousarray(halves).view(np.uint32)
        for index, result in enumerate(results):
            result.reshape(-1, WARP)[warps] = matrices[:, index].reshape(-1, WARP)

    return collective(m, ins, None, load)


# Shape and type -> registers of a, registers of b, columns of a.
KINDS = {
    ("m16n8k8", "tf32"): (4, 2, 8),
    ("m16n8k8", "f16"): (2, 1, 8),
    ("m16n8k16", "f16"): (4, 2, 16),
    ("m16n8k8", "bf16"): (2, 1, 8),
    ("m16n8k16", "bf16"): (4, 2, 16),
}


def _to_float(bits: Array, kind: str) -> Array:
    """Elements as float64."""
    if kind == "f16":
        return bits.view(np.float16).astype(np.float64)
    if kind == "bf16":
        return from_bf16(bits).astype(np.float64)
    # The hardware takes no notice of the low 13 bits.
    return (bits & np.uint32(0xFFFFE000)).view(np.float32).astype(np.float64)


@opcode("mma", control=True)
def _multiply(m: Machine, ins: Instruction) -> Control:
    """The product d = a b + c, exact to 2^-53 and rounded to float32 once.

    Let g = lane / 4, q = lane % 4, and e the number of elements in a register. Register i of a
    holds row g + 8 (i % 2), columns from e q + 4 e (i / 2) on; register i of b holds column g, rows
    from e q + 4 e i on; c and d are at (g, 2q), (g, 2q + 1), (g + 8, 2q), (g + 8, 2q + 1).
    """
    mods = Modifiers(ins)
    for name in ("sync", "aligned"):
        mods.one((name,))
    shape = mods.one(("m16n8k8", "m16n8k16"))
    if len(mods.left) != 6 or mods.left[2:3] + mods.left[5:] != ["f32", "f32"]:
        raise ins.unknown()
    kind = mods.left[3]
    mods.exactly("row", "col", "f32", kind, kind, "f32")
    if (shape, kind) not in KINDS:
        raise ins.unknown()
    a_count, b_count, depth = KINDS[shape, kind]
    ins.expect(4)
    d_items, a_items, b_items, c_items = (
        _items(ins, operand, count)
        for operand, count in zip(ins.operands, (4, a_count, b_count, 4), strict=True)
    )
    warps = m.threads // WARP
    results = [target(m, ins, item, "f32").reshape(warps, 8, 4) for item in d_items]
    summands = [source(m, ins, item, "f32").reshape(warps, 8, 4) for item in c_items]
    a_matrix = _left(m, ins, a_items, kind)
    b_matrix = _right(m, ins, b_items, kind)
    c = np.empty((warps, 2, 8, 4, 2), np.float64)  # [warp, half of the rows, g, q, element]

    def multiply() -> None:
        sums = np.matmul(a_matrix().reshape(warps, 16, depth), b_matrix().reshape(warps, depth, 8))
        for index, summand in enumerate(summands):
            c[:, index // 2, :, :, index % 2] = summand
        sums = sums.reshape(c.shape)
        sums += c
        if m.where is None:
            for index, result in enumerate(results):
                result[...] = sums[:, index // 2, :, :, index % 2]
        else:
            chosen = m.mask[::WARP]
            for index, result in enumerate(results):
                result[chosen] = sums[chosen, index // 2, :, :, index % 2]

    return collective(m, ins, None, multiply)


def _left(
    m: Machine, ins: Instruction, items: tuple[Operand, ...], kind: str
) -> Callable[[], Array]:
    """The matrix a: [warp, half of the rows, g, half of the columns, q, element]."""
    each, element = (1, np.uint32) if kind == "tf32" else (2, np.uint16)
    warps = m.threads // WARP
    bits = np.empty((warps, 2, 8, len(items) // 2, 4, each), element)
    parts = [source(m, ins, i, "b32").view(element).reshape(warps, 8, 4, each) for i in items]

    def gather() -> Array:
        for index, part in enumerate(parts):
            bits[:, index % 2, :, index // 2] = part
        return _to_float(bits, kind)

    return gather


def _right(
    m: Machine, ins: Instruction, items: tuple[Operand, ...], kind: str
) -> Callable[[], Array]:
    """The matrix b: [warp, half of the rows, q, element, g]."""
    each, element = (1, np.uint32) if kind == "tf32" else (2, np.uint16)
    warps = m.threads // WARP
    bits = np.empty((warps, len(items), 4, each, 8), element)
    parts = [
        source(m, ins, i, "b32").view(element).reshape(warps, 8, 4, each).transpose(0, 2, 3, 1)
        for i in items
    ]

    def gather() -> Array:
        for index, part in enumerate(parts):
            bits[:, index] = part
        return _to_float(bits, kind)

    return gather
