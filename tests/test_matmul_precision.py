# SPDX-License-Identifier: Apache-2.0
"""Which of torch's switches for float32 products the CUDA kernels follow."""

from collections.abc import Iterator

import pytest
import torch

import flashmetric  # noqa: F401  defines the op


@pytest.fixture(autouse=True)
def _restored() -> Iterator[None]:
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    yield
    matmul.fp32_precision = before


@pytest.mark.parametrize(("name", "exact"), [("highest", True), ("high", False), ("medium", False)])
def test_follows_the_switch_of_all_products(name: str, exact: bool) -> None:
    torch.set_float32_matmul_precision(name)
    assert torch.ops.flashmetric._float32_is_exact() is exact
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(("name", "exact"), [("ieee", True), ("tf32", False)])
def test_follows_the_newer_switch(name: str, exact: bool) -> None:
    torch.backends.cuda.matmul.fp32_precision = name
    assert torch.ops.flashmetric._float32_is_exact() is exact


def test_default_is_exact() -> None:
    assert torch.ops.flashmetric._float32_is_exact()
