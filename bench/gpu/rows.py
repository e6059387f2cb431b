# SPDX-License-Identifier: Apache-2.0
"""The figures of a run, one per row, and how rows are found again."""

from dataclasses import dataclass

from bench.gpu.cases import FORWARD, GpuCase
from bench.gpu.contenders import BARE

UNSTEADY = 1.5
TIME, RATE, MEMORY = "time", "effective rate", "extra memory"
LAUNCHES, DEVICE_TIME, KERNEL_TIME = "kernel launches", "device time", "kernel time"
TRAFFIC, PEAK = "operator traffic", "peak"
MACHINE = "machine"


@dataclass
class Row:
    """One figure, or the reason why there is none; the CSV has one line per row."""

    group: str
    kernel: str
    provider: str
    precision: str
    mode: str
    n: int
    d: int
    metric: str
    unit: str
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    ratio_to_ours: float | None = None
    note: str = ""

    @property
    def unsteady(self) -> bool:
        """Whether the spread of a time is too wide to trust ratios with it."""
        known = self.p20 is not None and self.p80 is not None
        return self.metric == TIME and known and self.p80 > UNSTEADY * self.p20


def row_of(case: GpuCase, provider: str, metric: str, unit: str, note: str = "") -> Row:
    """An empty row of a case."""
    mode = FORWARD if provider == BARE else case.mode
    where = (case.group, case.label, provider, case.precision, mode, case.n, case.d)
    return Row(*where, metric, unit, note=note)


def lookup(
    rows: list[Row],
    group: str,
    kernel: str,
    provider: str,
    metric: str,
    precision: str,
    n: int,
    d: int,
) -> Row | None:
    """Finds the row of that description, or None."""
    wanted = (group, kernel, provider, metric, precision, n, d)
    for row in rows:
        found = (row.group, row.kernel, row.provider, row.metric, row.precision, row.n, row.d)
        if found == wanted:
            return row
    return None
