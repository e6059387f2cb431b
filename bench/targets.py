# SPDX-License-Identifier: Apache-2.0
"""The project's speed and memory targets, evaluated on the rows of a run."""

from dataclasses import dataclass

from bench.contenders import BARE, OURS
from bench.loss_table import PML, ST
from bench.measure import MIB
from bench.probes import PEAK_ROW
from bench.suite import Row
from bench.worker import FORWARD, STEP

PLAIN = "torch best"


@dataclass(frozen=True)
class Outcome:
    """One target and what came of it.

    Attributes:
        text: The target in words.
        figure: The measured figure, or why there is none.
        passed: True, False, or None if it was not measured.
        gap: By how much it was missed.
    """

    text: str
    figure: str
    passed: bool | None
    gap: str = ""

    @property
    def mark(self) -> str:
        """``pass``, ``MISS`` or ``not measured``."""
        return {True: "pass", False: "MISS", None: "not measured"}[self.passed]


@dataclass(frozen=True)
class Target:
    """A bound on a ratio of two medians of the same case.

    Attributes:
        kernel: Label of the case.
        n: Batch size.
        d: Features.
        peer: The contender compared with.
        bound: The ratio peer / ours must reach at least this, or, with ``at_most``, the ratio
            ours / peer must not exceed it.
        at_most: See ``bound``.
        largest: If the peer cannot do this size, take the largest that was measured.
    """

    kernel: str
    n: int
    d: int
    peer: str
    bound: float
    at_most: bool = False
    largest: bool = False

    def evaluate(self, rows: list[Row]) -> Outcome:
        """Looks the two medians up and compares their ratio with the bound."""
        case = f"{self.kernel} {STEP} N={self.n} D={self.d}"
        if self.at_most:
            text = f"{case}: at most {self.bound:g} x {self.peer}"
        else:
            text = f"{case}: at least {self.bound:g} x faster than {self.peer}"
        mode = FORWARD if self.peer == BARE else STEP
        n, why = self.size(rows, mode) if self.largest else (self.n, "")
        mine = lookup(rows, self.kernel, OURS, STEP, "time", n, self.d)
        theirs = lookup(rows, self.kernel, self.peer, mode, "time", n, self.d)
        for row in (mine, theirs):
            if row is None:
                return Outcome(text, "not part of this run", None)
            if row.p50 is None:
                return Outcome(text, f"{row.provider}: {row.note}", None)
        ratio = mine.p50 / theirs.p50 if self.at_most else theirs.p50 / mine.p50
        figure = f"{ratio:.2f} x" + (" (unsteady)" if mine.unsteady or theirs.unsteady else "")
        figure += why
        return compare(text, ratio, self.bound, self.at_most, figure)

    def size(self, rows: list[Row], mode: str) -> tuple[int, str]:
        """The batch size to compare at, and why it is not that of the target."""
        sizes = sorted(
            row.n
            for row in rows
            if (row.kernel, row.provider, row.mode, row.metric)
            == (self.kernel, self.peer, mode, "time")
            and row.d == self.d
            and row.p50 is not None
        )
        wanted = lookup(rows, self.kernel, self.peer, mode, "time", self.n, self.d)
        if wanted is None or wanted.p50 is not None or not sizes:
            return self.n, ""
        why = f" at N={sizes[-1]}, the largest measured of the peer (N={self.n}: {wanted.note})"
        return sizes[-1], why


TARGETS = (
    Target("triplet", 4096, 128, BARE, 0.35, at_most=True),
    Target("triplet", 4096, 512, BARE, 0.35, at_most=True),
    Target("triplet", 4096, 128, PML, 25),
    Target("triplet", 4096, 128, PLAIN, 10),
    Target("triplet", 4096, 512, PML, 15),
    Target("triplet", 4096, 512, PLAIN, 6),
    Target("contrastive (few)", 4096, 128, PML, 12),
    Target("contrastive (half)", 4096, 128, PML, 12),
    Target("triplet", 256, 128, PLAIN, 4),
    Target("triplet", 256, 128, PML, 10),
)
LOSS_TARGETS = (
    *(
        target
        for loss in (
            "InfoNCELoss",
            "InfoNCELoss, one batch",
            "SupConLoss",
            "MultiSimilarityLoss",
        )
        for target in (
            Target(loss, 4096, 128, PML, 10),
            Target(loss, 4096, 128, BARE, 1.2, at_most=True),
        )
    ),
    Target("NTXentLoss", 512, 128, PML, 500),
    Target("batch-all triplet", 4096, 128, ST, 20, largest=True),
    *(
        Target(loss, 2048, 128, PML, 5, largest=True)
        for loss in (
            "LiftedStructureLoss",
            "NPairsLoss",
            "RankedListLoss",
            "FastAPLoss",
            "MarginLoss",
        )
    ),
)
BATCH_ALL_MB = 100.0
PEAK_SHARE = 0.70
EMBEDDING_MULTIPLE = 4.0
LARGE_ROWS, LARGE_FEATURES = 32768, 128


