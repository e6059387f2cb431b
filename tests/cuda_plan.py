# SPDX-License-Identifier: Apache-2.0
"""The launch decisions of csrc/cuda/plan.h, compiled as they are, for tests."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


class DeviceLimits(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int) for name in ("arch", "sms", "smem_per_block", "smem_per_sm")]


class Launch(ctypes.Structure):
    _fields_ = [
        *[
            (name, ctypes.c_int32)
            for name in (
                "grid_x",
                "grid_y",
                "threads",
                "smem",
                "resident",
                "fits",
                "owner",
                "symmetric",
            )
        ],
        *[(name, ctypes.c_int64) for name in ("row_tiles", "col_tiles", "ratio")],
    ]


H100 = DeviceLimits(90, 132, 232448, 233472)
A100 = DeviceLimits(80, 108, 166912, 167936)
ADA = DeviceLimits(89, 128, 101376, 102400)
TURING = DeviceLimits(75, 40, 65536, 65536)


def compile_shim(source: Path, system: Iterable[Path] = ()) -> ctypes.CDLL:
    """Compile a C++ shim over the headers of csrc with the host compiler, once per content.

    Args:
        source: the shim.
        system: folders of headers that are not ours.
    """
    headers = sorted((ROOT / "csrc").rglob("*.h")) + sorted((ROOT / "csrc").rglob("*.cuh"))
    digest = hashlib.sha256(b"".join(f.read_bytes() for f in [source, *headers])).hexdigest()[:16]
    library = ROOT / "build" / "shims" / f"{source.stem}-{digest}.so"
    if not library.exists():
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        assert compiler, "a C++ compiler is needed: set CXX"
        library.parent.mkdir(parents=True, exist_ok=True)
        partial = library.with_suffix(f".{os.getpid()}.tmp")
        include = [f"-I{ROOT / 'csrc' / folder}" for folder in ("include", "cuda")]
        include += [flag for folder in system for flag in ("-isystem", str(folder))]
        command = [compiler, "-std=c++17", "-O1", "-shared", "-fPIC", "-Wall", "-Werror"]
        subprocess.run([*command, *include, str(source), "-o", str(partial)], check=True)
        partial.replace(library)
    return ctypes.CDLL(str(library))


@functools.cache
def plan() -> ctypes.CDLL:
    """The functions of cuda_plan_shim.cpp."""
    shim = compile_shim(ROOT / "tests" / "cuda_plan_shim.cpp")
    i64, limits = ctypes.c_int64, DeviceLimits
    signatures = {
        "fm_plan_hardest": (Launch, [ctypes.c_int, i64, i64, i64, ctypes.c_int, limits]),
        "fm_plan_hardest_shared": (Launch, [ctypes.c_int, i64, i64, i64, ctypes.c_int, limits]),
        "fm_plan_row_sum": (Launch, [ctypes.c_int, i64, i64, ctypes.c_int, limits]),
        "fm_plan_rows": (ctypes.c_int, [i64]),
        "fm_chunks": (i64, [i64]),
        "fm_owner_rows": (i64, []),
        "fm_make_key": (ctypes.c_uint64, [ctypes.c_uint32, ctypes.c_uint32]),
        "fm_key_index": (i64, [ctypes.c_uint64]),
        "fm_prescale_exponent": (ctypes.c_int, [ctypes.c_uint32]),
        "fm_power_of_two_bits": (ctypes.c_uint32, [ctypes.c_int]),
        "fm_inverse_power_bits": (ctypes.c_uint32, [ctypes.c_uint32]),
        "fm_segments": (i64, [i64, i64, i64, ctypes.c_int, i64, i64, ctypes.c_void_p, i64]),
        "fm_tile_count": (i64, [i64, i64, i64, ctypes.c_int]),
    }
    for name, (result, arguments) in signatures.items():
        function = getattr(shim, name)
        function.restype, function.argtypes = result, arguments
    return shim
