# SPDX-License-Identifier: Apache-2.0
"""The operator namespace, and loading of the native library that speeds it up."""

import os
import warnings
from pathlib import Path
from typing import Literal

import torch

LIBRARY_NAME = "libflashmetric_ops.so"

library = torch.library.Library("flashmetric", "DEF")
"""Schemas and PyTorch implementations of the ops are defined on this object."""

backend: Literal["native", "python"] = "python"
"""What runs the ops on the CPU: the native library, or PyTorch code."""

native_error: str | None = "not loaded yet"
"""Why the native library is not in use; None if it is."""


def _find_native() -> Path | None:
    """Path of the native library, or None when there is none.

    It lies beside the extension module ``_build_info``. Importing that module is the only way that
    finds the folder in wheels and in every kind of editable install, and it is what makes
    scikit-build-core rebuild an editable install on import, where that is switched on.
    """
    if override := os.environ.get("FLASHMETRIC_LIBRARY"):
        return Path(override)
    try:
        from flashmetric import _build_info
    except ImportError:
        return None
    return Path(_build_info.__file__).with_name(LIBRARY_NAME)


def _try_native() -> str | None:
    """Load the native library; the reason when that did not work."""
    if os.environ.get("FLASHMETRIC_BACKEND", "").lower() == "python":
        return "switched off by FLASHMETRIC_BACKEND=python"
    isa = os.environ.get("FLASHMETRIC_CPU_ISA")
    if isa not in (None, "generic", "avx2", "avx512"):
        raise ImportError(f"FLASHMETRIC_CPU_ISA: generic, avx2 or avx512 expected, got {isa!r}")
    path = _find_native()
    if path is None:
        return f"{LIBRARY_NAME} was not built"
    try:
        torch.ops.load_library(path)
    except OSError as error:
        warnings.warn(
            f"flashmetric runs on its slower PyTorch code, because its native library did not "
            f"load: {error}",
            RuntimeWarning,
            stacklevel=2,
        )
        return str(error)
    return None


def load_native() -> None:
    """Load the native library once; to be called when all ops are defined on ``library``.

    The library adds implementations for the CPU (and CUDA) to the ops. PyTorch prefers those to the
    ones that were registered for every device. Without the library the ops keep working.

    Raises:
        ImportError: ``FLASHMETRIC_REQUIRE_NATIVE=1`` is set and the library is not usable.
    """
    global backend, native_error
    if backend == "native":
        return
    native_error = _try_native()
    if native_error is None:
        backend = "native"
    elif os.environ.get("FLASHMETRIC_REQUIRE_NATIVE") == "1":
        raise ImportError(f"FLASHMETRIC_REQUIRE_NATIVE=1, but: {native_error}")


def describe() -> dict[str, object]:
    """What is installed and what runs: versions, backend, instruction set, CUDA."""
    # Imported late, because the package imports this module first.
    from flashmetric import __version__

    info: dict[str, object] = {
        "flashmetric": __version__,
        "backend": backend,
        "native_error": native_error,
        "torch": torch.__version__,
    }
    try:
        from flashmetric._build_info import build_info
    except ImportError:
        info["build"] = None
    else:
        info["build"] = build_info()
    if backend == "native":
        ops = torch.ops.flashmetric
        info["cpu_isa"] = ops._cpu_isa()
        info["threads"] = ops._num_threads()
        info["cuda_devices"] = ops._cuda_device_count()
        info["cuda_status"] = ops._cuda_status()
        info["cuda_shims_bound"] = ops._cuda_shims_bound()
    return info
