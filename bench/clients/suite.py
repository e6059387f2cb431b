# SPDX-License-Identifier: Apache-2.0
"""Runs the comparisons: gate, first step with its memory, further steps in turns."""

import math
import time
from dataclasses import dataclass

import torch

from bench.clients.session import Comparison, Contender
from bench.clients.worker import Task, Worker, preload
from bench.measure import MIB, SLOW_SECONDS, interleave, spread
from bench.suite import Row, say
from bench.worker import Failure

# Relative; the gradient's is that of the difference's norm. Peers take distances from inner
# products in float32, so a gradient carries more rounding than the loss.
LOSS_LIMIT, GRADIENT_LIMIT = 1e-4, 1e-3
STEP = "training step"
START_LIMIT = 300.0
BLOCK_SECONDS = 0.1


@dataclass(frozen=True)
class Options:
    """How a run is limited.

    Attributes:
        threads: Threads of every contender.
        budget: Seconds of steps per contender and comparison, unless all steps take less.
        max_seconds: A contender whose step takes longer is given up.
        memory: Most bytes that a contender may use; None for 90 % of what is free.
    """

    threads: int
    budget: float
    max_seconds: float
    memory: int | None


@dataclass
class Outcome:
    """What a contender of a comparison has shown.

    Attributes:
        comparison: Which one.
        contender: Which side.
        gate: "pass", the errors that were too large, or why there are none.
        passed: None if it was not judged.
        losses: Of all steps, in order.
        seconds: Of the timed steps.
        extra: Bytes at the peak of the first step beyond what was there before.
        refusal: Why there are no figures, or no more of them.
    """

    comparison: Comparison
    contender: Contender
    gate: str = ""
    passed: bool | None = None
    losses: list[float] | None = None
    seconds: list[float] | None = None
    extra: int | None = None
    refusal: str = ""

    @property
    def median(self) -> float | None:
        """Seconds of a step."""
        return spread(self.seconds).p50 if self.seconds else None

    @property
    def gate_refusal(self) -> str:
        """Why a contender that did not pass the gate is not measured."""
        return "" if self.passed is not False else f"not measured: {self.gate}"


def relative(value: float, reference: float) -> float:
    """Relative error; NaN is infinitely wrong."""
    error = abs(value - reference) / max(abs(reference), 1e-12)
    return math.inf if math.isnan(error) else error


def judge(reply: dict, reference: dict) -> tuple[bool, str]:
    """Holds loss and gradient of a first step against those of another contender."""
    grad, expected = torch.tensor(reply["gradient"]), torch.tensor(reference["gradient"])
    loss = relative(reply["losses"][0], reference["losses"][0])
    if grad.shape != expected.shape:
        return False, f"FAIL: gradient of {len(grad)} numbers instead of {len(expected)}"
    gradient = float((grad - expected).norm()) / max(float(expected.norm()), 1e-12)
    gradient = math.inf if math.isnan(gradient) else gradient
    passed = loss <= LOSS_LIMIT and gradient <= GRADIENT_LIMIT
    return passed, f"{'pass' if passed else 'FAIL'}: loss {loss:.0e}, gradient {gradient:.0e}"


def curve_difference(losses: list[float], reference: list[float]) -> float | None:
    """Largest difference of two loss curves over the mean size of the reference's losses.

    Args:
        losses: One value per step.
        reference: Another curve; the steps that both have are compared.

    Returns:
        The quotient, or None if there is no common step.
    """
    pairs = list(zip(losses, reference, strict=False))
    if not pairs:
        return None
    size = max(sum(abs(b) for _, b in pairs) / len(pairs), 1e-12)
    differences = [abs(a - b) / size for a, b in pairs]
    return math.inf if any(map(math.isnan, differences)) else max(differences)


