# SPDX-License-Identifier: Apache-2.0
"""The targets on a GPU, evaluated on the rows of a run."""

from dataclasses import dataclass

from bench.gpu import rows as kinds
from bench.gpu.cases import BFLOAT16, FLOAT32, PRECISIONS
from bench.gpu.contenders import BARE, BEST, OURS, PML
from bench.gpu.rows import Row, lookup
from bench.measure import MIB
from bench.report import number

MET, MISSED, UNKNOWN, MADE_UP = "met", "MISSED", "not yet measured", "DRY RUN"


@dataclass(frozen=True)
class Outcome:
    """One target and what came of it.

    Attributes:
        text: The target in words.
        figure: The measured figure, or why there is none.
        mark: ``met``, ``MISSED``, ``not yet measured``, or ``DRY RUN``.
        gap: By how much it was missed.
    """

    text: str
    figure: str
    mark: str
    gap: str = ""


@dataclass(frozen=True)
class Target:
    """A bound on a figure of one case.

    Attributes:
        group: Group of the case.
        kernel: Label of the case.
        n: Batch size.
        d: Features.
        precision: Precision of the case.
        what: ``"rate"``, ``"times"`` (peer over ours), ``"share"`` (ours over peer),
            ``"device time"``, ``"launches"`` or ``"memory"``.
        bound: The figure must be at least this; for the last four of these at most.
        peer: Whom ``"times"`` and ``"share"`` compare with.
    """

    group: str
    kernel: str
    n: int
    d: int
    precision: str
    what: str
    bound: float
    peer: str = ""

    @property
    def at_most(self) -> bool:
        """Whether the bound is an upper one."""
        return self.what not in ("rate", "times")

    @property
    def text(self) -> str:
        """The target in words."""
        kind = {"hardest": "batch-hard selection"}.get(self.kernel, f"{self.kernel} fwd+bwd")
        words = {
            "rate": f"at least {self.bound:g} TFLOP/s effective",
            "times": f"at least {self.bound:g} x faster than {self.peer}",
            "share": f"at most {self.bound:g} x {self.peer}",
            "device time": f"device time at most {self.bound:g} us",
            "launches": f"at most {self.bound:g} launches",
            "memory": f"extra memory at most {self.bound:g} x the embeddings",
        }
        return f"{kind} N={self.n} D={self.d} {self.precision}: {words[self.what]}"

    def find(self, rows: list[Row], provider: str, metric: str) -> Row | None:
        """The row of the target's case."""
        where = (self.precision, self.n, self.d)
        return lookup(rows, self.group, self.kernel, provider, metric, *where)

    def evaluate(self, rows: list[Row]) -> Outcome:
        """Looks the figures up and holds them against the bound."""
        metric = {
            "rate": kinds.RATE,
            "device time": kinds.DEVICE_TIME,
            "launches": kinds.LAUNCHES,
            "memory": kinds.MEMORY,
        }.get(self.what, kinds.TIME)
        found = [self.find(rows, OURS, metric)]
        if found[0] is None:  # a contender without a time has no rate either, and its time says why
            found = [self.find(rows, OURS, kinds.TIME)]
        if self.peer:
            found.append(self.find(rows, self.peer, metric))
        for row in found:
            if row is None:
                return Outcome(self.text, "not part of this run", UNKNOWN)
            if row.p50 is None or row.metric != metric:
                return Outcome(self.text, f"{row.provider}: {row.note}", UNKNOWN)
        values = [row.p50 for row in found if row is not None and row.p50 is not None]
        value, figure = self._figure(values)
        if any(row.unsteady for row in found if row is not None):
            figure += " (unsteady)"
        passed = value <= self.bound if self.at_most else value >= self.bound
        if passed:
            return Outcome(self.text, figure, MET)
        gap = value / self.bound - 1 if self.at_most else 1 - value / self.bound
        return Outcome(self.text, figure, MISSED, f"by {100 * gap:.0f} %")

    def _figure(self, values: list[float]) -> tuple[float, str]:
        if self.what == "times":
            value = values[1] / values[0]
            return value, f"{number(value)} x"
        if self.what == "share":
            value = values[0] / values[1]
            return value, f"{number(value)} x"
        if self.what == "memory":
            batch = self.n * self.d * PRECISIONS[self.precision].dtype.itemsize
            value = values[0] * MIB / batch
            return value, f"{value:.2f} x"
        unit = {"rate": " TFLOP/s", "device time": " us"}.get(self.what, "")
        return values[0], number(values[0]) + unit


_B, _F = BFLOAT16.name, FLOAT32.name
TARGETS = (
    Target("selection", "hardest", 32768, 256, _B, "rate", 350),
    Target("selection", "hardest", 32768, 256, _F, "rate", 110),
    Target("triplet", "triplet", 8192, 512, _B, "share", 1.0, BARE),
    Target("triplet", "triplet", 8192, 512, _B, "times", 20, PML),
    Target("contrastive", "contrastive (half)", 8192, 128, _F, "times", 10, BEST),
    Target("contrastive", "contrastive (few)", 8192, 128, _F, "times", 10, BEST),
    Target("step", "triplet", 512, 128, _F, "device time", 60),
    Target("step", "triplet", 512, 128, _F, "launches", 3),
    Target("memory", "triplet", 131072, 128, _F, "memory", 4),
    Target("memory", "contrastive (few)", 131072, 128, _F, "memory", 4),
)


def evaluate(rows: list[Row], made_up: bool = False) -> list[Outcome]:
    """Evaluates every target.

    Args:
        rows: Rows of the run.
        made_up: Whether the rows come from the fake device: then no target is met or missed.

    Returns:
        One outcome per target, those without a measurement included.
    """
    outcomes = [target.evaluate(rows) for target in TARGETS]
    if not made_up:
        return outcomes
    return [o if o.mark == UNKNOWN else Outcome(o.text, o.figure, MADE_UP) for o in outcomes]
