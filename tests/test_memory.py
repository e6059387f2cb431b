# SPDX-License-Identifier: Apache-2.0
"""No matrix of pairs: the peak memory of a training step stays far below N x N elements."""

import os
import subprocess
import sys

import pytest
import torch

from flashmetric import ContrastiveLoss, TripletMarginLoss, _library

N, D = 8192, 32
MATRIX_BYTES = N * N * 4

# Prints by how much the resident peak grew during a step. The first, small step pays for what is
# allocated once, such as threads and the buffers of the matrix library.
PROGRAM = """
import resource, sys
import torch
from flashmetric import ContrastiveLoss, TripletMarginLoss

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(n):
    x = torch.randn(n, int(sys.argv[3]), requires_grad=True)
    labels = torch.randint(64, (n,))
    loss(x, labels).sum().backward()

loss = eval(sys.argv[1])
torch.set_num_threads(2)
step(2048)
before = peak()
step(int(sys.argv[2]))
print(peak() - before)
"""


@pytest.mark.parametrize("backend", ["default", "python"])
@pytest.mark.parametrize(
    "loss",
    [
        "TripletMarginLoss(swap=True)",
        "TripletMarginLoss(exact=True)",
        "ContrastiveLoss(1.0, 8.0)",
        "ContrastiveLoss(1.0, 8.0, reduction='none')",
    ],
)
def test_cpu_peak(loss: str, backend: str) -> None:
    environment = dict(os.environ)
    if backend == "python":
        environment["FLASHMETRIC_BACKEND"] = "python"
        environment.pop("FLASHMETRIC_REQUIRE_NATIVE", None)
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, loss, str(N), str(D)],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
    )
    assert int(result.stdout) < MATRIX_BYTES / 4


# One process for all losses: a peak only grows, so the first loss beyond the limit is named.
EVERY_LOSS = """
import resource, sys
import torch
import flashmetric
from flashmetric.catalog import ENTRIES

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(entry, n):
    loss = getattr(flashmetric, entry.name)(**dict(entry.example))
    d = getattr(loss, "centers", torch.empty(1, int(sys.argv[2]))).shape[-1]
    x = torch.rand(n, d, requires_grad=True)
    labels = torch.arange(n) // 8
    if entry.call == "towers":
        loss(x[: n // 2], ref_emb=x[n // 2 :]).backward()
    else:
        loss(x, labels % 4 if entry.call == "classes" else labels).backward()

torch.set_num_threads(2)
entries = [e for e in ENTRIES if e.call in ("batch", "towers") and not e.example]
for entry in entries:
    step(entry, 2048)
before = peak()
for entry in entries:
    step(entry, int(sys.argv[1]))
    print(entry.name, peak() - before)
"""


def test_every_loss() -> None:
    result = subprocess.run(
        [sys.executable, "-c", EVERY_LOSS, str(N), str(D)],
        capture_output=True,
        text=True,
        check=True,
    )
    lines = [line.split() for line in result.stdout.splitlines()]
    assert len(lines) > 20
    for name, grown in lines:
        assert int(grown) < MATRIX_BYTES / 4, name


# Blocks without a pair of the wanted kind are left out: what remains is what a row costs.
MANY_ROWS = """
import resource, sys
import torch

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def step(n):
    pairs = torch.randn(n, 1), torch.arange(n) // 4, None, None, "equal", "euclidean"
    one = torch.ones(2, 1)
    torch.ops.flashmetric.row_sum(*pairs, "linear", "none", one, one, None, False)

import flashmetric
torch.set_num_threads(2)
step(2048)
before = peak()
step(int(sys.argv[1]))
print(peak() - before)
"""


@pytest.mark.skipif(_library.backend != "native", reason="blocks are the native library's")
def test_many_rows_need_no_list_of_blocks() -> None:
    rows = 1_000_000
    result = subprocess.run(
        [sys.executable, "-c", MANY_ROWS, str(rows)], capture_output=True, text=True, check=True
    )
    # About 180 bytes a row; a list of the blocks would add 290 and grow with the square.
    assert int(result.stdout) < 300 * rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("loss", [TripletMarginLoss(swap=True), ContrastiveLoss(1.0, 8.0)])
def test_cuda_peak(loss: torch.nn.Module) -> None:
    x = torch.randn(N, D, device="cuda", requires_grad=True)
    labels = torch.randint(64, (N,), device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    loss(x, labels).backward()
    assert torch.cuda.max_memory_allocated() - before < MATRIX_BYTES / 4
