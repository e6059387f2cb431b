# SPDX-License-Identifier: Apache-2.0
"""Counts kernel launches in a profile."""

from collections import Counter
from dataclasses import dataclass
from typing import Any

COPIES = ("gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Launches:
    """What the device was asked to do in one call.

    Attributes:
        kernels: Kernels launched.
        ours: Those of them that belong to this library.
        copies: Copies and fills by the copy engine or the driver.
        busy_seconds: Sum of the kernels' own durations.
        names: Launches of a call by kernel name.
    """

    kernels: float
    ours: float
    copies: float
    busy_seconds: float
    names: dict[str, float]

    @property
    def text(self) -> str:
        """The launches in words."""
        parts = [f"{number:g} x {short(name)}" for name, number in self.names.items()]
        return f"{self.ours:g} ours, {self.copies:g} copies or fills; " + ", ".join(parts)


def short(name: str) -> str:
    """A kernel's name without return type, namespaces, template arguments and parameters."""
    name = name.replace("(anonymous namespace)::", "")
    for mark in ("<", "("):
        name = name.split(mark, 1)[0]
    return name.split()[-1].rsplit("::", 1)[-1] if name.split() else "unnamed"


def count_launches(trace: dict[str, Any], calls: int) -> Launches | None:
    """Reads a trace that ``torch.profiler`` exported.

    Args:
        trace: The exported JSON object.
        calls: How many equal calls it holds.

    Returns:
        Means per call, or None if the trace holds no kernel at all: the profiler then saw nothing,
        which must not pass for a program without launches.
    """
    if calls < 1:
        raise ValueError(f"calls: expected at least 1, got {calls}")
    names: Counter[str] = Counter()
    copies, busy = 0, 0.0
    for event in trace.get("traceEvents", ()):
        category = str(event.get("cat", "")).lower()
        if category == "kernel":
            names[str(event.get("name", ""))] += 1
            busy += float(event.get("dur", 0.0)) * 1e-6
        elif category in COPIES:
            copies += 1
    if not names:
        return None
    ours = sum(number for name, number in names.items() if "flashmetric" in name)
    return Launches(
        sum(names.values()) / calls,
        ours / calls,
        copies / calls,
        busy / calls,
        {name: number / calls for name, number in names.most_common()},
    )
