# SPDX-License-Identifier: Apache-2.0
"""Turns rows into the printed table, the CSV and the Markdown summary."""

import csv
import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from pathlib import Path

from bench.contenders import BARE, CONTENDERS, OURS
from bench.suite import UNSTEADY, Row
from bench.targets import Outcome
from bench.worker import FORWARD, STEP


def number(value: float | None) -> str:
    """Three significant digits without exponent."""
    if value is None:
        return ""
    if value == 0 or not math.isfinite(value):
        return f"{value:g}"
    digits = max(0, 2 - math.floor(math.log10(abs(value))))
    return f"{value:.{min(digits, 4)}f}"


def write_csv(path: Path, rows: Iterable[Row], kind: type = Row) -> None:
    """Writes one line per row, with the fields of its dataclass as the columns."""
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(kind)], lineterminator="\n")
        writer.writeheader()
        for row in rows:
            line = asdict(row)
            for key in ("p50", "p20", "p80", "ratio_to_ours"):
                if line[key] is not None:
                    line[key] = f"{line[key]:.6g}"
            writer.writerow(line)


def cases_of(rows: list[Row]) -> list[tuple[str, int, int]]:
    """The timed cases in the order in which they ran."""
    return list(dict.fromkeys((r.kernel, r.n, r.d) for r in rows if r.metric == "time"))


def case_lines(rows: list[Row], case: tuple[str, int, int]) -> list[list[str]]:
    """One line per contender: times of both modes, ratio to ours, memory, remarks."""
    mine = [row for row in rows if (row.kernel, row.n, row.d) == case]
    lines = []
    for provider in (contender.name for contender in CONTENDERS):
        cells = {(r.mode, r.metric): r for r in mine if r.provider == provider}
        if not cells:
            continue
        line = [provider]
        for mode in (FORWARD, STEP):
            row = cells.get((mode, "time"))
            if row is None or row.p50 is None:
                line += ["", ""]
                continue
            ratio = number(row.ratio_to_ours) + " x" if row.ratio_to_ours else ""
            line += [f"{number(row.p50)} [{number(row.p20)}, {number(row.p80)}]", ratio]
        memory = cells.get((STEP, "extra memory")) or cells.get((FORWARD, "extra memory"))
        line.append(number(memory.p50) if memory else "")
        refusals = (r.note for r in cells.values() if r.p50 is None and r.note)
        remarks = list(dict.fromkeys(refusals))
        if any(row.unsteady for row in cells.values()):
            remarks.append("unsteady")
        line.append("; ".join(remarks))
        lines.append(line)
    # The bare product does not depend on the mode; beside a training step it shows the distance.
    step = next((line for line in lines if line[0] == OURS and line[3]), None)
    bare = next((row for row in mine if row.provider == BARE and row.metric == "time"), None)
    ours = next((r for r in mine if (r.provider, r.mode, r.metric) == (OURS, STEP, "time")), None)
    if step and bare and bare.p50 and ours and ours.p50:
        for line in lines:
            if line[0] == BARE:
                line[3], line[4] = "(forward only)", number(bare.p50 / ours.p50) + " x"
    return lines


HEADINGS = ["contender", "forward ms", "/ ours", "fwd+bwd ms", "/ ours", "extra MiB", "remark"]


def case_notes(rows: list[Row], case: tuple[str, int, int]) -> str:
    """The active share of a case's data, taken from its rows."""
    for row in rows:
        if (row.kernel, row.n, row.d) == case and "active share" in row.note:
            return row.note.split("; ")[1]
    return ""


def text_table(headings: list[str], lines: list[list[str]]) -> str:
    """Aligns columns for a terminal: the first and the last to the left, figures to the right."""
    table = [headings, *lines]
    widths = [max(len(line[i]) for line in table) for i in range(len(headings))]
    last = len(headings) - 1
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i in (0, last) else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def markdown_table(headings: list[str], lines: list[list[str]]) -> str:
    """The same as a Markdown table."""
    rule = ["---"] + ["---:"] * (len(headings) - 2) + ["---"]
    table = [headings, rule, *lines]
    return "\n".join(
        "| " + " | ".join(cell.replace("|", "/") for cell in line) + " |" for line in table
    )


