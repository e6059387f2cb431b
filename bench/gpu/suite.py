# SPDX-License-Identifier: Apache-2.0
"""Runs the gate and the cases on the device, and collects the rows of the report."""

import time
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from bench.gpu import rows as kinds
from bench.gpu.cases import FORWARD, GpuCase
from bench.gpu.contenders import BARE, BEST, COMPILED, CONTENDERS, OURS
from bench.gpu.harness import Failure
from bench.gpu.rows import Row, row_of
from bench.gpu.worker import Death, Worker
from bench.measure import MIB, Spread, spread
from bench.suite import say

ROUNDS = 5
FEWEST, MOST = 20, 200
FEWEST_LATE = 4  # so many are kept where the time limit of the run cuts a case short
# A process that a faulty kernel ended takes seconds to replace; after this many its author is
# better served by the sanitizer.
MOST_DEATHS = 2
MOST_STARTS = 8
# How reasons begin that are faults of a contender.
FAULTS = ("failed", "wrong", "no answer", "not installed")


@dataclass(frozen=True)
class Options:
    """How a run is limited.

    Attributes:
        dry_run: Take the fake device.
        seconds: After these no new case starts, and a running one ends early.
        budget: Seconds of timing per contender and case.
        max_seconds: A contender whose single call takes longer is not timed.
    """

    dry_run: bool = False
    seconds: float = 170.0
    budget: float = 0.2
    max_seconds: float = 3.0


@dataclass
class Results:
    """What a run has found.

    Attributes:
        facts: Device and library.
        peaks: Rates of the machine, see ``bench.gpu.device``.
        verdicts: Gate by kernel, precision and contender: passed, and in words.
        rows: All figures.
        failed: Our own contenders that were wrong, in words.
    """

    facts: dict[str, str] = field(default_factory=dict)
    peaks: dict[str, float] = field(default_factory=dict)
    verdicts: dict[tuple[str, str, str], tuple[bool, str]] = field(default_factory=dict)
    rows: list[Row] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


class Expired(Failure):
    """The time limit of the run was reached."""


def plan(seconds: float, budget: float) -> int:
    """Chooses how many calls to time in each round.

    Args:
        seconds: What one call is known to take.
        budget: Seconds to spend on it.

    Returns:
        Calls per round, at least one: in all at least 20 unless those take over four budgets.
    """
    seconds = max(seconds, 1e-7)
    calls = min(max(budget / seconds, FEWEST), MOST, 4 * budget / seconds)
    return max(1, round(calls / ROUNDS))


