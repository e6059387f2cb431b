# SPDX-License-Identifier: Apache-2.0
"""The largest batch that a peer can do within the memory of the machine."""

from dataclasses import replace

from bench.cases import Case, settle
from bench.contenders import Contender, contenders_of
from bench.loss_table import Line, Peer, find
from bench.measure import MIB, allowance
from bench.suite import Row, Suite, say
from bench.worker import STEP, Failure

LARGEST = "largest batch"
TRIES = 10
# With this much room to spare the target's own size is not tried beforehand.
AMPLE = 1.1


def attempt(suite: Suite, contender: Contender, case: Case) -> int:
    """Runs one training step; returns the bytes it took, or raises Failure."""
    suite.settings[case] = settle(case)
    worker = suite.start(contender, case)
    try:
        return worker.ask("memory", STEP, limit=300.0)["extra"] or 0
    finally:
        worker.close()


def guess(peer: Peer, base: int, taken: int, allowed: int) -> int:
    """The batch whose memory would just fit, by the growth from a small one."""
    n = base * (allowed / max(taken, 1)) ** (1 / peer.grows)
    return max(int(n) // peer.step * peer.step, base)


def largest(
    suite: Suite, line: Line, contender: Contender, features: int
) -> tuple[int | None, str]:
    """Looks for the largest batch of a peer, by growing and shrinking from an estimate.

    Args:
        suite: The run.
        line: A line whose peer has ``step``.
        contender: That peer.
        features: Features of the rows.

    Returns:
        The batch size, at most that of the line, and what limits it; None if it does none.
    """
    peer = line.peers[contender.name]
    base = line.case(min(line.also), features)
    allowed = allowance(suite.options.memory)
    try:
        taken = attempt(suite, contender, base)
    except Failure as failure:
        return None, str(failure)
    n = guess(peer, base.n, taken, allowed)
    if n >= AMPLE * line.n:
        return line.n, ""
    n = min(n, line.n)
    fits, fails, reason = base.n, line.n + peer.step, ""
    for _ in range(TRIES):
        if not fits < n < fails:
            break
        try:
            taken = attempt(suite, contender, replace(base, n=n))
            say(f"{line.kernel}: {contender.name}: N={n} takes {taken / MIB:.0f} MiB")
            fits, n = n, n + peer.step
        except Failure as failure:
            say(f"{line.kernel}: {contender.name}: N={n}: {failure}")
            fails, reason, n = n, str(failure), n - peer.step
    if fits >= line.n:
        return fits, ""
    return fits, f"N={fails}: {reason}; {allowed / 2**30:.1f} GiB allowed"


def search(suite: Suite, cases: list[Case]) -> list[Case]:
    """Adds the largest batches of the peers that need to be looked for, in order of size.

    The gate must have judged them. Each is entered as a row whose figure is the batch size.
    """
    found = []
    for kernel in dict.fromkeys(case.kernel for case in cases):
        line = find(kernel)
        features = next(case.d for case in cases if case.kernel == kernel)
        for contender in contenders_of(kernel) if line else ():
            peer = line.peers.get(contender.name)
            verdict = suite.verdicts.get((kernel, contender.name))
            if peer is None or not peer.step or verdict is None or not verdict.passed:
                continue
            n, reason = largest(suite, line, contender, features)
            row = Row(kernel, contender.name, STEP, LARGEST, "rows", line.n, features)
            row.p50, row.note = n, reason
            suite.rows.append(row)
            say(f"{kernel}: {contender.name}: largest batch {n} ({reason or 'the target size'})")
            if n is not None:
                found.append(line.case(n, features))
    merged = list(dict.fromkeys([*cases, *found]))
    place = {kernel: i for i, kernel in enumerate(dict.fromkeys(case.kernel for case in cases))}
    return sorted(merged, key=lambda case: (place[case.kernel], case.n))
