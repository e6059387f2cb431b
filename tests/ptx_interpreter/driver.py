# SPDX-License-Identifier: Apache-2.0
"""Launches a kernel on a GPU through the CUDA driver, with the arguments of ``launch``.

For machines that have one: what the interpreter says is compared with what the hardware does.
"""

import ctypes
from collections.abc import Iterable, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from .arguments import Argument, array_of, pack, place_of, pointers
from .dtypes import Array
from .syntax import Kernel

MAX_DYNAMIC_SHARED_SIZE_BYTES = 8  # of CUfunction_attribute
MAJOR, MINOR = 75, 76  # of CUdevice_attribute: the compute capability
WITHOUT_LEAVE = 48 * 1024  # dynamic shared memory that a kernel may have without asking


class DriverError(RuntimeError):
    """A call of the driver has failed."""


class Device:
    """The first GPU, with the primary context that PyTorch uses as well.

    A kernel that fails (an illegal address) leaves the context unusable for the whole process, by
    the driver's rules; every later call then reports that first failure.
    """

    def __init__(self, library: str = "libcuda.so.1") -> None:
        """Loads the driver and takes the context."""
        try:
            self.driver = ctypes.CDLL(library)
        except OSError as problem:
            raise DriverError(f"no CUDA driver: {problem}") from problem
        self.call("cuInit", ctypes.c_uint(0))
        self.device = ctypes.c_int()
        self.call("cuDeviceGet", ctypes.byref(self.device), ctypes.c_int(0))
        context = ctypes.c_void_p()
        self.call("cuDevicePrimaryCtxRetain", ctypes.byref(context), self.device)
        self.call("cuCtxSetCurrent", context)
        self.modules: dict[Path, ctypes.c_void_p] = {}

    def __enter__(self) -> "Device":
        """The device itself."""
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        problem: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Gives back modules and context."""
        for module in self.modules.values():
            self.driver.cuModuleUnload(module)
        self.modules.clear()
        self.driver.cuDevicePrimaryCtxRelease_v2(self.device)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function of the driver.

        Raises:
            DriverError: With the driver's own text, if the function fails.
        """
        function = getattr(self.driver, name)
        function.restype = ctypes.c_int
        result = function(*arguments)
        if result != 0:
            text = ctypes.c_char_p()
            self.driver.cuGetErrorString(ctypes.c_int(result), ctypes.byref(text))
            raise DriverError(f"{name}: {(text.value or b'unknown').decode()} (error {result})")

    @property
    def arch(self) -> str:
        """The architecture, such as ``sm_90``."""
        numbers = []
        for attribute in (MAJOR, MINOR):
            value = ctypes.c_int()
            self.call(
                "cuDeviceGetAttribute", ctypes.byref(value), ctypes.c_int(attribute), self.device
            )
            numbers.append(value.value)
        return f"sm_{numbers[0]}{numbers[1]}"

    def launch(
        self,
        cubin: Path,
        kernel: Kernel,
        arguments: Iterable[Argument],
        grid: int | Sequence[int],
        block: int | Sequence[int],
        *,
        smem_bytes: int = 0,
    ) -> None:
        """Runs ``kernel`` of ``cubin``; arrays are copied there and back.

        Args:
            cubin: From ``compile_cubin``.
            kernel: The same kernel's PTX from ``parse``, for its name and parameters.
            arguments: As for ``ptx_interpreter.launch``.
            grid: The number of blocks, or up to three of them.
            block: The number of threads, or up to three of them.
            smem_bytes: The size of the dynamic shared memory.
        """
        function = self._function(cubin, kernel.name)
        if smem_bytes > WITHOUT_LEAVE:
            self.call(
                "cuFuncSetAttribute",
                function,
                ctypes.c_int(MAX_DYNAMIC_SHARED_SIZE_BYTES),
                ctypes.c_int(smem_bytes),
            )
        arguments = list(arguments)
        arrays = [array_of(argument) for argument in pointers(arguments)]
        allocated: dict[tuple[int, int], ctypes.c_uint64] = {}
        try:
            for array in arrays:
                self._copy_there(array, allocated)
            packed = pack(
                kernel.parameters, arguments, lambda array: allocated[place_of(array)].value
            )
            self._run(function, kernel, packed, grid, block, smem_bytes)
            for array in arrays:
                self._copy_back(array, allocated[place_of(array)])
        finally:
            # Whatever has failed: a second failure here must not hide the first.
            for pointer in allocated.values():
                self.driver.cuMemFree_v2(pointer)

    def _function(self, cubin: Path, name: str) -> ctypes.c_void_p:
        if cubin not in self.modules:
            module = ctypes.c_void_p()
            self.call("cuModuleLoadData", ctypes.byref(module), cubin.read_bytes())
            self.modules[cubin] = module
        function = ctypes.c_void_p()
        self.call("cuModuleGetFunction", ctypes.byref(function), self.modules[cubin], name.encode())
        return function

    def _copy_there(self, array: Array, allocated: dict[tuple[int, int], ctypes.c_uint64]) -> None:
        pointer = ctypes.c_uint64()
        # An allocation of no bytes is an error, an array of none is not.
        self.call("cuMemAlloc_v2", ctypes.byref(pointer), ctypes.c_size_t(max(1, array.nbytes)))
        allocated[place_of(array)] = pointer
        if array.nbytes:
            data = ctypes.c_void_p(array.ctypes.data)
            self.call("cuMemcpyHtoD_v2", pointer, data, ctypes.c_size_t(array.nbytes))

    def _copy_back(self, array: Array, pointer: ctypes.c_uint64) -> None:
        if array.nbytes:
            data = ctypes.c_void_p(array.ctypes.data)
            self.call("cuMemcpyDtoH_v2", data, pointer, ctypes.c_size_t(array.nbytes))

    def _run(
        self,
        function: ctypes.c_void_p,
        kernel: Kernel,
        packed: bytes,
        grid: int | Sequence[int],
        block: int | Sequence[int],
        smem_bytes: int,
    ) -> None:
        values = [
            ctypes.create_string_buffer(packed[p.offset : p.offset + p.size], p.size)
            for p in kernel.parameters
        ]
        places = (ctypes.c_void_p * max(1, len(values)))(*(ctypes.addressof(v) for v in values))
        shape = [ctypes.c_uint(extent) for extents in (grid, block) for extent in _three(extents)]
        self.call("cuLaunchKernel", function, *shape, ctypes.c_uint(smem_bytes), None, places, None)
        self.call("cuCtxSynchronize")


def _three(extents: int | Sequence[int]) -> tuple[int, ...]:
    given = (extents,) if isinstance(extents, int | np.integer) else tuple(extents)
    return (*map(int, given), 1, 1, 1)[:3]
