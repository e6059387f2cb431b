# SPDX-License-Identifier: Apache-2.0
"""Runs the gate and the cases, and collects the rows of the report."""

import math
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field

import torch

from bench import loss_table
from bench.cases import Case, Setting, draw, settle
from bench.contenders import BARE, CONTENDERS, OURS, Contender, contenders_of
from bench.gate import LIMITS, Verdict, disagreement, gate_case, judge, truth
from bench.measure import (
    MIB,
    SLOW_SECONDS,
    Known,
    allowance,
    forecast,
    interleave,
    plan,
    spread,
)
from bench.worker import FORWARD, STEP, Failure, Task, Worker, preload

PEER = "torch best"
UNSTEADY = 1.5
# Threads of the contender before spin for some 3 ms after its last parallel region.
PAUSE_SECONDS = 0.005
# A call as long as this need not be repeated to plan how often to time it.
LONG_SECONDS = 1.0


@dataclass(frozen=True)
class Options:
    """How a run is limited.

    Attributes:
        threads: Threads of every contender.
        budget: Seconds of timing per contender, mode and case.
        max_seconds: A contender whose single call takes longer is skipped.
        interpreters: Other Python interpreters by the key that contenders name.
        without: Names of contenders that are left out.
        least: Least number of timed calls; three of those that take more than five seconds.
        memory: Most bytes that a contender may use; None for 90 % of what is free.
        steps_only: Only training steps, in turns with the bare product.
    """

    threads: int
    budget: float = 1.0
    max_seconds: float = 5.0
    interpreters: dict[str, str] = field(default_factory=dict)
    without: frozenset[str] = frozenset()
    least: int = 3
    memory: int | None = None
    steps_only: bool = False


@dataclass
class Row:
    """One figure, or the reason why there is none; the CSV has one line per row."""

    kernel: str
    provider: str
    mode: str
    metric: str
    unit: str
    n: int
    d: int
    p50: float | None = None
    p20: float | None = None
    p80: float | None = None
    ratio_to_ours: float | None = None
    note: str = ""

    @property
    def unsteady(self) -> bool:
        """Whether the spread of a time is too wide to trust ratios with it."""
        return self.metric == "time" and self.p20 is not None and self.p80 > UNSTEADY * self.p20


def say(text: str) -> None:
    """Prints progress, apart from the report on standard output."""
    print(text, file=sys.stderr, flush=True)


def differs(reply: dict, mine: dict) -> str:
    """What a peer of the table of losses computes otherwise at full size, in words."""
    if STEP not in reply:
        return ""
    return disagreement(reply[STEP], mine[STEP]).replace("wrong", "differs")