class Suite:
    """One run and its outcomes."""

    def __init__(self, options: Options) -> None:
        """Starts with nothing measured."""
        self.options = options
        self.outcomes: list[Outcome] = []
        self.judged: dict[str, list[Outcome]] = {}
        preload()

    def start(self, comparison: Comparison, contender: Contender, gate: bool) -> Worker:
        """Starts a worker and waits until its session is ready; raises Failure."""
        given = comparison.task_options(contender, gate)
        options = self.options
        worker = Worker(Task(comparison.builder, given, options.threads, options.memory))
        try:
            worker.wait(START_LIMIT)
        except Failure:
            worker.close()
            raise
        return worker

    def run(self, comparison: Comparison) -> None:
        """Gates and measures one comparison."""
        started = time.perf_counter()
        outcomes = [Outcome(comparison, contender) for contender in comparison.contenders]
        self.outcomes += outcomes
        self.gate(outcomes)
        workers: dict[str, Worker] = {}
        try:
            for outcome in outcomes:
                if outcome.passed is not False:
                    self.first(outcome, workers)
            running = {o.contender.name: o for o in outcomes if o.contender.name in workers}
            self.time(running, workers)
        finally:
            for worker in workers.values():
                worker.close()
        said = "; ".join(f"{o.contender.name} {self.summary(o)}" for o in outcomes)
        say(f"{comparison.title}: {time.perf_counter() - started:.0f} s: {said}")

    def summary(self, outcome: Outcome) -> str:
        """An outcome in a few words."""
        if outcome.median is None:
            return outcome.refusal or outcome.gate
        memory = "" if outcome.extra is None else f", {outcome.extra / MIB:.0f} MiB"
        return f"{outcome.median * 1e3:.3g} ms{memory}"

    def gate(self, outcomes: list[Outcome]) -> None:
        """Judges the contenders on a small case; once, where sizes have that case in common."""
        comparison = outcomes[0].comparison
        key = repr([comparison.task_options(o.contender, gate=True) for o in outcomes])
        earlier = self.judged.setdefault(comparison.builder + key, outcomes)
        if earlier is outcomes:
            self.judge(outcomes)
            return
        for outcome, known in zip(outcomes, earlier, strict=True):
            outcome.gate, outcome.passed = known.gate, known.passed
            outcome.refusal = known.gate_refusal

    def judge(self, outcomes: list[Outcome]) -> None:
        """Holds every contender's loss and gradient against the first one's."""
        reference: dict | None = None
        for outcome in outcomes:
            try:
                worker = self.start(outcome.comparison, outcome.contender, gate=True)
                try:
                    reply = worker.order("values", limit=self.options.max_seconds)
                finally:
                    worker.close()
            except Failure as failure:
                outcome.gate, outcome.passed = str(failure), False
                outcome.refusal = outcome.gate_refusal
                continue
            if outcome is outcomes[0]:
                reference = reply
                outcome.gate = "the reference"
            elif reference is None:
                outcome.gate = "not judged: the reference has no figures"
            else:
                outcome.passed, outcome.gate = judge(reply, reference)
                outcome.refusal = outcome.gate_refusal

    def first(self, outcome: Outcome, workers: dict[str, Worker]) -> None:
        """Takes the first step, and keeps the worker if it was within the limits."""
        limit = self.options.max_seconds
        worker = None
        try:
            worker = self.start(outcome.comparison, outcome.contender, gate=False)
            reply = worker.order("memory", limit=limit)
        except Failure as failure:
            outcome.refusal = str(failure)
            if worker is not None:
                worker.close()
            return
        outcome.extra, outcome.losses, outcome.seconds = reply["extra"], reply["losses"], []
        if reply["seconds"][0] > SLOW_SECONDS:
            # So long that cold pages do not show.
            outcome.seconds = list(reply["seconds"])
        workers[outcome.contender.name] = worker

    def time(self, outcomes: dict[str, Outcome], workers: dict[str, Worker]) -> None:
        """Takes the other steps, in turns."""
        blocks: dict[str, int] = {}
        counts: dict[str, int] = {}
        for name in outcomes:
            # The first step paid for cold pages; the second shows what to plan for.
            if not outcomes[name].seconds:
                self.take(outcomes[name], workers[name], 1)
        for name, outcome in outcomes.items():
            if outcome.refusal:
                continue
            assert outcome.losses and outcome.seconds
            blocks[name], counts[name] = plan(
                outcome.seconds[-1],
                self.options.budget,
                outcome.comparison.steps - len(outcome.losses),
            )
        for name in interleave(blocks):
            outcome = outcomes[name]
            left = outcome.comparison.steps - len(outcome.losses or [])
            if not outcome.refusal:
                self.take(outcome, workers[name], min(counts[name], left))

    def take(self, outcome: Outcome, worker: Worker, count: int) -> None:
        """Takes steps with one contender."""
        if count < 1:
            return
        try:
            limit = self.options.max_seconds * count
            reply = worker.order("time", count, limit)
        except Failure as failure:
            outcome.refusal = str(failure)
            return
        assert outcome.losses is not None and outcome.seconds is not None
        outcome.losses += reply["losses"]
        outcome.seconds += reply["seconds"]

    def rows(self) -> list[Row]:
        """All figures for the CSV; the ratio is over the first of our contenders."""
        rows = []
        for outcome in self.outcomes:
            rows += outcome_rows(outcome, self.outcomes)
        return rows


