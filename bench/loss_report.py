# SPDX-License-Identifier: Apache-2.0
"""The table of losses: a line per loss and batch size, another for each further peer."""

from bench import loss_table
from bench.contenders import BARE, OURS
from bench.gate import Verdict
from bench.loss_search import LARGEST
from bench.report import TARGET_HEADINGS, Section, number
from bench.suite import Row
from bench.targets import Outcome, lookup
from bench.worker import FORWARD, STEP

HEADINGS = [
    "loss",
    "N",
    "ours, ms",
    "/ bare",
    "ours, MiB",
    "peer",
    "peer, ms",
    "peer / ours",
    "peer, MiB",
    "gate",
    "operators",
    "remark",
]
LARGEST_HEADINGS = ["peer", "N", "what limits it"]
GATE_HEADINGS = ["loss", "contender", "passed", "errors"]
ABOUT = (
    "One line per loss and batch size: forward and backward. Median and, in brackets, 20th and "
    "80th percentile of the wall time of single calls; contenders of a line take turns with each "
    "other and with the bare product `x @ x.T` (of both towers where there are two), forward only. "
    "“/ bare” is our median over that product's, “peer / ours” the peer's over ours: above 1 we "
    "are faster. MiB is the peak of one training step less what was there before. “operators” are "
    "those of the package that a step called."
)

Verdicts = dict[tuple[str, str], Verdict]


def timed(row: Row | None) -> str:
    """A time with its spread."""
    if row is None or row.p50 is None:
        return ""
    return f"{number(row.p50)} [{number(row.p20)}, {number(row.p80)}]"


def ratio(over: Row | None, under: Row | None) -> str:
    """The quotient of two medians."""
    if over is None or under is None or over.p50 is None or not under.p50:
        return ""
    return f"{number(over.p50 / under.p50)} x"


def gate_word(*verdicts: Verdict | None) -> str:
    """Ours and the peer's outcome in a word."""
    words = {None: "not judged", True: "pass", False: "FAIL"}
    return "/".join(words[verdict.passed if verdict else None] for verdict in verdicts)


def remark(row: Row | None) -> list[str]:
    """What the reader must know about a time: why there is none, or what is odd about it."""
    if row is None:
        return []
    if row.p50 is None:
        return [row.note]
    said = [f"{row.note.split('; ')[0]}" if row.note else ""]
    said += [part for part in row.note.split("; ")[1:] if part]
    return said + (["unsteady"] if row.unsteady else [])


def case_lines(rows: list[Row], verdicts: Verdicts, kernel: str, n: int, d: int) -> list[list[str]]:
    """The lines of one loss at one size."""
    line = loss_table.find(kernel)

    def row(provider: str, mode: str, metric: str = "time") -> Row | None:
        return lookup(rows, kernel, provider, mode, metric, n, d)

    mine, bare = row(OURS, STEP), row(BARE, FORWARD)
    mine_memory = row(OURS, STEP, "extra memory")
    judged = verdicts.get((kernel, OURS))
    own = [line.note] + ["ours: " + text for text in remark(mine) if "calls" not in text]
    peers = [name for name in line.peers if row(name, STEP)] or [""]
    lines = []
    for i, name in enumerate(peers):
        theirs, memory = row(name, STEP), row(name, STEP, "extra memory")
        peer = line.peers.get(name)
        first = i == 0
        said = [*own] if first else []
        if peer:
            called = f"{peer.name}: {peer.note}" if peer.note else ""
            said += [called, *("peer: " + text for text in remark(theirs) if "calls" not in text)]
        lines.append(
            [
                kernel,
                str(n),
                timed(mine) if first else "",
                ratio(mine, bare) if first else "",
                number(mine_memory.p50) if first and mine_memory else "",
                name or "none",
                timed(theirs),
                ratio(theirs, mine),
                number(memory.p50) if memory else "",
                gate_word(judged, verdicts.get((kernel, name))) if name else gate_word(judged),
                ", ".join(judged.operators) if first and judged else "",
                "; ".join(dict.fromkeys(text for text in said if text)),
            ]
        )
    return lines


def sections(rows: list[Row], verdicts: Verdicts, outcomes: list[Outcome]) -> list[Section]:
    """All tables of the report: targets, losses, largest batches, gate."""
    timed_cases = dict.fromkeys((r.kernel, r.n, r.d) for r in rows if r.metric == "time")
    lines = [line for case in timed_cases for line in case_lines(rows, verdicts, *case)]
    limits = [
        [f"{r.kernel}: {r.provider}", number_of_rows(r), r.note or "the size of the target"]
        for r in rows
        if r.metric == LARGEST
    ]
    judged = [
        [kernel, name, gate_word(verdict), verdict.text]
        for (kernel, name), verdict in verdicts.items()
        if name != BARE
    ]
    features = ", ".join(str(d) for d in sorted({d for _, _, d in timed_cases}))
    targets = [[o.text, o.figure, o.mark, o.gap] for o in outcomes]
    found = [
        ("Targets", TARGET_HEADINGS, targets),
        (f"Losses, D = {features}", HEADINGS, lines),
        ("Largest batch of a peer", LARGEST_HEADINGS, limits),
        ("Correctness gate", GATE_HEADINGS, judged),
    ]
    return [section for section in found if section[2]]


def number_of_rows(row: Row) -> str:
    """The batch size that a row of the search found."""
    return "none" if row.p50 is None else str(int(row.p50))


def gate_rows(verdicts: Verdicts, features: int) -> list[Row]:
    """The gate's outcome for the CSV: 1 for passed."""
    rows = []
    for (kernel, name), verdict in verdicts.items():
        if name != BARE:
            row = Row(kernel, name, STEP, "gate", "passed", 0, features, float(verdict.passed))
            row.note = "; ".join([verdict.text, *filter(None, [", ".join(verdict.operators)])])
            rows.append(row)
    return rows
