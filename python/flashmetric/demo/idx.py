# SPDX-License-Identifier: Apache-2.0
"""Reader for IDX files, the format of MNIST and Fashion-MNIST, plain or gzip-compressed."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import torch
from torch import Tensor

from flashmetric.demo.errors import DemoError

# A damaged header can announce any size; nothing this reader is for comes near this one.
_MAX_BYTES = 2**31


def find_idx(folder: Path, name: str) -> Path:
    """Return the path of an IDX file in a folder, preferring the plain file to the ``.gz`` one."""
    for candidate in (folder / name, folder / f"{name}.gz"):
        if candidate.is_file():
            return candidate
    raise DemoError(f"{folder} has neither {name} nor {name}.gz")


def read_idx(path: Path, ndim: int) -> Tensor:
    """Read an IDX file of unsigned bytes.

    Args:
        path: The file; a name that ends in ``.gz`` is decompressed on the way.
        ndim: The expected number of dimensions: 3 for images, 1 for labels.

    Returns:
        uint8 tensor with the shape given in the file.

    Raises:
        DemoError: If the file cannot be read or is not what its header says.
    """
    try:
        with gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb") as stream:
            header = stream.read(4 + 4 * ndim)
            shape = _parse_header(path, header, ndim)
            expected = math.prod(shape)
            # One byte more than announced tells an overlong file from an exact one.
            body = stream.read(expected + 1)
    except EOFError as error:
        raise DemoError(f"{path}: the gzip file is truncated") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DemoError(f"{path}: the gzip file is damaged ({error})") from error
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror or error}") from error
    if len(body) != expected:
        found = f"only {len(body)}" if len(body) < expected else "more"
        size = "x".join(map(str, shape))
        raise DemoError(f"{path}: the header announces {size} = {expected} bytes, found {found}")
    return torch.frombuffer(bytearray(body), dtype=torch.uint8).reshape(shape)


def _parse_header(path: Path, header: bytes, ndim: int) -> tuple[int, ...]:
    if len(header) < 4 + 4 * ndim:
        raise DemoError(f"{path}: {len(header)} bytes are too few for an IDX header")
    (magic,) = struct.unpack(">I", header[:4])
    # Two zero bytes, type code 8 (unsigned byte), number of dimensions.
    expected = 0x0800 + ndim
    if magic != expected:
        raise DemoError(
            f"{path}: not an IDX file of {ndim}-dimensional bytes "
            f"(magic number 0x{magic:08x}, expected 0x{expected:08x})"
        )
    shape = struct.unpack(f">{ndim}I", header[4:])
    if not 0 < math.prod(shape) < _MAX_BYTES:
        raise DemoError(f"{path}: implausible size {'x'.join(map(str, shape))} in the header")
    return shape
