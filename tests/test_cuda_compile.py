# SPDX-License-Identifier: Apache-2.0
"""What nvcc makes of csrc/cuda for each architecture of a wheel: registers, spills, instructions.

Needs no GPU. Results are kept in build/cubin by the contents of what went in.
"""

import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pytest

from ptx_interpreter.compile import CSRC, ROOT, find_nvcc

CUDA_CMAKE = (ROOT / "cmake" / "CudaKernels.cmake").read_text()
ARCHS = re.findall(r"\d+", re.search(r"set\(FLASHMETRIC_ARCH_LIST ([\d ]+)\)", CUDA_CMAKE)[1])
# Those of cmake for device code, with FLASHMETRIC_WERROR.
OPTIONS = [
    *("-O3", "-DNDEBUG", "-std=c++17", "--expt-relaxed-constexpr"),
    *("-Werror=all-warnings", "-Xcompiler=-Wall,-Wextra", "-Xcompiler=-Werror", "-Xptxas=-v"),
]
INCLUDE = [CSRC / "include", CSRC / "cuda"]

# All kernels with the number of their instantiations; DESIGN.md has the same table. Each one costs
# compile time seven times and room in every wheel.
KERNELS = {
    "hardest.cu": {"hardest_kernel": 6, "hardest_finish_kernel": 1},
    "nearest.cu": {"nearest_kernel": 2},
    "pair_distance.cu": {"pair_distance_kernel": 4, "pair_gradient_kernel": 4},
    "prepare.cu": {"prepare_kernel": 1},
    "row_grad.cu": {"row_grad_kernel": 2},
    "row_lse.cu": {"row_lse_kernel": 2},
    "row_sum.cu": {"row_sum_kernel": 4},
    "slab.cu": {"slab_rows_kernel": 4, "slab_hardest_kernel": 2, "triplet_finish_kernel": 2},
    "slab_direct.cu": {"direct_kernel": 4, "direct_pull_kernel": 4},
    "slab_distance.cu": {"slab_distance_kernel": 2, "slab_gradient_kernel": 4},
    "slab_product.cu": {"product_kernel": 4},
    "slab_row_grad.cu": {"slab_row_weigh_kernel": 2},
    "slab_row_lse.cu": {"slab_row_lse_kernel": 2},
    "slab_row_sum.cu": {"slab_row_sum_kernel": 2},
    "threshold_grad.cu": {"threshold_table_kernel": 2, "threshold_weigh_kernel": 2},
    "threshold_sum.cu": {"threshold_sum_kernel": 2, "threshold_hinge_kernel": 2},
    "top_k.cu": {"top_k_kernel": 2},
}
TILE_KERNELS = ("hardest_kernel", "row_grad_kernel", "row_lse_kernel", "row_sum_kernel")
# These take most of the time to compile, and are short of registers: all architectures. Of the
# others the oldest, the newest and one between; a build of a wheel turns their spills into errors.
TILE_FILES = ["row_sum.cu", "row_grad.cu", "row_lse.cu", "hardest.cu"]
SOME_ARCHS = [ARCHS[0], "90", ARCHS[-1]]
MOST_REGISTERS = 255  # of 255; a kernel that has them all is about to spill

BUILDS = pytest.mark.parametrize(
    ("arch", "source"),
    [(a, source) for source in KERNELS for a in (ARCHS if source in TILE_FILES else SOME_ARCHS)],
    ids=lambda value: value if value.endswith(".cu") else f"sm_{value}",
)


@dataclass
class Usage:
    """What ptxas says of a kernel; bytes but for the registers."""

    name: str
    registers: int
    stack: int
    stores: int
    loads: int

    @property
    def base(self) -> str:
        """The name without namespaces and template arguments."""
        return re.sub(r"<.*", "", self.name)

    @property
    def fits(self) -> bool:
        return self.registers <= MOST_REGISTERS and not (self.stack or self.stores or self.loads)

    def __str__(self) -> str:
        if not (self.stack or self.stores or self.loads):
            return f"{self.registers}{'' if self.fits else '!'}"
        return f"{self.registers}! {self.stack}/{self.stores}/{self.loads}"


@dataclass
class Build:
    cubin: Path
    kernels: dict[str, Usage]  # by symbol


def files_of(source: Path, found: dict[Path, None] | None = None) -> list[Path]:
    """The source and all headers of ours that it includes, under whatever condition."""
    found = {} if found is None else found
    found[source] = None
    for name in re.findall(r'^#\s*include\s+[<"]([^>"]+)[>"]', source.read_text(), re.M):
        for path in (folder / name for folder in [*INCLUDE, source.parent]):
            if path.is_file() and path not in found:
                files_of(path, found)
    return list(found)


