# SPDX-License-Identifier: Apache-2.0
"""The wrappers of csrc/cuda/prims.cuh: interpreter, plain numpy and, where there is one, a GPU."""

import functools
import re

import pytest
import torch

from ptx_interpreter import Module, launch, parse
from ptx_interpreter.compile import CSRC, compile_cubin, compile_ptx
from ptx_interpreter.conformance import SOURCE, Case, cases
from ptx_interpreter.driver import Device

ARCHS = ["sm_75", "sm_80", "sm_90"]
CASES = list(cases())
IDS = [f"{case.kernel}-{case.name}".rstrip("-") for case in CASES]


@functools.cache
def module(arch: str) -> Module:
    return parse(compile_ptx(SOURCE, arch=arch))


@pytest.mark.parametrize("arch", ARCHS)
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_interpreter_against_numpy(case: Case, arch: str) -> None:
    arguments = case.fresh()
    launch(module(arch)[case.kernel], arguments, 1, 32, smem_bytes=case.smem_bytes)
    case.check(arguments[-1])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_gpu_against_interpreter_and_numpy(case: Case) -> None:
    with Device() as device:
        kernel = module(device.arch)[case.kernel]
        cubin = compile_cubin(SOURCE, arch=device.arch)
        arguments, interpreted = case.fresh(), case.fresh()
        device.launch(cubin, kernel, arguments, 1, 32, smem_bytes=case.smem_bytes)
    case.check(arguments[-1])
    launch(kernel, interpreted, 1, 32, smem_bytes=case.smem_bytes)
    case.check(arguments[-1], interpreted[-1])


def test_every_wrapper_has_a_case() -> None:
    text = (CSRC / "cuda" / "prims.cuh").read_text()
    wrappers = re.findall(r"__device__ __forceinline__ [\w:]+ (\w+)\(", text)
    assert wrappers
    tested = SOURCE.read_text()
    missing = [name for name in wrappers if not re.search(rf"prims::{name}\b", tested)]
    assert not missing, f"no conformance case for {missing}"
    assert {case.kernel for case in CASES} == set(module("sm_80"))