def plan(seconds: float, budget: float, most: int) -> tuple[int, int]:
    """Number of blocks and steps per block: at least two steps, fewer if one takes very long."""
    least = 2 if seconds <= SLOW_SECONDS else int(seconds <= 2 * budget)
    steps = min(max(int(budget / max(seconds, 1e-6)), least), most)
    if steps < 1:
        return 0, 0
    block = min(max(int(BLOCK_SECONDS / max(seconds, 1e-6)), 1), steps)
    return -(-steps // block), block


def find(outcomes: list[Outcome], comparison: Comparison, name: str) -> Outcome | None:
    """The outcome of a contender, if there is one."""
    return next(
        (o for o in outcomes if o.comparison == comparison and o.contender.name == name), None
    )


def reference_of(outcomes: list[Outcome], comparison: Comparison) -> Outcome:
    """The outcome that the others are held against."""
    return next(o for o in outcomes if o.comparison == comparison)


def drift(outcome: Outcome, outcomes: list[Outcome]) -> float | None:
    """How far the losses of an outcome are from those of the reference."""
    reference = reference_of(outcomes, outcome.comparison)
    if outcome is reference or not outcome.losses or not reference.losses:
        return None
    return curve_difference(outcome.losses, reference.losses)


def outcome_rows(outcome: Outcome, outcomes: list[Outcome]) -> list[Row]:
    """Time, memory, gate, difference and every loss of one contender."""
    comparison = outcome.comparison
    where = (f"{comparison.section}: {comparison.kernel}", outcome.contender.name, STEP)
    size = (comparison.n, comparison.d)
    ours = next((o for o in outcomes if o.comparison == comparison and o.contender.ours), None)
    timed = Row(*where, "time", "ms", *size, note=outcome.refusal)
    if outcome.seconds:
        found = spread(outcome.seconds)
        timed.p50, timed.p20, timed.p80 = (v * 1e3 for v in (found.p50, found.p20, found.p80))
        timed.ratio_to_ours = found.p50 / ours.median if ours and ours.median else None
        said = f"{len(outcome.seconds)} steps"
        timed.note = "; ".join(filter(None, [said, outcome.refusal]))
    memory = Row(*where, "extra memory", "MiB", *size, note=outcome.refusal)
    if outcome.extra is not None:
        memory.p50 = outcome.extra / MIB
        memory.ratio_to_ours = outcome.extra / ours.extra if ours and ours.extra else None
    passed = None if outcome.passed is None else float(outcome.passed)
    gate = Row(*where, "gate", "passed", *size, passed, note=outcome.gate)
    rows = [timed, memory, gate]
    if (difference := drift(outcome, outcomes)) is not None:
        rows.append(Row(*where, "loss difference", "relative", *size, difference))
    if comparison.curve:
        for number, loss in enumerate(outcome.losses or []):
            rows.append(Row(*where, "loss", f"step {number}", *size, loss))
    return rows
