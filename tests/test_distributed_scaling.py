# SPDX-License-Identifier: Apache-2.0
"""The formulas of docs/scaling.md against bytes that processes write; what the ring waits for."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from bench import scaling
from bench.scaling_model import Batch, Hardware, bytes_sent, memory, simulate
from flashmetric.distributed.ring import Ring

# What Gloo adds to each message, and the few numbers that ranks compare and add up.
OVERHEAD = 8192


@pytest.mark.skipif(not scaling.IO.exists(), reason="needs /proc/self/io of Linux")
@pytest.mark.skipif(not dist.is_gloo_available(), reason="needs Gloo")
def test_bytes_are_those_of_the_formula() -> None:
    sizes = [(256, 128), (301, 40)]
    of_ranks = scaling.on_ranks(2, scaling.measured_bytes, list(scaling.FORMS), sizes)
    cases = [(form, *size) for form in scaling.FORMS for size in sizes]
    for measured in of_ranks:
        for (form, rows, features), found in zip(cases, measured, strict=True):
            model = bytes_sent(form, Batch(2, rows, features))
            assert model <= found <= model + OVERHEAD, (form, rows, features)


def test_blocks_travel_while_others_are_computed(monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []

    def pass_on(ring: Ring, leaving: Tensor, arriving: Tensor) -> Callable[[], None]:
        events.append("sent")
        arriving.copy_(leaving)
        return lambda: events.append("arrived")

    def add(owner: int, block: Tensor) -> Tensor:
        events.append("computed")
        return torch.zeros_like(block)

    monkeypatch.setattr(Ring, "_pass_on", pass_on)
    ring = Ring.__new__(Ring)
    ring.rank, ring.size, ring.counts = 0, 3, [2, 2, 2]
    for _ in ring.rounds(torch.zeros(2, 4)):
        events.append("computed")
    assert events == ["sent", "computed", "arrived"] * 2 + ["computed"]
    events.clear()
    ring.rounds_with_sums(torch.zeros(2, 4), add, torch.float32)
    rows_only = ["sent", "computed", "arrived"]
    rows_and_sums = ["sent", "sent", "computed", "arrived", "arrived"]
    home = ["sent", "arrived"]
    assert events == rows_only + rows_and_sums + rows_only + home


def test_the_model() -> None:
    small, large = Batch(8, 1024, 512), Batch(1024, 1024, 512)
    assert memory("ring", small) == memory("ring", large)
    assert memory("gather", large) / memory("gather", small) == pytest.approx(128, rel=0.1)
    for form in scaling.FORMS:
        # NCCL has a reduce-scatter, Gloo none; the ring needs neither.
        assert bytes_sent(form, large, "nccl") <= bytes_sent(form, large)
        for batch in (small, large):
            step = simulate(form, batch, Hardware())
            assert step.seconds == pytest.approx(step.compute + step.waiting)
            assert step.waiting > 0
            flops = 8.0 * batch.rows**2 * batch.ranks * batch.features
            assert step.compute == pytest.approx(flops / Hardware().flops)
            # Links without limits cost nothing.
            free = simulate(form, batch, Hardware(link=math.inf, network=math.inf, latency=0.0))
            assert free.seconds == pytest.approx(step.compute)
