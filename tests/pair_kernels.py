# SPDX-License-Identifier: Apache-2.0
"""Runs the kernels for listed pairs and of the slab engine in the PTX interpreter."""

import ctypes
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch

from cuda_plan import compile_shim
from ptx_interpreter import Module, Struct, Uninitialised, launch, parse
from ptx_interpreter.compile import CSRC, compile_ptx, find_nvcc

# In the order of the enum Distance; the search of the slab engine is tested with the first four.
DISTANCES = ("euclidean", "sqeuclidean", "cosine", "dot")
ALL_DISTANCES = (*DISTANCES, "angular", "sqrt_cosine", "rbf", "cityblock", "chi2")

# Name, number of the enum Scalar, part of a kernel's symbol, unit roundoff.
DTYPES = {
    "float16": (0, "6__half", 2.0**-11),
    "bfloat16": (1, "13__nv_bfloat16", 2.0**-8),
    "float32": (2, "f", 2.0**-24),
    "float64": (3, "d", 2.0**-53),
}


@functools.cache
def module(source: str) -> Module:
    """The kernels of one file of csrc/cuda."""
    return parse(interpretable(compile_ptx(CSRC / "cuda" / source).read_text()))


def interpretable(text: str) -> str:
    """PTX without what the interpreter has no bits for."""
    # log1p of float64 starts from a rough reciprocal and refines it: a better start does no harm.
    return text.replace("rcp.approx.ftz.f64", "rcp.rn.f64")


@functools.cache
def plans() -> ctypes.CDLL:
    """The launch numbers, from the functions that the launchers call."""
    toolkit = Path(find_nvcc()).resolve().parents[1]
    system = [toolkit / "include", Path("/usr/local/cuda/include")]
    return compile_shim(Path(__file__).with_name("cuda_pairs_shim.cpp"), system)


def plan(name: str, *arguments: int) -> list[int]:
    """A launch plan of several numbers."""
    out = (ctypes.c_int64 * 4)()
    getattr(plans(), name)(*(ctypes.c_int64(a) for a in arguments), out)
    return list(out)


def number(name: str, *arguments: int) -> int:
    """A launch plan of one number."""
    function = getattr(plans(), name)
    function.restype = ctypes.c_int64
    return int(function(*(ctypes.c_int64(a) for a in arguments)))


def encode(values: Any, dtype: str) -> np.ndarray:
    """Rounds to ``dtype``; bfloat16 as its bits."""
    values = np.ascontiguousarray(values, np.float64)
    if dtype == "bfloat16":
        return torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy()
    return values.astype(dtype)


def decode(array: np.ndarray, dtype: str) -> np.ndarray:
    """Back to float64."""
    if dtype == "bfloat16":
        return torch.from_numpy(array).view(torch.bfloat16).double().numpy()
    return array.astype(np.float64)


def accumulate(dtype: str) -> Any:
    """The type of sums and distances."""
    return np.float64 if dtype == "float64" else np.float32


def distance_number(distance: str) -> np.int32:
    """Its number in the enum Distance."""
    return np.int32(ALL_DISTANCES.index(distance))


def unwritten(shape: Any, dtype: Any) -> Uninitialised:
    """Memory whose reading before writing is an error."""
    return Uninitialised(np.empty(shape, dtype))


def result(buffer: Uninitialised) -> np.ndarray:
    """The array, all of which the kernel must have written."""
    assert buffer.written.all(), f"{(buffer.written == 0).sum()} bytes were not written"
    return buffer.array


def run(
    source: str, kernel: str, grid: Any, threads: int, arguments: Struct, seed: int = 0
) -> None:
    """Launches the kernel whose symbol holds ``kernel``."""
    launch(module(source).find(kernel), [arguments], grid, threads, seed=seed)
