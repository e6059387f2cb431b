# SPDX-License-Identifier: Apache-2.0
"""What is done on the device: the gate, first calls, times, launches, traffic."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from bench import cases as plain_cases
from bench.gate import disagreement, gate_case, judge, relative, truth
from bench.gpu.cases import FORWARD, PRECISIONS, GpuCase
from bench.gpu.contenders import CONTENDERS, ENGINE, GpuContender, Problem, environment
from bench.gpu.device import CudaDevice
from bench.gpu.fake import FakeDevice
from bench.gpu.launches import count_launches
from bench.gpu.traffic import has_cuda_kernel, traffic
from bench.gpu.truth import full_truth

OPS = (
    "hardest",
    "hardest_triplets",
    "hardest_triplets_backward",
    "pair_distance",
    "pair_distance_backward",
    "row_sum",
    "row_sum_backward",
    "row_lse",
    "row_lse_backward",
    "threshold_sum",
    "threshold_sum_backward",
    "nearest_beyond",
    "row_top_k",
)
PROBE_ROWS = 1024
MARGIN_ROWS = 2048
PROFILED_CALLS, REPLAYED = 10, 20
# At full size a few of the rows may have two candidates at the same distance but for rounding.
AGREEMENT = 1e-3


class Failure(Exception):
    """Why a contender has no figure, in the words of the report."""


@contextmanager
def matmul_precision(mode: str) -> Iterator[None]:
    """Sets how products of float32 are computed, and puts back what was set."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(mode)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Bench:
    """What the process knows: its device, and the case that is open."""

    def __init__(self, dry_run: bool) -> None:
        """Takes the device."""
        self.device = FakeDevice() if dry_run else CudaDevice()
        self.case: GpuCase | None = None
        self.margin = 0.0
        self.problems: dict[str, Problem] = {}

    def facts(self) -> dict[str, str]:
        """Device and library, for the header of the report."""
        import flashmetric  # noqa: F401  (registers the operators)
        from flashmetric._library import describe

        library = describe()
        there = [op for op in OPS if has_cuda_kernel(op)]
        return {
            **self.device.facts(),
            "torch": str(torch.__version__),
            "flashmetric": f"{library['flashmetric']}, backend {library['backend']}",
            "engine": os.environ.get(ENGINE, "the library's choice"),
            "ops with a CUDA kernel": ", ".join(there) or "none: they run as PyTorch code",
        }

    def peaks(self) -> dict[str, float]:
        """What the machine can do."""
        rates = self.device.peaks()
        self.device.release()
        return rates

    def check(self, contender: GpuContender, kernel: str) -> None:
        """Raises Failure where a contender cannot take part."""
        if kernel not in contender.build:
            raise Failure("does not compute this")
        if ENGINE in contender.env and not self.device.dry_run:
            op = {"triplet": "hardest_triplets", "contrastive": "row_sum"}.get(kernel, kernel)
            if not has_cuda_kernel(op):
                raise Failure(f"{op} has no CUDA kernel in this build")

    def gate(self, kernel: str, precision: str, name: str) -> tuple[bool, str]:
        """Judges a contender on a small batch against float64 coordinate differences.

        Returns:
            Whether it passed, and the errors found.
        """
        contender, p = CONTENDERS[name], PRECISIONS[precision]
        self.check(contender, kernel)
        case = gate_case(kernel)
        margin = plain_cases.settle(case).margin
        x, labels = plain_cases.draw(case)
        x = x.to(p.dtype)
        expected = truth(kernel, x, labels, margin)
        device = self.device.device
        loss = contender.loss(kernel, margin, self.device.compile_backend)
        problem = Problem(loss, x.to(device), labels.to(device), kernel != "hardest")
        with environment(contender.env), matmul_precision(p.matmul):
            problem.call()
            self.device.synchronize()
        assert problem.result is not None
        grad = None if problem.x.grad is None else problem.x.grad.cpu()
        limits = p.ours if contender.ours else p.peers
        verdict = judge(problem.result.cpu(), grad, expected, limits)
        return verdict.passed, verdict.text

    def open(self, case: GpuCase) -> float:
        """Draws the data of a case and computes its truth.

        Returns:
            The active share.
        """
        self.close()
        small = self.device.shrink(case)
        rows = min(small.n, MARGIN_ROWS)
        settled = plain_cases.Case(case.kernel, rows, small.d, case.activity)
        self.margin = plain_cases.settle(settled).margin
        x, labels = plain_cases.draw(plain_cases.Case(case.kernel, small.n, small.d))
        p = PRECISIONS[case.precision]
        self.x, self.labels = x.to(self.device.device, p.dtype), labels.to(self.device.device)
        self.truth = full_truth(case.kernel, self.x, self.labels, self.margin)
        self.case = case
        self.device.release()
        return self.truth.active

    def close(self) -> None:
        """Forgets the open case."""
        self.case, self.x, self.labels, self.truth = None, None, None, None
        self.problems.clear()
        if "torch._dynamo" in sys.modules:
            torch._dynamo.reset()  # or it would reach its limit of recompilations
        self.device.release()

    @contextmanager
    def running(self, name: str) -> Iterator[None]:
        """The environment and the precision in which a contender of the open case runs."""
        assert self.case is not None
        mode = PRECISIONS[self.case.precision].matmul
        with environment(CONTENDERS[name].env), matmul_precision(mode):
            yield

    def first(self, name: str) -> dict[str, Any]:
        """Makes a contender ready for the open case; memory and values of its first call.

        Returns:
            ``extra`` bytes, ``seconds`` of a settled call, and ``wrong``: what is wrong with its
            values at this size, or an empty string.
        """
        assert self.case is not None
        contender, case = CONTENDERS[name], self.case
        self.check(contender, case.kernel)
        step = case.mode != FORWARD and contender.judged
        loss = contender.loss(case.kernel, self.margin, self.device.compile_backend)
        problem = Problem(loss, self.x, self.labels, step)
        with self.running(name):
            self.warm_up(contender, problem)
            extra = self.device.extra_memory(problem.call)
            wrong = self.values(contender, problem) if contender.judged else ""
            problem.reset()
            seconds = self.device.time_calls(problem.call, problem.reset, 1)[0]
            problem.reset()
        self.problems[name] = problem
        return {"extra": extra, "seconds": seconds, "wrong": wrong}

    def warm_up(self, contender: GpuContender, problem: Problem) -> None:
        """Loads code at a small size, and refuses what would not fit at the full one."""
        if contender.compiled:  # it compiles for one size, so it must be this one
            problem.call()
            problem.reset()
            return
        rows = min(len(problem.x), PROBE_ROWS)
        small = Problem(
            problem.loss, problem.x[:rows].detach(), self.labels[:rows], problem.x.requires_grad
        )
        small.call()
        small.reset()
        probe = self.device.extra_memory(small.call)
        small.reset()
        assert self.case is not None
        if contender.ours or self.case.n <= rows:
            return
        need, free = probe * (self.case.n / rows) ** 2, self.device.free_bytes()
        if need > 0.95 * free:
            text = f"{need / 2**30:.0f} GiB expected, {free / 2**30:.0f} GiB free"
            raise Failure(f"skipped (needs more memory than there is: {text})")

    def values(self, contender: GpuContender, problem: Problem) -> str:
        """Holds loss and gradient at full size against the float64 truth."""
        assert self.case is not None and problem.result is not None
        p = PRECISIONS[self.case.precision]
        tolerance = max(AGREEMENT, (p.ours if contender.ours else p.peers)[0])
        if self.truth.grad_norm is None:
            error = relative(problem.result.double(), self.truth.result)
            return "" if error <= tolerance else f"wrong at this size (distances, {error:.1e})"
        if contender.ours or p.dtype == torch.float32:
            grad = problem.x.grad
            norm = None if grad is None else float(grad.double().norm())
        else:
            norm = None  # other pairs, another gradient: its loss alone is held against the truth
        found = {"loss": float(problem.result), "grad_norm": norm}
        expected = {"loss": float(self.truth.result), "grad_norm": self.truth.grad_norm}
        return disagreement(found, expected, tolerance)

    def time(self, name: str, count: int) -> list[float]:
        """Times calls of a contender of the open case."""
        problem = self.problems[name]
        with self.running(name):
            seconds = self.device.time_calls(problem.call, problem.reset, count)
        problem.reset()
        return seconds

    def traffic(self, name: str) -> int:
        """Bytes that the operators of one call move."""
        problem = self.problems[name]
        with self.running(name):
            moved = traffic(problem.call)
        self.device.synchronize()
        problem.reset()
        return moved

    def launches(self, name: str) -> dict[str, Any] | None:
        """Kernel launches of one call."""
        problem = self.problems[name]
        with self.running(name):
            problem.call()
            found = count_launches(
                self.device.trace(problem.call, problem.reset, PROFILED_CALLS), PROFILED_CALLS
            )
        problem.reset()
        return None if found is None else {**vars(found), "text": found.text}

    def replay(self, name: str) -> list[float]:
        """Device time of one call, from the replay of a graph."""
        problem = self.problems[name]
        with self.running(name):
            seconds = self.device.replay(problem.call, problem.reset, REPLAYED)
        problem.reset()
        return seconds
