# SPDX-License-Identifier: Apache-2.0
"""Losses over the rows of several processes: bytes, memory, overlap; many GPUs simulated.

``python -m bench.scaling`` prints the tables of docs/scaling.md.
"""

import argparse
import ctypes
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import flashmetric
from bench.measure import extra_memory
from bench.scaling_model import Batch, Hardware, bytes_sent, memory, simulate
from flashmetric.distributed import gather_loss, ring_loss
from flashmetric.distributed.ring import Ring

FORMS: dict[str, Callable[..., torch.nn.Module]] = {"gather": gather_loss, "ring": ring_loss}
IO = Path("/proc/self/io")
Job = Callable[[int, int], Any]


def _process(rank: int, world: int, store: str, job: Job, given: Any, results: Any) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    results.put(job(*given))
    dist.destroy_process_group()


def on_ranks(world: int, job: Callable[..., Any], *given: Any) -> list[Any]:
    """What ``job(*given)`` returns in each process of a Gloo group, in any order."""
    results = mp.get_context("spawn").SimpleQueue()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_process, (world, f"{folder}/store", job, given, results), nprocs=world)
    return [results.get() for _ in range(world)]


def step(form: str, rows: int, features: int) -> Callable[[], None]:
    """Forward and backward of a loss over all ranks, of random rows."""
    torch.manual_seed(dist.get_rank())
    x = torch.randn(rows, features)
    labels = torch.randint(rows, (rows,))
    loss = FORMS[form](flashmetric.MultiSimilarityLoss())

    def run() -> None:
        leaf = x.requires_grad_()
        leaf.grad = None
        loss(leaf, labels).backward()

    return run


def written() -> int:
    """Bytes this process has handed to the kernel by write(), on files and sockets alike."""
    fields = dict(line.split(": ") for line in IO.read_text().splitlines())
    return int(fields["wchar"])


def measured_bytes(forms: list[str], sizes: list[tuple[int, int]]) -> list[int]:
    """Bytes sent in one step, for each form and size."""
    found = []
    for form in forms:
        for rows, features in sizes:
            run = step(form, rows, features)
            run()
            dist.barrier()
            before = written()
            run()
            # All sums have arrived: nothing of this step is still to be sent.
            found.append(written() - before)
            dist.barrier()
    return found


def measured_memory(form: str, rows: int, features: int) -> int:
    """Peak memory of a step, bytes above what is there before it."""
    # glibc's M_MMAP_THRESHOLD: what is freed is given back, and not counted again.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    run = step(form, rows, features)
    run()
    dist.barrier()
    extra = extra_memory(run)
    assert extra is not None
    return extra[0]


@contextmanager
def slow_links(delay: float) -> Iterator[list[float]]:
    """Every block is ``delay`` seconds on its way; yields how long each was waited for."""
    pass_on, slept = Ring._pass_on, []

    def delayed(ring: Ring, leaving: Tensor, arriving: Tensor) -> Callable[[], None]:
        there = time.monotonic() + delay
        wait = pass_on(ring, leaving, arriving)

        def finish() -> None:
            wait()
            slept.append(max(0.0, there - time.monotonic()))
            time.sleep(slept[-1])

        return finish

    with mock.patch.object(Ring, "_pass_on", delayed):
        yield slept


def measured_waiting(delay: float, rows: int, features: int) -> list[float]:
    """Seconds that a step of the ring waits for each block that is passed on, in their order."""
    run = step("ring", rows, features)
    run()
    with slow_links(delay) as slept:
        run()
    return slept


def table(head: list[str], lines: list[list[str]]) -> str:
    """Markdown."""
    rule = ["---:"] * len(head)
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, rule, *lines])


def report_bytes(worlds: list[int], sizes: list[tuple[int, int]]) -> str:
    lines = []
    for world in worlds:
        of_ranks = on_ranks(world, measured_bytes, list(FORMS), sizes)
        most = [max(column) for column in zip(*of_ranks, strict=True)]
        cases = [(form, *size) for form in FORMS for size in sizes]
        for (form, rows, features), found in zip(cases, most, strict=True):
            model = bytes_sent(form, Batch(world, rows, features))
            lines.append(
                [str(world), str(rows), str(features), form, f"{found:,}", f"{model:,}"]
                + [f"{found / model:.3f}"]
            )
    return table(["ranks", "rows each", "D", "form", "sent, bytes", "model", "ratio"], lines)


def report_memory(worlds: list[int], rows: int, features: int) -> str:
    lines = []
    for world in worlds:
        for form in FORMS:
            found = max(on_ranks(world, measured_memory, form, rows, features))
            model = memory(form, Batch(world, rows, features))
            lines.append([str(world), form, f"{found / 2**20:.1f}", f"{model / 2**20:.1f}"])
    return table(["ranks", "form", "peak, MiB", "model, MiB"], lines)


def report_overlap(world: int, delay: float, sizes: list[tuple[int, int]]) -> str:
    lines = []
    for rows, features in sizes:
        of_ranks = on_ranks(world, measured_waiting, delay, rows, features)
        slept = [max(column) for column in zip(*of_ranks, strict=True)]
        lines.append(
            [str(rows), str(features), str(len(slept)), f"{1e3 * delay * len(slept):.0f}"]
            + [f"{1e3 * sum(slept):.0f}", f"{1e3 * slept[-1]:.0f}"]
        )
    head = ["rows each", "D", "passes", "delays, ms", "waited for, ms", "of it the last pass, ms"]
    return table(head, lines)


def report_simulation(rows: int, features: int, machine: Hardware) -> str:
    lines = []
    ranks = 2
    while ranks <= 1024:
        batch = Batch(ranks, rows, features)
        line = [f"{ranks:,}", f"{ranks * rows:,}"]
        for form in FORMS:
            found = simulate(form, batch, machine)
            sent = bytes_sent(form, batch, "nccl")
            line += [f"{sent / 2**20:,.0f}", f"{memory(form, batch) / 2**20:,.0f}"]
            line += [f"{1e3 * found.seconds:,.2f}", f"{found.waiting / found.seconds:.0%}"]
        lines.append(line)
        ranks *= 2
    head = ["GPUs", "batch"]
    for form in FORMS:
        head += [f"{form}: sent, MiB", "memory, MiB", "step, ms", "of it waiting"]
    return table(head, lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        "bench.scaling", description=(__doc__ or "").partition("\n")[0]
    )
    parser.add_argument("--simulate", action="store_true", help="measure nothing")
    options = parser.parse_args()
    if not options.simulate:
        print("Bytes that a rank sends in one step, Gloo, float32 (the rank that sends most):\n")
        print(report_bytes([2, 4], [(256, 64), (512, 128), (1024, 256)]))
        print(
            "\nPeak memory of a rank beside its rows, 1024 rows of 1024 features each, float32:\n"
        )
        print(report_memory([2, 4], 1024, 1024))
        print("\nA ring of 2 ranks whose links delay each block by 20 ms:\n")
        print(report_overlap(2, 0.02, [(64, 64), (512, 256), (1024, 512), (2048, 512)]))
    machine = Hardware()
    print(f"\nSIMULATED, not measured; no GPU has run it. {machine}")
    for rows in (1024, 8192):
        print(f"\n{rows} float32 rows of 512 features on each GPU:\n")
        print(report_simulation(rows, 512, machine))


if __name__ == "__main__":
    main()
