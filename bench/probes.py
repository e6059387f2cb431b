# SPDX-License-Identifier: Apache-2.0
"""Two questions about the library alone: how near the machine's peak, and how little memory."""

import time

from bench.cases import Case, settle
from bench.contenders import OURS, find
from bench.measure import MIB, spread
from bench.peak import PeakMeter
from bench.suite import PAUSE_SECONDS, Row, Suite, say
from bench.worker import FORWARD, STEP, Failure

PEAK_ROW = "machine peak"
ROUNDS = 15


def tile_rate(suite: Suite, meter: PeakMeter | None, n: int, dims: tuple[int, ...]) -> None:
    """Times the bare mining operator in turns with the peak probe.

    Two rates are entered. The dense-equivalent one counts 2 N^2 D operations, as the bare product
    does. The other counts what is done: a self-batch needs the products above the diagonal
    only, N (N - 1) / 2 pairs of 2 D operations. Padding of tiles, packing, selection and the exact
    recomputation are not counted, so the true rate is a little higher.

    Args:
        suite: Receives the rows.
        meter: The peak probe, or None if it could not be built.
        n: Batch size.
        dims: Numbers of features.
    """
    if ("hardest", OURS) not in suite.verdicts:
        suite.gate("hardest")
    for d in dims:
        case = Case("hardest", n, d)
        suite.settings[case] = settle(case)
        where = (case.label, OURS, FORWARD)
        verdict = suite.verdicts["hardest", OURS]
        try:
            if not verdict.passed:
                raise Failure(verdict.text)
            seconds, peaks = alternate(suite, meter, case)
        except Failure as failure:
            suite.rows.append(Row(*where, "arithmetic rate", "GFLOP/s", n, d, note=str(failure)))
            continue
        for metric, flops in (
            ("dense-equivalent rate", 2.0 * n * n * d),
            ("arithmetic rate", float(n) * (n - 1) * d),
        ):
            # A fast call is a high rate: the 20th percentile of time is the 80th of rate.
            s = spread([flops / value / 1e9 for value in seconds])
            row = Row(*where, metric, "GFLOP/s", n, d, s.p50, s.p20, s.p80)
            row.note = f"median {spread(seconds).p50 * 1e3:.2f} ms"
            suite.rows.append(row)
        if meter is not None:
            s = spread(peaks)
            row = Row(case.label, PEAK_ROW, FORWARD, "arithmetic rate", "GFLOP/s", n, d)
            row.p50, row.p20, row.p80, row.note = s.p50, s.p20, s.p80, meter.isa
            suite.rows.append(row)


def alternate(suite: Suite, meter: PeakMeter | None, case: Case) -> tuple[list[float], list[float]]:
    """Times the operator and the peak in turns; raises Failure."""
    worker = suite.start(find(OURS), case)
    seconds: list[float] = []
    peaks: list[float] = []
    try:
        for _ in range(ROUNDS):
            if meter is not None:
                peaks.append(meter.measure(suite.options.threads, 0.02).gflops)
            time.sleep(PAUSE_SECONDS)
            seconds += worker.ask("time", FORWARD, 3)["seconds"]
    finally:
        worker.close()
    return seconds, peaks


def large_memory(suite: Suite, n: int, d: int) -> None:
    """Enters the extra memory of one training step at a size that no N x N form could hold.

    Args:
        suite: Receives the rows.
        n: Batch size.
        d: Features.
    """
    for kernel, activity in (("triplet", ""), ("contrastive", "few")):
        if (kernel, OURS) not in suite.verdicts:
            continue
        case = Case(kernel, n, d, activity)
        row = Row(case.label, OURS, STEP, "extra memory", "MiB", n, d)
        suite.rows.append(row)
        try:
            verdict = suite.verdicts[kernel, OURS]
            if not verdict.passed:
                raise Failure(verdict.text)
            suite.settings[case] = settle(case)
            worker = suite.start(find(OURS), case)
            try:
                reply = worker.ask("memory", STEP)
            finally:
                worker.close()
        except Failure as failure:
            row.note = str(failure)
            continue
        if reply["extra"] is None:
            row.note = "this system does not report it"
            continue
        embeddings = 4 * n * d
        row.p50 = reply["extra"] / MIB
        row.note = (
            f"{reply['extra'] / embeddings:.2f} x the embeddings ({embeddings / MIB:.0f} MiB); "
            f"an N x N matrix has {4 * n * n / MIB:.0f} MiB; one step {reply['seconds']:.2f} s"
        )
        say(f"{case.title}: {row.note}")