def compare(text: str, value: float, bound: float, at_most: bool, figure: str) -> Outcome:
    """Makes the outcome of a comparison, with the relative gap if the target is missed."""
    passed = value <= bound if at_most else value >= bound
    if passed:
        return Outcome(text, figure, True)
    gap = value / bound - 1 if at_most else 1 - value / bound
    return Outcome(text, figure, False, f"missed by {100 * gap:.0f} %")


def lookup(
    rows: list[Row], kernel: str, provider: str, mode: str, metric: str, n: int, d: int
) -> Row | None:
    """Finds the row of that description, or None."""
    wanted = (kernel, provider, mode, metric, n, d)
    for row in rows:
        if (row.kernel, row.provider, row.mode, row.metric, row.n, row.d) == wanted:
            return row
    return None


def peak_outcomes(rows: list[Row]) -> list[Outcome]:
    """Holds the mining operator's rate against the peak measured beside it, for each D >= 256."""
    outcomes = []
    for row in rows:
        if row.kernel != "hardest" or row.provider != OURS or row.metric != "arithmetic rate":
            continue
        if row.d < 256:
            continue
        text = f"mining operator N={row.n} D={row.d}: at least {PEAK_SHARE:.0%} of the fp32 peak"
        peak = lookup(rows, "hardest", PEAK_ROW, FORWARD, "arithmetic rate", row.n, row.d)
        if row.p50 is None or peak is None or peak.p50 is None:
            outcomes.append(Outcome(text, row.note if row.p50 is None else "no peak", None))
            continue
        share = row.p50 / peak.p50
        figure = f"{share:.0%} ({row.p50:.0f} of {peak.p50:.0f} GFLOP/s, {peak.note})"
        outcomes.append(compare(text, share, PEAK_SHARE, False, figure))
    if not outcomes:
        text = f"mining operator D >= 256: at least {PEAK_SHARE:.0%} of the fp32 peak"
        outcomes.append(Outcome(text, "not part of this run", None))
    return outcomes


def memory_outcomes(rows: list[Row]) -> list[Outcome]:
    """Holds the extra memory at the large size against the bytes of the embeddings."""
    outcomes = []
    for kernel in ("triplet", "contrastive (few)"):
        size = f"N={LARGE_ROWS} D={LARGE_FEATURES}"
        text = f"{kernel} {STEP} {size}: extra memory at most {EMBEDDING_MULTIPLE:g} x embeddings"
        row = lookup(rows, kernel, OURS, STEP, "extra memory", LARGE_ROWS, LARGE_FEATURES)
        if row is None or row.p50 is None:
            outcomes.append(Outcome(text, row.note if row else "not part of this run", None))
            continue
        multiple = row.p50 * MIB / (4 * LARGE_ROWS * LARGE_FEATURES)
        figure = f"{multiple:.2f} x ({row.p50:.0f} MiB)"
        outcomes.append(compare(text, multiple, EMBEDDING_MULTIPLE, True, figure))
    return outcomes


def evaluate(rows: list[Row]) -> list[Outcome]:
    """Evaluates every target.

    Args:
        rows: Rows of the run.

    Returns:
        One outcome per target, those without a measurement included.
    """
    outcomes = [target.evaluate(rows) for target in TARGETS]
    return outcomes + peak_outcomes(rows) + memory_outcomes(rows)


def evaluate_losses(rows: list[Row]) -> list[Outcome]:
    """Evaluates the targets of the table of losses.

    Args:
        rows: Rows of the run.

    Returns:
        One outcome per target, those without a measurement included.
    """
    outcomes = [target.evaluate(rows) for target in LOSS_TARGETS]
    kernel, n, d = "batch-all triplet", 4096, 128
    text = f"{kernel} {STEP} N={n} D={d}, 64 per class: extra memory below {BATCH_ALL_MB:g} MB"
    row = lookup(rows, kernel, OURS, STEP, "extra memory", n, d)
    if row is None or row.p50 is None:
        outcomes.append(Outcome(text, row.note if row else "not part of this run", None))
    else:
        taken = row.p50 * MIB / 1e6
        outcomes.append(compare(text, taken, BATCH_ALL_MB, True, f"{taken:.1f} MB"))
    return outcomes