def geomean_lines(rows: list[Row]) -> list[list[str]]:
    """Geometric mean of the ratio to ours over all cases both were timed in."""
    lines = []
    timed = [r for r in rows if r.metric == "time" and r.ratio_to_ours and r.provider != OURS]
    for kernel, provider in dict.fromkeys((r.kernel, r.provider) for r in timed):
        for mode in (FORWARD, STEP):
            ratios = [
                r.ratio_to_ours
                for r in timed
                if (r.kernel, r.provider, r.mode) == (kernel, provider, mode)
            ]
            if ratios:
                mean = math.exp(sum(math.log(ratio) for ratio in ratios) / len(ratios))
                low, high = number(min(ratios)), number(max(ratios))
                line = [f"{kernel}: {provider}", mode, number(mean) + " x", low, high]
                lines.append([*line, str(len(ratios))])
    return lines


GEOMEAN_HEADINGS = ["contender / ours", "mode", "geometric mean", "lowest", "highest", "cases"]
TARGET_HEADINGS = ["target", "measured", "result", "gap"]
PROBE_HEADINGS = ["probe", "N", "D", "quantity", "p50 [p20, p80]", "note"]


def probe_lines(rows: list[Row]) -> list[list[str]]:
    """Rates of the mining operator and memory at the large size."""
    timed = set(cases_of(rows))
    lines = []
    for row in rows:
        if row.metric == "time" or (row.kernel, row.n, row.d) in timed:
            continue
        figure = f"{number(row.p50)} {row.unit}" if row.p50 is not None else ""
        if row.p20 is not None:
            figure += f" [{number(row.p20)}, {number(row.p80)}]"
        name = f"{row.kernel}, {row.provider}"
        lines.append([name, str(row.n), str(row.d), row.metric, figure, row.note])
    return lines


Section = tuple[str, list[str], list[list[str]]]


def sections(rows: list[Row], outcomes: list[Outcome]) -> list[Section]:
    """All tables of a report as title, headings and lines."""
    result = []
    for case in cases_of(rows):
        kernel, n, d = case
        title = f"{kernel}, N = {n}, D = {d}"
        if notes := case_notes(rows, case):
            title += f" ({notes})"
        result.append((title, HEADINGS, case_lines(rows, case)))
    result.append(("Over all cases", GEOMEAN_HEADINGS, geomean_lines(rows)))
    result.append(("Rate and memory", PROBE_HEADINGS, probe_lines(rows)))
    targets = [[o.text, o.figure, o.mark, o.gap] for o in outcomes]
    result.append(("Targets", TARGET_HEADINGS, targets))
    return [section for section in result if section[2]]


def text_report(header: dict[str, str], rows: list[Row], outcomes: list[Outcome]) -> str:
    """The report for the terminal."""
    return text_document(header, sections(rows, outcomes))


def text_document(header: dict[str, str], tables: list[Section]) -> str:
    """Header and tables for the terminal."""
    width = max(len(key) for key in header)
    parts = ["\n".join(f"{key.ljust(width)}  {value}" for key, value in header.items())]
    for title, headings, lines in tables:
        parts.append(f"{title}\n{text_table(headings, lines)}")
    return "\n\n".join(parts)


def markdown_document(
    title: str, about: str, header: dict[str, str], parts: list[str], tables: list[Section]
) -> str:
    """Title, explanation, header, further parts and tables as Markdown."""
    listed = "\n".join(f"- {key}: {value}" for key, value in header.items())
    parts = [f"# {title}", about, listed, *parts]
    for name, headings, lines in tables:
        parts.append(f"## {name}\n\n{markdown_table(headings, lines)}")
    return "\n\n".join(parts) + "\n"


def markdown_report(
    header: dict[str, str], gate: list[str], rows: list[Row], outcomes: list[Outcome], command: str
) -> str:
    """The report as Markdown, written by the run itself.

    Args:
        header: What ran where.
        gate: One line per contender of the correctness gate.
        rows: All figures.
        outcomes: The targets.
        command: Arguments of the run.

    Returns:
        The text.
    """
    about = (
        f"Written by `{command}`. Median and, in brackets, 20th and 80th percentile of the "
        "wall time of single calls; “/ ours” is that contender's median over flashmetric's, so "
        "above 1 flashmetric is faster. Extra memory is the peak of one training step. Unsteady: "
        f"the 80th percentile is above {UNSTEADY:g} times the 20th."
    )
    judged = "## Correctness gate\n\n" + "\n".join(f"- {line}" for line in gate)
    tables = sections(rows, outcomes)[::-1]
    return markdown_document("Benchmark results", about, header, [judged], tables)
