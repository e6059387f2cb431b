# SPDX-License-Identifier: Apache-2.0
"""Files that are either complete or absent, and the checkpoint among them."""

import io
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

import torch

from flashmetric.demo.errors import DemoError

_FORMAT = "flashmetric-demo-1"
_KEYS = {"format", "options", "epoch", "model", "optimizer", "history", "metrics"}


def write_atomically(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write a file so that a crash leaves the previous version or the new one, never a mixture.

    Args:
        path: The file to replace.
        write: Writes the content to the stream it is given.

    Raises:
        DemoError: If the file cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as stream:
            write(stream)
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise DemoError(f"cannot write {path}: {error.strerror or error}") from error
    finally:
        temporary.unlink(missing_ok=True)


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Save a checkpoint; ``content`` has the keys that :func:`load_checkpoint` returns."""
    write_atomically(path, lambda stream: torch.save({"format": _FORMAT, **content}, stream))


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Load a checkpoint without running any code it might contain.

    Returns:
        Dictionary with ``options``, ``epoch`` (epochs done), ``model``, ``optimizer``, ``history``
        (mean loss of each epoch) and ``metrics``.

    Raises:
        DemoError: If the file is missing, damaged or something else.
    """
    try:
        stored = io.BytesIO(path.read_bytes())
    except OSError as error:
        raise DemoError(f"--resume {path}: {error.strerror or error}") from error
    try:
        content = torch.load(stored, map_location="cpu", weights_only=True)
    except (RuntimeError, OSError, EOFError, LookupError, ValueError, pickle.PickleError) as error:
        raise DemoError(f"--resume {path}: not a readable checkpoint") from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT or content.keys() != _KEYS:
        raise DemoError(f"--resume {path}: not a checkpoint of this program")
    return content