class Suite:
    """One run."""

    def __init__(
        self, options: Options, start: Callable[..., Any] = Worker, clock: Any = time.monotonic
    ) -> None:
        """Starts with nothing measured; the process starts when it is first needed."""
        self.options = options
        self.results = Results()
        self._start, self._clock = start, clock
        self._deadline = clock() + options.seconds
        self._worker: Any = None
        self._starts = 0
        self._open: GpuCase | None = None
        self._loaded: set[str] = set()
        self._deaths: Counter[tuple[str, str]] = Counter()

    def run(self, cases: list[GpuCase]) -> None:
        """Measures the machine and all cases; an interruption keeps what there is."""
        try:
            self.machine()
            for number, case in enumerate(cases, 1):
                say(f"[{number}/{len(cases)}] {case.title}")
                self.measure(case)
        except KeyboardInterrupt:
            say("interrupted: the report holds what was measured until now")
        finally:
            self.close()

    def close(self) -> None:
        """Ends the process."""
        if self._worker is not None:
            self._worker.close()
        self._forget()

    def _forget(self) -> None:
        self._worker, self._open = None, None
        self._loaded.clear()

    def machine(self) -> None:
        """Facts and peaks of the machine."""
        try:
            self.results.facts = self._send("facts")
            self.results.peaks = self._send("peaks")
        except Failure as failure:
            self.results.facts.setdefault("gpu", f"no figures: {failure}")
            say(f"machine: {failure}")
        for name, rate in self.results.peaks.items():
            unit = "GB/s" if name == "copy" else "TFLOP/s"
            value = rate / (1e9 if name == "copy" else 1e12)
            where = (kinds.MACHINE, kinds.PEAK, kinds.MACHINE, name, FORWARD, 0, 0, kinds.PEAK)
            self.results.rows.append(Row(*where, unit, value, note="measured in this run"))

    def _send(self, order: str, *arguments: Any, limit: float = 60.0) -> Any:
        """Sends an order to the process, which is started if there is none."""
        left = self._deadline - self._clock()
        if left <= 0:
            raise Expired("skipped (the time limit of the run was reached)")
        try:
            if self._worker is None:
                if self._starts == MOST_STARTS:
                    raise Failure(f"skipped (the device was lost {MOST_STARTS} times)")
                self._starts += 1
                self._worker = self._start(self.options.dry_run)
            return self._worker.ask(order, *arguments, limit=min(limit, left + 10))
        except Death:
            self._forget()
            raise

    def ask(self, case: GpuCase, name: str, order: str, *arguments: Any) -> Any:
        """Has a contender do something on a case, with everything it needs for that.

        Raises:
            Failure: It cannot.
        """
        if self._deaths[case.kernel, name] >= MOST_DEATHS:
            raise Failure(f"skipped (it ended the process of the device {MOST_DEATHS} times)")
        limit = 150.0 if CONTENDERS[name].compiled else 60.0
        if self._open != case:
            self._loaded.clear()
            self._open = None
            self._send("open", case)
            self._open = case
        try:
            if order != "first" and name not in self._loaded:
                self._send("first", name, limit=limit)
            result = self._send(order, name, *arguments, limit=limit)
        except Failure as failure:
            self._loaded.discard(name)
            # A failed capture ends the process too, but by our own caution.
            if isinstance(failure, Death) and order != "replay":
                self._deaths[case.kernel, name] += 1
            raise
        self._loaded.add(name)
        return result

    def gate(self, case: GpuCase, name: str) -> tuple[bool, str]:
        """Judges a contender on the small batch, once per kernel and precision."""
        contender = CONTENDERS[name]
        key = (case.kernel, case.precision, name)
        if key in self.results.verdicts:
            return self.results.verdicts[key]
        if not contender.judged:
            verdict = True, "no loss to judge"
        elif contender.compiled:
            verdict = True, "judged at full size only, where it is compiled anyway"
        else:
            try:
                # The import of a peer may take long.
                passed, text = self._send("gate", case.kernel, case.precision, name, limit=90.0)
                verdict = passed, text if passed else f"failed the gate: {text}"
            except Failure as failure:
                verdict = False, str(failure)
                if isinstance(failure, Death):
                    self._deaths[case.kernel, name] += 1
            if not verdict[0]:
                self._blame(f"{case.kernel} {case.precision}", name, verdict[1])
        self.results.verdicts[key] = verdict
        say(f"gate {case.kernel} {case.precision}: {name}: {verdict[1]}")
        return verdict

    def _blame(self, where: str, name: str, reason: str) -> None:
        """Notes a fault of ours, as opposed to what was skipped or is not in this build."""
        if CONTENDERS[name].ours and reason.startswith(FAULTS):
            self.results.failed.append(f"{where}, {name}: {reason}")

    def refuse(self, case: GpuCase, name: str, reason: str) -> None:
        """Enters a contender without figures, with the reason."""
        say(f"  {name}: {reason}")
        if self.results.verdicts.get((case.kernel, case.precision, name), (True,))[0]:
            self._blame(case.title, name, reason)
        self.results.rows.append(row_of(case, name, kinds.TIME, "ms", reason))
        self.results.rows.append(row_of(case, name, kinds.MEMORY, "MiB", reason))

    def measure(self, case: GpuCase) -> None:
        """Measures a case: gate, first calls, then times with contenders taking turns."""
        began = self._clock()
        firsts: dict[str, dict[str, Any]] = {}
        for name in case.contenders:
            if case.kernel not in CONTENDERS[name].build:
                continue
            passed, text = self.gate(case, name)
            if not passed:
                self.refuse(case, name, text)
                continue
            try:
                firsts[name] = self.first(case, name)
            except Failure as failure:
                self.refuse(case, name, str(failure))
        samples = self.times(case, firsts)
        self.enter(case, firsts, samples)
        if not case.group.startswith("sweep"):
            self.moved(case, list(samples))
        if case.launches:
            self.launched(case, list(samples))
        say(f"  {self._clock() - began:.1f} s")

    def first(self, case: GpuCase, name: str) -> dict[str, Any]:
        """First calls of a contender; raises Failure if it is not to be timed."""
        found: dict[str, Any] = self.ask(case, name, "first")
        if found["wrong"]:
            raise Failure(found["wrong"])
        if found["seconds"] > self.options.max_seconds:
            limit = self.options.max_seconds
            raise Failure(f"skipped (one call took {found['seconds']:.1f} s, limit {limit:g} s)")
        return found

    def times(self, case: GpuCase, firsts: dict[str, dict[str, Any]]) -> dict[str, list[float]]:
        """Times all contenders in rounds, so that a drift of the clocks meets all of them."""
        samples: dict[str, list[float]] = defaultdict(list)
        calls = {name: plan(f["seconds"], self.options.budget) for name, f in firsts.items()}
        for _ in range(ROUNDS):
            for name in list(calls):
                try:
                    samples[name] += self.ask(case, name, "time", calls[name])
                except Failure as failure:
                    del calls[name]
                    if isinstance(failure, Expired) and len(samples[name]) >= FEWEST_LATE:
                        continue
                    samples.pop(name, None)
                    self.refuse(case, name, str(failure))
        return dict(samples)

    def enter(
        self, case: GpuCase, firsts: dict[str, dict[str, Any]], samples: dict[str, list[float]]
    ) -> None:
        """Adds times, rates and memory of a case."""
        mine = spread(samples[OURS]).p50 if OURS in samples else None
        my_extra = firsts[OURS]["extra"] if OURS in firsts else None
        for name, seconds in samples.items():
            s = spread(seconds)
            self._add(case, name, kinds.TIME, "ms", s, 1e3, s.p50 / mine if mine else None)
            flops = 2.0 * case.n**2 * case.d if name == BARE else case.flops
            # A fast call is a high rate: the 20th percentile of time is the 80th of rate.
            rate = Spread(flops / s.p50, flops / s.p80, flops / s.p20)
            self._add(case, name, kinds.RATE, "TFLOP/s", rate, 1e-12)
            extra = firsts[name]["extra"]
            row = row_of(case, name, kinds.MEMORY, "MiB")
            row.p50 = extra / MIB
            row.ratio_to_ours = extra / my_extra if my_extra else None
            row.note = f"{extra / case.embedding_bytes:.2f} x the embeddings"
            self.results.rows.append(row)

    def _add(
        self,
        case: GpuCase,
        name: str,
        metric: str,
        unit: str,
        s: Spread,
        scale: float,
        ratio: float | None = None,
        note: str = "",
    ) -> None:
        row = row_of(case, name, metric, unit, note)
        row.p50, row.p20, row.p80 = s.p50 * scale, s.p20 * scale, s.p80 * scale
        row.ratio_to_ours = ratio
        self.results.rows.append(row)

    def moved(self, case: GpuCase, names: list[str]) -> None:
        """Adds the bytes that operators move, for the roofline."""
        for name in names:
            row = row_of(case, name, kinds.TRAFFIC, "MiB")
            if name == COMPILED:
                continue  # what it fuses cannot be seen from outside
            try:
                row.p50 = self.ask(case, name, "traffic") / MIB
            except Failure as failure:
                row.note = str(failure)
            self.results.rows.append(row)

    def launched(self, case: GpuCase, names: list[str]) -> None:
        """Adds launches and device time of a step that is too short for the host to keep up."""
        for name in names:
            row = row_of(case, name, kinds.LAUNCHES, "a call")
            self.results.rows.append(row)
            try:
                found = self.ask(case, name, "launches")
            except Failure as failure:
                row.note = str(failure)
                continue
            if found is None:
                row.note = "the profiler saw no kernel (is CUPTI usable here?)"
                continue
            row.p50, row.note = found["kernels"] + found["copies"], found["text"]
            busy = found["busy_seconds"]
            self._add(case, name, kinds.KERNEL_TIME, "us", Spread(busy, busy, busy), 1e6)
        for name in names:
            if not CONTENDERS[name].ours and name != BEST:
                continue  # others wait for the device, which no graph can hold
            try:
                s = spread(self.ask(case, name, "replay"))
            except Failure as failure:
                note = f"no graph: {failure}"
                self.results.rows.append(row_of(case, name, kinds.DEVICE_TIME, "us", note))
                continue
            self._add(case, name, kinds.DEVICE_TIME, "us", s, 1e6, note="graph replay")
