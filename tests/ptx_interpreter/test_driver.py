# SPDX-License-Identifier: Apache-2.0
"""driver.py against a stand-in for the CUDA driver, since few machines that test have a GPU."""

import ctypes
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from ptx_interpreter import Kernel, Struct
from ptx_interpreter.driver import Device, DriverError
from ptx_interpreter.syntax import Parameter

STUB = Path(__file__).parent / "kernels" / "stub_driver.c"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> str:
    compiler = next(c for c in ("cc", "gcc", "clang") if shutil.which(c))
    result = tmp_path_factory.mktemp("stub") / "libstub.so"
    subprocess.run([compiler, "-shared", "-fPIC", str(STUB), "-o", str(result)], check=True)
    return str(result)


@pytest.fixture
def cubin(tmp_path: Path) -> Path:
    path = tmp_path / "stub.cubin"
    path.write_bytes(b"\x7fELF\0stub")
    return path


KERNEL = Kernel("by_value", 90, [Parameter("p", "b8", 8, 48, 0, True)])


def arguments() -> tuple[Any, Any, list[Any]]:
    x, out = np.arange(100, dtype=np.float32), np.zeros(50, np.float32)
    sizes = (np.int64(10), np.int64(50))
    return x, out, [Struct([x, np.bool_(True), out, sizes, np.float32(0.25)])]


def test_launch(library: str, cubin: Path) -> None:
    stub = ctypes.CDLL(library)
    x, out, values = arguments()
    with Device(library) as device:
        assert device.arch == "sm_90"
        device.launch(cubin, KERNEL, values, (2, 3), 64)
        assert stub.stub_shared_bytes() == 0
        device.launch(cubin, KERNEL, values, (2, 3), (64,), smem_bytes=65536)
        assert stub.stub_shared_bytes() == 65536
    assert (out == x[10:60] / 2).all()
    assert stub.stub_allocations() == 0


def test_memory_is_freed_after_a_failure(library: str, cubin: Path) -> None:
    stub = ctypes.CDLL(library)
    _, out, values = arguments()
    stub.stub_fail_launch(1)
    with Device(library) as device:
        with pytest.raises(DriverError, match="cuLaunchKernel: an illegal memory access.*700"):
            device.launch(cubin, KERNEL, values, (2, 3), 64)
    stub.stub_fail_launch(0)
    assert stub.stub_allocations() == 0 and not out.any()


def test_refusals(library: str, cubin: Path) -> None:
    with Device(library) as device:
        with pytest.raises(DriverError, match="cuModuleGetFunction: refused by the stub"):
            device.launch(cubin, Kernel("other", 90), [], 1, 32)
        with pytest.raises(DriverError, match="cuLaunchKernel: refused by the stub"):
            device.launch(cubin, KERNEL, arguments()[2], 1, 64)
    with pytest.raises(DriverError, match="no CUDA driver"):
        Device("libnot-there.so.1")
