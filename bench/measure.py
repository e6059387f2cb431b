# SPDX-License-Identifier: Apache-2.0
"""How time and memory are measured: clocks, percentiles, resident memory, interleaving."""

import ctypes
import gc
import math
import resource
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

STATUS = Path("/proc/self/status")
MIB = 2**20
# A block of calls this long hides the message that starts it and the cold caches left behind
# by the contender before.
BLOCK_SECONDS = 0.02
SLOW_SECONDS = 5.0


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile of a sample."""

    p50: float
    p20: float
    p80: float


def percentile(values: list[float], share: float) -> float:
    """Interpolates linearly between the order statistics.

    Args:
        values: At least one number.
        share: Between 0 and 1.

    Returns:
        The percentile.
    """
    if not values:
        raise ValueError("values: expected at least one measurement, got none")
    ordered = sorted(values)
    position = share * (len(ordered) - 1)
    low = math.floor(position)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (position - low) * (ordered[high] - ordered[low])


def spread(values: list[float]) -> Spread:
    """Summarises a sample by p50, p20 and p80."""
    return Spread(percentile(values, 0.5), percentile(values, 0.2), percentile(values, 0.8))


def time_calls(call: Callable[[], object], reset: Callable[[], None], count: int) -> list[float]:
    """Times single calls by the wall clock.

    A block of several short calls begins with an untimed one, because another contender has just
    filled the caches; beside a call long enough to be its own block that does not show.

    Args:
        call: What is timed.
        reset: Runs before each call, untimed.
        count: Number of timed calls.

    Returns:
        Seconds of each call.
    """
    seconds = []
    gc.collect()
    gc.disable()
    try:
        for _ in range(count + (count > 1)):
            reset()
            start = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - start)
    finally:
        gc.enable()
    return seconds[-count:]


def resident(key: str) -> int:
    """Reads a field such as VmRSS, VmHWM or VmSize of this process, in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise KeyError(f"{key} is not in {STATUS}")


def extra_memory(call: Callable[[], object]) -> tuple[int, float] | None:
    """Runs a call once and reads by how much the resident set grew at its peak.

    Free heap is handed back first (malloc_trim), then the kernel's high-water mark is reset
    (writing 5 to clear_refs), so the figure is peak VmHWM minus VmRSS before the call. Buffers
    that the call returns, and gradients, count as extra.

    Args:
        call: What is measured.

    Returns:
        Bytes and the seconds the call took, or None where /proc does not offer the fields.
    """
    if not STATUS.exists():
        return None
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None
    before = resident("VmRSS")
    start = time.perf_counter()
    call()
    seconds = time.perf_counter() - start
    return max(0, resident("VmHWM") - before), seconds


def available_memory() -> int:
    """Bytes that a new process could use: MemAvailable, less if a cgroup caps it."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))
    limit, used = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")
    if limit.exists() and used.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()) - int(used.read_text()))
    return free


def allowance(most: int | None = None) -> int:
    """Bytes that a contender may use: 90 % of what is free, and at most ``most``."""
    free = int(0.9 * available_memory())
    return free if most is None else min(free, most)


def cap_memory(bytes_allowed: int) -> None:
    """Makes allocations beyond the allowance fail in this process instead of on the machine."""
    soft = resident("VmSize") + bytes_allowed
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    if hard == resource.RLIM_INFINITY or soft < hard:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def plan(seconds: float, budget: float, least: int = 3) -> tuple[int, int]:
    """Chooses how often to time a call.

    Args:
        seconds: What one call is known to take.
        budget: Seconds to spend on it.
        least: Least number of calls, unless one takes more than five seconds: then three.

    Returns:
        Number of blocks and calls per block; at least three calls in all, at most 300.
    """
    seconds = max(seconds, 1e-7)
    least = least if seconds <= SLOW_SECONDS else 3
    calls = min(max(int(budget / seconds), least), 300)
    block = min(max(int(BLOCK_SECONDS / seconds), 1), max(calls // 10, 1))
    return -(-calls // block), block


def interleave(blocks: dict[str, int]) -> list[str]:
    """Orders blocks so that every contender is spread over the whole run: A B C A B C ...

    Args:
        blocks: Number of blocks of each contender.

    Returns:
        Names in running order; each occurs as often as it has blocks.
    """
    rounds = max(blocks.values(), default=0)
    order = []
    for turn in range(rounds):
        for name, count in blocks.items():
            if turn * count // rounds != (turn + 1) * count // rounds:
                order.append(name)
    return order


@dataclass(frozen=True)
class Known:
    """What a contender has shown at one size."""

    n: int
    d: int
    seconds: float
    extra_bytes: int
    mode: str = ""


def forecast(known: list[Known], n: int, d: int, power: int = 2) -> Known | None:
    """Scales the nearest smaller case, by default quadratically in N, and linearly in D.

    Args:
        known: Cases of the same contender and loss.
        n: Batch size ahead.
        d: Features ahead.
        power: Exponent of N.

    Returns:
        Expected seconds and bytes, or None if no case is at most as large in N.
    """
    smaller = [item for item in known if item.n <= n]
    if not smaller:
        return None
    # Among equally near ones the slowest: the training step, not the forward pass.
    nearest = max(smaller, key=lambda item: (item.n, -abs(math.log(item.d / d)), item.seconds))
    grow = (n / nearest.n) ** power
    seconds = nearest.seconds * grow * max(d / nearest.d, 1.0)
    return Known(n, d, seconds, int(nearest.extra_bytes * grow))