class Suite:
    """One run: what passed the gate, what is known so far, and the rows."""

    def __init__(self, options: Options) -> None:
        """Starts with nothing measured."""
        self.options = options
        self.rows: list[Row] = []
        self.verdicts: dict[tuple[str, str], Verdict] = {}
        self.settings: dict[Case, Setting] = {}
        self.known: dict[tuple[str, str], list[Known]] = defaultdict(list)
        preload(c for c in CONTENDERS if c.name not in options.without)

    def contenders(self, kernel: str) -> list[Contender]:
        """The contenders of a kernel that were not left out."""
        return [c for c in contenders_of(kernel) if c.name not in self.options.without]

    def start(self, contender: Contender, case: Case) -> Worker:
        """Starts a worker and waits until its loss is ready; raises Failure."""
        interpreter = self.options.interpreters.get(contender.python)
        margin, memory = self.settings[case].margin, self.options.memory
        task = Task(contender.name, case, margin, self.options.threads, memory)
        worker = Worker(task, interpreter)
        try:
            worker.wait(300.0)
        except Failure:
            worker.close()
            raise
        return worker

    def gate(self, kernel: str) -> None:
        """Judges every contender of a kernel on a small case against the float64 truth."""
        case = gate_case(kernel)
        self.settings[case] = settle(case)
        x, labels = draw(case)
        expected = truth(kernel, x, labels, self.settings[case].margin)
        for contender in self.contenders(kernel):
            if contender.name == BARE:
                verdict = Verdict(True, "no loss to judge")
            else:
                peer = loss_table.peer(kernel, contender.name)
                own = expected
                if peer and peer.judged_by:
                    own = truth(peer.judged_by, x, labels, self.settings[case].margin)
                verdict = self.examine(contender, case, own, peer and peer.limits)
            self.verdicts[kernel, contender.name] = verdict
            say(f"gate {kernel}: {contender.name}: {verdict.text}")

    def examine(
        self,
        contender: Contender,
        case: Case,
        expected: tuple,
        limits: tuple[float, float] | None = None,
    ) -> Verdict:
        """Judges one contender."""
        try:
            worker = self.start(contender, case)
        except Failure as failure:
            return Verdict(False, str(failure))
        try:
            reply = worker.ask("values", FORWARD if case.kernel == "hardest" else STEP)
        except Failure as failure:
            return Verdict(False, str(failure))
        finally:
            worker.close()
        grad = None if reply["grad"] is None else torch.tensor(reply["grad"])
        verdict = judge(torch.tensor(reply["result"]), grad, expected, limits or LIMITS)
        text = verdict.text if verdict.passed else f"failed the gate: {verdict.text}"
        if contender.package:
            text = f"{text}; {reply['package']}"
        return Verdict(verdict.passed, text, tuple(reply["operators"]))

    def run(self, case: Case) -> None:
        """Measures a case: memory on each contender's first call, then time, interleaved."""
        started = time.perf_counter()
        self.settings[case] = settle(case)
        workers: dict[str, Worker] = {}
        firsts: dict[str, dict] = {}
        try:
            for contender in self.contenders(case.kernel):
                try:
                    workers[contender.name], firsts[contender.name] = self.first(contender, case)
                except Failure as failure:
                    self.refuse(contender, case, str(failure))
            self.cross_check(case, workers, firsts)
            if self.options.steps_only:
                self.time(
                    case, {name: next(iter(firsts[name])) for name in workers}, workers, firsts
                )
            else:
                for mode in (FORWARD, STEP):
                    chosen = {name: mode for name in workers if mode in firsts[name]}
                    self.time(case, chosen, workers, firsts)
        finally:
            for worker in workers.values():
                worker.close()
        say(f"{case.title}: {time.perf_counter() - started:.0f} s")

    def modes(self, contender: Contender) -> tuple[str, ...]:
        """The modes in which a contender runs, the one with more memory first."""
        if not contender.differentiable:
            return (FORWARD,)
        return (STEP,) if self.options.steps_only else (STEP, FORWARD)

    def refuse(self, contender: Contender, case: Case, reason: str) -> None:
        """Enters a contender without figures, with the reason."""
        for mode in self.modes(contender):
            where = (case.label, contender.name, mode)
            self.rows.append(Row(*where, "time", "ms", case.n, case.d, note=reason))
            self.rows.append(Row(*where, "extra memory", "MiB", case.n, case.d, note=reason))

    def first(self, contender: Contender, case: Case) -> tuple[Worker, dict]:
        """Starts a contender on a case and takes its first calls; raises Failure."""
        verdict = self.verdicts[case.kernel, contender.name]
        if not verdict.passed:
            raise Failure(verdict.text)
        limit, free = self.options.max_seconds, allowance(self.options.memory)
        peer = loss_table.peer(case.kernel, contender.name)
        known = self.known[case.label, contender.name]
        ahead = forecast(known, case.n, case.d, peer.grows if peer else 2)
        if ahead and ahead.extra_bytes > free:
            need = f"{ahead.extra_bytes / 2**30:.1f} GiB expected, {free / 2**30:.1f} GiB allowed"
            raise Failure(f"out of memory ({need})")
        # A forecast can be a factor of two off; in doubt one call decides.
        if ahead and ahead.seconds > 2 * limit:
            raise Failure(f"skipped (expected {ahead.seconds:.0f} s a call, limit {limit:g} s)")
        worker = self.start(contender, case)
        replies = {}
        try:
            for mode in self.modes(contender):
                replies[mode] = reply = worker.ask("memory", mode, limit=max(20 * limit, 60.0))
                seen = Known(case.n, case.d, reply["seconds"], reply["extra"] or 0, mode)
                self.known[case.label, contender.name].append(seen)
                if seen.seconds > limit:
                    took = f"one call took {seen.seconds:.1f} s, limit {limit:g} s"
                    raise Failure(f"skipped ({took})")
        except Failure:
            worker.close()
            raise
        return worker, replies

    def cross_check(self, case: Case, workers: dict[str, Worker], firsts: dict[str, dict]) -> None:
        """Drops contenders that disagree at full size with the plain PyTorch form."""
        reference = firsts.get(PEER, {}).get(STEP)
        for contender in self.contenders(case.kernel):
            reply = firsts.get(contender.name, {}).get(STEP)
            if reply is None or reference is None:
                continue
            if difference := disagreement(reply, reference):
                workers.pop(contender.name).close()
                self.refuse(contender, case, difference)

    def time(
        self,
        case: Case,
        modes: dict[str, str],
        workers: dict[str, Worker],
        firsts: dict[str, dict],
    ) -> None:
        """Times a mode of each contender, all taking turns, and enters time and memory."""
        blocks: dict[str, int] = {}
        calls: dict[str, int] = {}
        samples: dict[str, list[float]] = defaultdict(list)
        notes: dict[str, str] = {}
        for name, mode in modes.items():
            try:
                # The first call paid for cold pages; the second shows what to plan for, unless the
                # call is too long for that to matter.
                seconds = firsts[name][mode]["seconds"]
                if seconds < LONG_SECONDS:
                    seconds = workers[name].ask("time", mode, 1)["seconds"][0]
                options = self.options
                blocks[name], calls[name] = plan(seconds, options.budget, options.least)
                if seconds > SLOW_SECONDS:
                    # So slow that cold pages do not show: the first call is one of the three.
                    samples[name].append(seconds)
                    blocks[name] -= 1
            except Failure as failure:
                notes[name] = str(failure)
        for name in interleave(blocks):
            if name in notes:
                continue
            time.sleep(PAUSE_SECONDS)
            try:
                samples[name] += workers[name].ask("time", modes[name], calls[name])["seconds"]
            except Failure as failure:
                notes[name] = str(failure)
        self.enter(case, modes, {n: s for n, s in samples.items() if n not in notes}, firsts)
        for name, note in notes.items():
            where = (case.label, name, modes[name], "time", "ms", case.n, case.d)
            self.rows.append(Row(*where, note=note))

    def enter(
        self,
        case: Case,
        modes: dict[str, str],
        samples: dict[str, list[float]],
        firsts: dict[str, dict],
    ) -> None:
        """Adds the rows of what was timed in turns."""
        mine = spread(samples[OURS]).p50 if OURS in samples else None
        my_extra = firsts[OURS][modes[OURS]]["extra"] if OURS in modes else None
        share = self.settings[case].active
        for name in (name for name in firsts if name in samples):
            seconds, mode = samples[name], modes[name]
            s = spread(seconds)
            # Forecasts start from a settled time rather than from the cold first call.
            extra = firsts[name][mode]["extra"]
            seen = self.known[case.label, name]
            seen[:] = [k for k in seen if (k.n, k.d, k.mode) != (case.n, case.d, mode)]
            seen.append(Known(case.n, case.d, s.p20, extra or 0, mode))
            where = (case.label, name, mode)
            row = Row(*where, "time", "ms", case.n, case.d, s.p50 * 1e3, s.p20 * 1e3, s.p80 * 1e3)
            row.ratio_to_ours = s.p50 / mine if mine else None
            row.note = f"{len(seconds)} calls"
            if not math.isnan(share):
                row.note += f"; active share {share:.3f}"
            elif OURS in firsts and (said := differs(firsts[name], firsts[OURS])):
                row.note += f"; {said}"
            self.rows.append(row)
            memory = Row(*where, "extra memory", "MiB", case.n, case.d)
            if extra is None:
                memory.note = "this system does not report it"
            else:
                memory.p50 = extra / MIB
                memory.ratio_to_ours = extra / my_extra if my_extra else None
            self.rows.append(memory)