def compile_source(source: str, arch: str) -> Build:
    """One file for one architecture."""
    nvcc, path = find_nvcc(), CSRC / "cuda" / source
    options = [*OPTIONS, f"-arch=sm_{arch}", *(f"-I{folder}" for folder in INCLUDE)]
    version = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=True)
    digest = hashlib.sha256("\0".join([version.stdout, *options]).encode())
    for file in files_of(path):
        digest.update(str(file).encode() + b"\0" + file.read_bytes() + b"\0")
    cache = ROOT / "build" / "cubin"
    cache.mkdir(parents=True, exist_ok=True)
    cubin = cache / f"{path.stem}-sm_{arch}-{digest.hexdigest()[:16]}.cubin"
    log = cubin.with_suffix(".log")
    if not cubin.exists():
        # Under another name first: tests may run side by side.
        partial = cubin.with_suffix(f".{os.getpid()}.tmp")
        command = [nvcc, *options, "-cubin", "-o", str(partial), str(path)]
        run = subprocess.run(command, capture_output=True, text=True)
        if run.returncode != 0:
            partial.unlink(missing_ok=True)
            raise AssertionError(f"nvcc refuses {source} for sm_{arch}:\n{run.stderr}{run.stdout}")
        partial.with_suffix(".log").write_text(run.stderr)
        partial.with_suffix(".log").replace(log)
        partial.replace(cubin)
    return Build(cubin, usage(log.read_text()))


def usage(log: str) -> dict[str, Usage]:
    """What ``ptxas -v`` has written, by symbol."""
    pattern = (
        r"Compiling entry function '(\w+)'.*\n.*Function properties for \1\n"
        r"\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\n"
        r".*Used (\d+) registers"
    )
    found = re.findall(pattern, log)
    assert len(found) == log.count("Compiling entry function"), f"not understood:\n{log}"
    symbols = [symbol for symbol, *_ in found]
    names = subprocess.run(["c++filt", *symbols], capture_output=True, text=True, check=True)
    kernels = {}
    for (symbol, *numbers), name in zip(found, names.stdout.splitlines(), strict=True):
        name = re.sub(r"flashmetric::cuda::|\(anonymous namespace\)::", "", name)
        name = re.sub(r"^void |\(\w*Args(<\w+>)?\)$", "", name)
        stack, stores, loads, registers = map(int, numbers)
        kernels[symbol] = Usage(name, registers, stack, stores, loads)
    return kernels


def find_nvdisasm() -> str:
    """The disassembler: beside nvcc, on the PATH, or from the wheel nvidia-cuda-nvdisasm.

    Raises:
        RuntimeError: If there is none.
    """
    folders = [Path(find_nvcc()).resolve().parent, Path("/usr/local/cuda/bin")]
    wheels = [path for entry in sys.path for path in Path(entry).glob("nvidia/cu*/bin")]
    search = map(str, [*folders, *os.get_exec_path(), *wheels])
    found = shutil.which("nvdisasm", path=os.pathsep.join(search))
    if not found:
        raise RuntimeError(
            "nvdisasm is needed to check the machine code of the CUDA kernels, with or without a "
            "GPU, and was not found: install the dependency group cuda-checks of pyproject.toml, "
            "or put the CUDA toolkit's on the PATH"
        )
    return found


def instructions(build: Build) -> dict[str, Counter[str]]:
    """How often each kernel has each opcode, without modifiers, by symbol."""
    kept = build.cubin.with_suffix(".opcodes")
    if not kept.exists():
        command = [find_nvdisasm(), "-c", str(build.cubin)]
        run = subprocess.run(command, capture_output=True, text=True)
        assert run.returncode == 0, f"nvdisasm {build.cubin.name}: {run.stderr}"
        lines, symbol = Counter(), ""
        for line in run.stdout.splitlines():
            if section := re.match(r"\s*\.section\s+\.text\.(\w+)", line):
                symbol = section[1]
            elif found := re.match(r"\s*/\*[0-9a-f]+\*/\s+(?:@!?\w+ )?\s*([A-Z]\w+)", line):
                lines[f"{symbol} {found[1]}"] += 1
        partial = kept.with_suffix(f".{os.getpid()}.tmp")
        partial.write_text("".join(f"{key} {count}\n" for key, count in sorted(lines.items())))
        partial.replace(kept)
    counts: dict[str, Counter[str]] = {}
    for line in kept.read_text().splitlines():
        symbol, opcode, count = line.split()
        counts.setdefault(symbol, Counter())[opcode] = int(count)
    return counts


