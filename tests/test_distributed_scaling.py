# SPDX-License-Identifier: Apache-2.0
"""The formulas of docs/scaling.md against bytes that processes write to their sockets."""

import math

import pytest
import torch.distributed as dist

from bench import scaling
from bench.scaling_model import Batch, Hardware, bytes_sent, memory, simulate

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


def test_a_ring_hides_what_it_computes_longer_than() -> None:
    delay = 0.005
    for waited in scaling.on_ranks(2, scaling.measured_waiting, delay, 2048, 256):
        # Rows go round twice. Sums go round once and home, with nothing left to compute.
        assert len(waited) == 4
        assert sum(waited[:-1]) == 0
        assert waited[-1] <= delay
    # Next to nothing to compute hides next to nothing.
    for waited in scaling.on_ranks(2, scaling.measured_waiting, 0.1, 8, 8):
        assert sum(waited) > 0.1


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
