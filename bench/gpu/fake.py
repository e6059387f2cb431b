# SPDX-License-Identifier: Apache-2.0
"""The double of a GPU for ``--dry-run``: tiny CPU tensors, and figures that are made up.

Losses, the gate and the whole report run as they would; what only a device can tell is invented
here, by a rule and not at random, and every output says so.
"""

from dataclasses import replace
from typing import Any

import torch

from bench.gpu.cases import GpuCase
from bench.gpu.device import Call

ROWS, FEATURES = 48, 12


class FakeDevice:
    """Answers as ``bench.gpu.device.CudaDevice`` does."""

    dry_run = True
    compile_backend = "eager"
    device = torch.device("cpu")

    def __init__(self) -> None:
        """Starts counting answers."""
        self._answers = 0

    def facts(self) -> dict[str, str]:
        """Says what it is."""
        return {"gpu": "none: DRY RUN, all times, rates and memory are made up"}

    def shrink(self, case: GpuCase) -> GpuCase:
        """A size that any CPU runs at once."""
        return replace(case, n=min(case.n, ROWS), d=min(case.d, FEATURES))

    def free_bytes(self) -> int:
        """As much as a large GPU has, so that very large cases are refused here as there."""
        return 80 * 2**30

    def release(self) -> None:
        """Has nothing to hand back."""

    def synchronize(self) -> None:
        """Has nothing to wait for."""

    def time_calls(self, call: Call, reset: Call, count: int) -> list[float]:
        """Runs the call once and makes times up."""
        reset()
        call()
        self._answers += 1
        usual = 1e-3 * (1 + self._answers % 11)
        return [usual * (1 + i % 5 / 10) for i in range(count)]

    def extra_memory(self, call: Call) -> int:
        """Runs the call and makes a size up."""
        call()
        return 2**14

    def replay(self, call: Call, reset: Call, count: int) -> list[float]:
        """Runs the call once and makes times up."""
        return self.time_calls(call, reset, count)

    def trace(self, call: Call, reset: Call, count: int) -> dict[str, Any]:
        """Runs the call once and makes up a profile of three launches a call."""
        reset()
        call()
        kernel = {"ph": "X", "cat": "kernel", "dur": 5.0}
        names = ("void flashmetric::made_up_1()", "void flashmetric::made_up_2()", "torch_fill()")
        return {"traceEvents": [{**kernel, "name": name} for name in names for _ in range(count)]}

    def peaks(self) -> dict[str, float]:
        """Makes rates up."""
        rates = {"bfloat16": 4e14, "float16": 4e14, "float32 high": 2e14, "float32": 4e13}
        return {**rates, "copy": 2e12}