class Builds:
    """The builds of a run, each made once, side by side as far as there are processors."""

    def __init__(self) -> None:
        self.pool = ThreadPoolExecutor(len(os.sched_getaffinity(0)))
        self.futures: dict[tuple[str, str], Future[Build]] = {}

    def request(self, source: str, arch: str) -> Future[Build]:
        if (source, arch) not in self.futures:
            self.futures[source, arch] = self.pool.submit(compile_source, source, arch)
        return self.futures[source, arch]

    def __getitem__(self, key: tuple[str, str]) -> Build:
        return self.request(*key).result()

    def table(self, source: str) -> str:
        """Registers of the kernels of a file; with spills, bytes of stack, stores and loads."""
        archs = [arch for arch in ARCHS if (source, arch) in self.futures]
        columns = [
            {kernel.name: kernel for kernel in self[source, arch].kernels.values()}
            for arch in archs
        ]
        names = sorted({name for column in columns for name in column})
        lines = [[source, *(f"sm_{arch}" for arch in archs)]]
        lines += [[name, *(str(column.get(name, "-")) for column in columns)] for name in names]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        return "\n".join(
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
            for line in lines
        )


@pytest.fixture(scope="module")
def builds(request: pytest.FixtureRequest) -> Iterator[Builds]:
    made = Builds()
    # All that the selected tests will ask for. With pytest-xdist that is the other workers' too.
    if "PYTEST_XDIST_WORKER" not in os.environ:
        chosen = [
            (item.callspec.params["source"], item.callspec.params["arch"])
            for item in request.session.items
            if item.path == request.path and hasattr(item, "callspec")
        ]
        for key in sorted(chosen, key=lambda key: key[0] not in TILE_FILES):
            made.request(*key)
    yield made
    made.pool.shutdown(cancel_futures=True)


@BUILDS
def test_no_kernel_spills(builds: Builds, source: str, arch: str) -> None:
    kernels = builds[source, arch].kernels.values()
    bad = [kernel.name for kernel in kernels if not kernel.fits]
    assert not bad, (
        f"for sm_{arch} too many registers, a stack or spills in {', '.join(bad)}. Registers, and "
        f"bytes of stack/spill stores/spill loads:\n{builds.table(source)}"
    )


@BUILDS
def test_instantiations(builds: Builds, source: str, arch: str) -> None:
    kernels = builds[source, arch].kernels.values()
    assert Counter(kernel.base for kernel in kernels) == KERNELS[source], (
        "write the new numbers down here and in DESIGN.md, if they are worth it"
    )


@BUILDS
def test_instructions(builds: Builds, source: str, arch: str) -> None:
    build = builds[source, arch]
    found = instructions(build)
    assert found.keys() == build.kernels.keys()
    for symbol, kernel in build.kernels.items():
        opcodes = found[symbol]
        spilled = {"LDL", "STL"} & opcodes.keys()
        assert not spilled, f"{kernel.name} for sm_{arch} uses local memory: {spilled}"
        if kernel.base in TILE_KERNELS:
            # Tensor cores, ldmatrix, and cp.async where there is one.
            wanted = {"HMMA", "LDSM", *(["LDGSTS"] if int(arch) >= 80 else [])}
            missing = wanted - opcodes.keys()
            assert not missing, f"{kernel.name} for sm_{arch} has no {missing}"


def test_every_file_is_checked_and_built() -> None:
    assert {path.name for path in (CSRC / "cuda").glob("*.cu")} == KERNELS.keys()
    listed = (ROOT / "CMakeLists.txt").read_text()
    assert [source for source in KERNELS if f"csrc/cuda/{source}" not in listed] == []
    counted = {kernel for kernels in KERNELS.values() for kernel in kernels}
    assert counted.issuperset(TILE_KERNELS) and set(TILE_FILES) < KERNELS.keys()


def test_options_are_those_of_cmake() -> None:
    text = CUDA_CMAKE + (ROOT / "cmake" / "CompileOptions.cmake").read_text()
    parts = re.findall(r"target_compile_options\(\$\{_objects\} PRIVATE(.*?)\)\n", text, re.S)
    parts += re.findall(r"COMPILE_LANGUAGE:CUDA>:([^>]*)>", text)
    theirs = re.findall(r"(?<![\w,=-])-[^\s>]+", " ".join(parts))
    by_build_type = {"-O3", "-DNDEBUG"}
    # How the result is packed, profiling builds, and spills as errors, which would leave no table.
    others = {"-Xfatbin=-compress-all", "-lineinfo", "-Xptxas=-warn-spills,-warn-lmem-usage"}
    assert others <= {*theirs} and "set(CMAKE_CUDA_STANDARD 17)" in text
    assert {*OPTIONS} - by_build_type - {"-std=c++17", "-Xptxas=-v"} == ({*theirs} - others)
