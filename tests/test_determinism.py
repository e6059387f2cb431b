# SPDX-License-Identifier: Apache-2.0
"""The same batch gives the same bits: run after run, and for the native code on any threads."""

import subprocess
import sys

import pytest
import torch

from flashmetric import ContrastiveLoss, TripletMarginLoss, _library

# Prints a digest of losses and gradients of several batches, for the number of threads given. The
# batches are large enough for the kernels to use threads, the last one for torch's sums to as well.
PROGRAM = """
import hashlib, sys
import torch
from flashmetric import ContrastiveLoss, TripletMarginLoss

torch.set_num_threads(int(sys.argv[1]))
digest = hashlib.sha256()
losses = [TripletMarginLoss(), TripletMarginLoss(swap=True), TripletMarginLoss(exact=True),
          ContrastiveLoss(0.5, 6.0), ContrastiveLoss(reduction="none")]
for n, m, d, classes, dtype in ((1101, 0, 24, 150, torch.float32), (1000, 0, 40, 5, torch.float32),
                                (311, 1700, 40, 90, torch.float32), (1203, 0, 13, 9, torch.float64),
                                (1030, 0, 16, 200, torch.bfloat16),
                                (60000, 40, 8, 9, torch.float32)):
    generator = torch.Generator().manual_seed(n)
    x = torch.randn(n, d, generator=generator).to(dtype).requires_grad_()
    labels = torch.randint(classes, (n,), generator=generator)
    ref = {}
    if m:
        r = torch.randn(m, d, generator=generator).to(dtype).requires_grad_()
        ref = {"ref_emb": r, "ref_labels": torch.randint(classes, (m,), generator=generator)}
    for loss in losses:
        value = loss(x, labels, **ref).sum()
        leaves = [x, r] if m else [x]
        for tensor in (value.detach(), *torch.autograd.grad(value, leaves)):
            digest.update(tensor.double().numpy().tobytes())
print(digest.hexdigest())
"""


def digest(threads: int) -> str:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(threads)], capture_output=True, text=True, check=True
    )
    return result.stdout.strip()


def test_new_processes_agree() -> None:
    assert digest(2) == digest(2)


def test_thread_counts_agree() -> None:
    if _library.backend != "native":
        pytest.skip("matrix products of PyTorch may sum in another order with more threads")
    assert digest(1) == digest(2) == digest(3)


@pytest.mark.parametrize(
    "loss", [TripletMarginLoss(0.5), ContrastiveLoss(0.5, 6.0), ContrastiveLoss(reduction="none")]
)
def test_runs_agree(loss: torch.nn.Module, device: torch.device) -> None:
    x = torch.randn(1001, 33, device=device, requires_grad=True)
    labels = torch.randint(20, (1001,), device=device)
    results = []
    for _ in range(3):
        value = loss(x, labels)
        results.append((value.detach(), *torch.autograd.grad(value.sum(), x)))
    for value, grad in results[1:]:
        assert value.equal(results[0][0]) and grad.equal(results[0][1])
