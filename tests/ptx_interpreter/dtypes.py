# SPDX-License-Identifier: Apache-2.0
"""PTX types as numpy types, and constants of them."""

import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .errors import PtxError

Array = NDArray[Any]

# bf16 and the packed types have no numpy type; instructions unpack them themselves.
DTYPES: dict[str, Any] = {
    "pred": np.bool_,
    "b8": np.uint8,
    "u8": np.uint8,
    "s8": np.int8,
    "b16": np.uint16,
    "u16": np.uint16,
    "s16": np.int16,
    "f16": np.float16,
    "bf16": np.uint16,
    "b32": np.uint32,
    "u32": np.uint32,
    "s32": np.int32,
    "f32": np.float32,
    "f16x2": np.uint32,
    "bf16x2": np.uint32,
    "tf32": np.uint32,
    "b64": np.uint64,
    "u64": np.uint64,
    "s64": np.int64,
    "f64": np.float64,
}
SIZES = {name: np.dtype(dtype).itemsize for name, dtype in DTYPES.items()}
RAW: dict[int, Any] = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}
SIGNED: dict[int, Any] = {1: np.int8, 2: np.int16, 4: np.int32, 8: np.int64}
INTEGERS = ("u16", "s16", "u32", "s32", "u64", "s64")

_NUMBER = re.compile(r"(-?)(0[xX][0-9a-fA-F]+|0[bB][01]+|[0-9]+)U?")


def is_signed(type_name: str) -> bool:
    """Whether a value of the type is extended by its sign."""
    return type_name[0] == "s"


def is_constant(text: str) -> bool:
    """Whether the operand is written as a number."""
    return re.fullmatch(r"0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}", text) is not None or (
        _NUMBER.fullmatch(text) is not None
    )


def constant(text: str, type_name: str) -> Any:
    """The numpy scalar that ``text`` means where an operand of ``type_name`` stands."""
    dtype = np.dtype(DTYPES[type_name])
    if text[:2] in ("0f", "0F") or text[:2] in ("0d", "0D"):
        bits = bytes.fromhex(text[2:])[::-1]
        if len(bits) != dtype.itemsize or type_name[0] not in "fb" or type_name == "bf16x2":
            raise PtxError(f"not known: {text} where a {type_name} is wanted")
        return np.frombuffer(bits, dtype)[0]
    match = _NUMBER.fullmatch(text)
    if match is None or type_name[0] == "f":
        raise PtxError(f"not known: {text} where a {type_name} is wanted")
    digits = match[2]
    octal = len(digits) > 1 and digits.isdecimal() and digits[0] == "0"
    value = int(digits, 8 if octal else 0)
    value = -value if match[1] else value
    if type_name == "pred":
        return np.bool_(value)
    width = 8 * dtype.itemsize
    if not -(1 << (width - 1)) <= value < 1 << width:
        raise PtxError(f"{text} does not fit a {type_name}")
    return np.array(value & ((1 << width) - 1), RAW[dtype.itemsize]).view(dtype)[()]
