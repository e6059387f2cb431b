# SPDX-License-Identifier: Apache-2.0
"""The tables of the report on training loops."""

from bench.clients import grid
from bench.clients.session import Comparison
from bench.clients.suite import Outcome, drift, find
from bench.measure import MIB, spread
from bench.report import Section, number

LOOP_HEADINGS = [
    "loss",
    "N",
    "peer, steps/s",
    "ours, steps/s",
    "ours / peer",
    "peer, MiB",
    "ours, MiB",
    "curves differ by",
    "of the peer, rows reversed",
    "remark",
]
CASE_HEADINGS = [
    "what",
    "N",
    "contender",
    "ms per step",
    "first / this",
    "MiB",
    "losses differ by",
    "remark",
]
GATE_HEADINGS = ["comparison", "contender", "outcome"]
ABOUT = (
    "Same seed, same data, same code; what differs is the library that losses and miners are "
    "imported from. Median of single training steps (with the encoder and the optimiser, where "
    "the section is about training loops or memories) and, in brackets, 20th and 80th percentile; "
    "contenders take turns. MiB is the peak of the first step less what was there before. Curves "
    "or losses differ by: the largest difference of any step over the mean loss of the first "
    "contender. Rounding alone makes curves drift apart as training amplifies it: the column "
    "“rows reversed” is the peer against itself with the rows of each batch in reverse order. "
    "“first / this”: how many times faster a contender is than the first of its lines."
)


def rate(outcome: Outcome | None) -> str:
    """Steps per second."""
    return number(1 / outcome.median) if outcome and outcome.median else ""


def timed(outcome: Outcome) -> str:
    """Milliseconds per step with their spread."""
    if not outcome.seconds:
        return ""
    found = spread(outcome.seconds)
    p50, p20, p80 = (number(value * 1e3) for value in (found.p50, found.p20, found.p80))
    return f"{p50} [{p20}, {p80}]"


def faster(over: Outcome | None, under: Outcome | None) -> str:
    """The quotient of two medians."""
    if not over or not under or not over.median or not under.median:
        return ""
    return f"{number(over.median / under.median)} x"


def mebibytes(outcome: Outcome | None) -> str:
    """Extra memory."""
    return number(outcome.extra / MIB) if outcome and outcome.extra is not None else ""


def difference(outcome: Outcome | None, outcomes: list[Outcome]) -> str:
    """How far the losses are from those of the first contender."""
    found = drift(outcome, outcomes) if outcome else None
    return "" if found is None else f"{found:.1e}"


def remarks(*outcomes: Outcome | None) -> str:
    """Why there are no figures."""
    said = [f"{o.contender.name}: {o.refusal}" for o in outcomes if o and o.refusal]
    return "; ".join(said)


def loop_line(comparison: Comparison, outcomes: list[Outcome]) -> list[str]:
    """A training loop before and after the change."""
    peer, ours, reverse = (
        find(outcomes, comparison, name) for name in (grid.PEER, grid.OURS, grid.BACKWARDS)
    )
    return [
        comparison.kernel,
        str(comparison.n),
        rate(peer),
        rate(ours),
        faster(peer, ours),
        mebibytes(peer),
        mebibytes(ours),
        difference(ours, outcomes),
        difference(reverse, outcomes),
        "; ".join(filter(None, [comparison.note, remarks(peer, ours)])),
    ]


def case_lines(comparison: Comparison, outcomes: list[Outcome]) -> list[list[str]]:
    """A line per contender."""
    mine = [o for o in outcomes if o.comparison == comparison]
    lines = []
    for outcome in mine:
        first = outcome is mine[0]
        lines.append(
            [
                comparison.kernel if first else "",
                str(comparison.n) if first else "",
                outcome.contender.name,
                timed(outcome),
                "" if first else faster(mine[0], outcome),
                mebibytes(outcome),
                difference(outcome, outcomes),
                "; ".join(filter(None, [comparison.note if first else "", outcome.refusal])),
            ]
        )
    return lines


def sections(outcomes: list[Outcome]) -> list[Section]:
    """All tables as title, headings and lines."""
    comparisons = list({id(o.comparison): o.comparison for o in outcomes}.values())
    found: list[Section] = []
    for title in grid.SECTIONS:
        mine = [comparison for comparison in comparisons if comparison.section == title]
        if title in (grid.PML_LOOPS, grid.ST_LOOPS):
            found.append((title, LOOP_HEADINGS, [loop_line(c, outcomes) for c in mine]))
        else:
            lines = [line for c in mine for line in case_lines(c, outcomes)]
            found.append((title, CASE_HEADINGS, lines))
    gates = dict.fromkeys(
        (f"{o.comparison.section}: {o.comparison.kernel}", o.contender.name, o.gate)
        for o in outcomes
    )
    found.append(("Correctness gate", GATE_HEADINGS, [list(gate) for gate in gates]))
    return [section for section in found if section[2]]
