# SPDX-License-Identifier: Apache-2.0
"""A CUDA source to PTX or to a binary, with nvcc, kept by the contents of what went in."""

import hashlib
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"
FLAGS = ("-std=c++17", "-O3", "-lineinfo", "--expt-relaxed-constexpr")
SUFFIXES = {".h", ".cuh", ".cu"}


def find_nvcc() -> str:
    """The compiler: $CUDACXX, on the PATH, or where the toolkit is usually installed.

    Raises:
        RuntimeError: If there is none. Tests fail then: skipped, they would test nothing.
    """
    for candidate in (os.environ.get("CUDACXX"), "nvcc", "/usr/local/cuda/bin/nvcc"):
        found = shutil.which(candidate) if candidate else None
        if found:
            return found
    raise RuntimeError(
        "nvcc is needed to test the CUDA kernels, with or without a GPU, and was not found: set "
        "CUDACXX, put it on the PATH, or install the CUDA toolkit"
    )


def compile_ptx(
    source: Path,
    *,
    arch: str = "sm_80",
    defines: Iterable[str] = (),
    include: Iterable[Path] = (),
    root: Path = CSRC,
) -> Path:
    """The PTX that nvcc makes of ``source``, for ``parse``.

    Args:
        source: A .cu file. include and cuda of ``root`` are on its include path.
        arch: The architecture, such as ``sm_80``.
        defines: Macros, ``"NAME"`` or ``"NAME=value"``.
        include: Further include folders.
        root: The sources, or a changed copy of them.

    Raises:
        RuntimeError: If there is no nvcc, or it refuses the source.
    """
    return _compile(source, "ptx", arch, defines, include, root)


def compile_cubin(
    source: Path, *, arch: str, defines: Iterable[str] = (), include: Iterable[Path] = ()
) -> Path:
    """The same as machine code, for ``driver.Device``."""
    return _compile(source, "cubin", arch, defines, include, CSRC)


def _compile(
    source: Path, kind: str, arch: str, defines: Iterable[str], include: Iterable[Path], root: Path
) -> Path:
    nvcc = find_nvcc()
    folders = [*include, root / "include", root / "cuda"]
    options = [
        *FLAGS,
        f"-{kind}",
        f"-arch={arch}",
        *(f"-D{define}" for define in defines),
        *(f"-I{folder}" for folder in folders),
    ]
    digest = hashlib.sha256()
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    for text in (version.stdout, *options, source.name):
        # Copies of the sources with the same contents share a result.
        digest.update(text.replace(str(root), "").encode() + b"\0")
    headers = {path for folder in [*folders, root, source.parent] for path in folder.rglob("*")}
    for path in sorted(path for path in headers | {source} if path.suffix in SUFFIXES):
        digest.update(str(path).replace(str(root), "").encode() + b"\0" + path.read_bytes() + b"\0")
    cache = Path(os.environ.get("FLASHMETRIC_PTX_CACHE") or ROOT / "build" / "ptx")
    cache.mkdir(parents=True, exist_ok=True)
    result = cache / f"{source.stem}-{arch}-{digest.hexdigest()[:16]}.{kind}"
    if not result.exists():
        # Under another name first: tests may run side by side.
        partial = result.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, *options, "-o", str(partial), str(source)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            partial.unlink(missing_ok=True)
            raise RuntimeError(f"nvcc refuses {source}:\n{run.stderr}{run.stdout}")
        partial.replace(result)
    return result
