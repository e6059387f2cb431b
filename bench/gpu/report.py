# SPDX-License-Identifier: Apache-2.0
"""Turns the rows of a GPU run into the printed report, CSV, JSON and Markdown."""

import json
from dataclasses import asdict
from pathlib import Path

from bench.gpu import rows as kinds
from bench.gpu.contenders import CONTENDERS
from bench.gpu.rows import UNSTEADY, Row
from bench.gpu.suite import Results
from bench.gpu.targets import Outcome
from bench.report import markdown_table, number, text_table, write_csv

DRY_RUN = "DRY RUN: no GPU was used; all times, rates, launches and memory are made up."
HEADINGS = ["contender", "ms", "/ ours", "TFLOP/s", "of peak", "extra MiB", "remark"]
LAUNCH_HEADINGS = ["contender", "launches", "kernels us", "graph us", "what is launched"]
TARGET_HEADINGS = ["target", "measured", "result", "gap"]
SWEEP_HEADINGS = ["N", "D", "ours TFLOP/s"]


def cells_of(rows: list[Row], key: tuple[str, str, str, int, int]) -> dict[str, dict[str, Row]]:
    """Rows of a case by contender and metric."""
    cells: dict[str, dict[str, Row]] = {}
    for row in rows:
        if (row.group, row.kernel, row.precision, row.n, row.d) == key:
            cells.setdefault(row.provider, {})[row.metric] = row
    return {name: cells[name] for name in CONTENDERS if name in cells}


def keys_of(rows: list[Row]) -> list[tuple[str, str, str, int, int]]:
    """The cases of a run in the order in which they ran."""
    timed = (row for row in rows if row.metric == kinds.TIME)
    return list(dict.fromkeys((r.group, r.kernel, r.precision, r.n, r.d) for r in timed))


def times(ratio: float | None) -> str:
    """A ratio with its sign, or nothing."""
    return "" if ratio is None else f"{number(ratio)} x"


def clip(text: str, width: int = 80) -> str:
    """Shortens a remark for a table; the gate's lines and the JSON hold the whole text."""
    return text if len(text) <= width else text[: width - 3] + "..."


def bracketed(row: Row | None) -> str:
    """Median and both percentiles."""
    if row is None or row.p50 is None:
        return ""
    return f"{number(row.p50)} [{number(row.p20)}, {number(row.p80)}]"


def case_lines(
    cells: dict[str, dict[str, Row]], precision: str, peaks: dict[str, float]
) -> list[list[str]]:
    """One line per contender: time, ratio to ours, rate, share of the peak, memory, remarks."""
    lines = []
    for name, of in cells.items():
        time, rate, memory = of.get(kinds.TIME), of.get(kinds.RATE), of.get(kinds.MEMORY)
        share = ""
        if rate is not None and rate.p50 is not None and peaks.get(precision):
            share = f"{100 * rate.p50 * 1e12 / peaks[precision]:.0f} %"
        notes = (row.note for row in (time, memory) if row is not None and row.p50 is None)
        remarks = list(dict.fromkeys(note for note in notes if note))
        if time is not None and time.unsteady:
            remarks.append("unsteady")
        lines.append(
            [
                name,
                bracketed(time),
                times(time.ratio_to_ours if time else None),
                number(rate.p50 if rate else None),
                share,
                number(memory.p50 if memory else None),
                "; ".join(map(clip, remarks)),
            ]
        )
    return lines


def launch_lines(cells: dict[str, dict[str, Row]]) -> list[list[str]]:
    """Launches and device time of each contender of a case."""
    lines = []
    for name, of in cells.items():
        count, busy = of.get(kinds.LAUNCHES), of.get(kinds.KERNEL_TIME)
        graph = of.get(kinds.DEVICE_TIME)
        if count is None and graph is None:
            continue
        notes = [row.note for row in (count, graph) if row is not None and row.note]
        notes = [note for note in notes if note != "graph replay"]
        lines.append(
            [
                name,
                number(count.p50 if count else None),
                number(busy.p50 if busy else None),
                bracketed(graph),
                "; ".join(notes)[:400],
            ]
        )
    return lines


def sweep_table(rows: list[Row], group: str, precision: str) -> tuple[list[str], list[list[str]]]:
    """One line per size: the rate of ours, and every other contender's time over ours."""
    keys = [key for key in keys_of(rows) if key[0] == group and key[2] == precision]
    table = {key: cells_of(rows, key) for key in keys}
    names = [name for name in CONTENDERS if any(name in cells for cells in table.values())]
    peers = names[1:]
    lines = []
    for (_, _, _, n, d), cells in table.items():
        ours = cells.get(names[0], {})
        rate = ours.get(kinds.RATE)
        own = number(rate.p50) if rate else (clip(ours[kinds.TIME].note, 40) if ours else "")
        line = [str(n), str(d), own]
        for name in peers:
            row = cells.get(name, {}).get(kinds.TIME)
            line.append("" if row is None else times(row.ratio_to_ours) or clip(row.note, 40))
        lines.append(line)
    return [*SWEEP_HEADINGS, *(f"{name} / ours" for name in peers)], lines


def sections(results: Results, outcomes: list[Outcome]) -> list[tuple[str, list[str], list]]:
    """All tables of a report as title, headings and lines; the targets come last."""
    made: list[tuple[str, list[str], list]] = []
    rows = results.rows
    keys = keys_of(rows)
    for key in keys:
        group, kernel, precision, n, d = key
        if group.startswith("sweep"):
            continue
        cells = cells_of(rows, key)
        what = {"hardest": "batch-hard selection"}.get(kernel, f"{kernel} forward + backward")
        title = f"{what}, N = {n}, D = {d}, {precision}"
        made.append((title, HEADINGS, case_lines(cells, precision, results.peaks)))
        if launches := launch_lines(cells):
            made.append((f"Launches of {title}", LAUNCH_HEADINGS, launches))
    for group, precision in dict.fromkeys((k[0], k[2]) for k in keys if k[0].startswith("sweep")):
        headings, lines = sweep_table(rows, group, precision)
        made.append((f"{group}, {precision}: times of others over ours", headings, lines))
    targets = [[o.text, clip(o.figure), o.mark, o.gap] for o in outcomes]
    made.append(("Targets", TARGET_HEADINGS, targets))
    return made


def gate_lines(results: Results) -> list[str]:
    """One line per contender, kernel and precision."""
    found = results.verdicts.items()
    lines = [
        f"{kernel}, {precision}: {name}: {text}" for (kernel, precision, name), (_, text) in found
    ]
    return lines + [f"FAULT OF OURS: {text}" for text in results.failed]


def text_report(
    header: dict[str, str], results: Results, outcomes: list[Outcome], dry_run: bool
) -> str:
    """The report for the terminal; its end is what matters most."""
    width = max(len(key) for key in header)
    parts = [DRY_RUN] if dry_run else []
    parts.append("\n".join(f"{key.ljust(width)}  {value}" for key, value in header.items()))
    for title, headings, lines in sections(results, outcomes):
        mark = "DRY RUN, " if dry_run else ""
        parts.append(f"{mark}{title}\n{text_table(headings, lines)}")
    parts += [f"FAULT OF OURS: {text}" for text in results.failed]
    return "\n\n".join(parts)


def markdown_report(
    header: dict[str, str],
    results: Results,
    outcomes: list[Outcome],
    command: str,
    dry_run: bool,
    pictures: list[str],
) -> str:
    """The report as Markdown, written by the run itself.

    Args:
        header: What ran where.
        results: What was found.
        outcomes: The targets.
        command: Arguments of the run.
        dry_run: Whether the figures are made up.
        pictures: Names of plots beside the file.

    Returns:
        The text.
    """
    parts = ["# Benchmark results, GPU", *([f"**{DRY_RUN}**"] if dry_run else [])]
    parts += [
        f"Written by `{command}`. Median and, in brackets, 20th and 80th percentile of single "
        "calls by CUDA events, the second-level cache flushed before each; “/ ours” is that "
        "contender's median over flashmetric's, so above 1 flashmetric is faster, below 1 it "
        "loses. TFLOP/s count a dense product, 2 N^2 D operations (three of them for a sum over "
        "pairs with its gradient). Extra memory is the peak of one call. Unsteady: the 80th "
        f"percentile is above {UNSTEADY:g} times the 20th.",
        "\n".join(f"- {key}: {value}" for key, value in header.items()),
    ]
    tables = sections(results, outcomes)
    for title, headings, lines in (tables[-1], *tables[:-1]):
        parts.append(f"## {title}\n\n{markdown_table(headings, lines)}")
    parts += [f"![{name}]({name})" for name in pictures]
    parts.append("## Correctness gate\n\n" + "\n".join(f"- {line}" for line in gate_lines(results)))
    return "\n\n".join(parts) + "\n"


def write_data(
    folder: Path,
    stem: str,
    header: dict[str, str],
    results: Results,
    outcomes: list[Outcome],
    dry_run: bool,
) -> list[Path]:
    """Writes the CSV and the JSON; the latter holds everything."""
    table, data = folder / f"{stem}.csv", folder / f"{stem}.json"
    if dry_run:
        for row in results.rows:
            row.note = f"DRY RUN; {row.note}"
    write_csv(table, results.rows, Row)
    content = {
        "dry_run": dry_run,
        "header": header,
        "peaks": results.peaks,
        "gate": gate_lines(results),
        "faults": results.failed,
        "targets": [asdict(outcome) for outcome in outcomes],
        "rows": [asdict(row) for row in results.rows],
    }
    data.write_text(json.dumps(content, indent=1) + "\n")
    return [table, data]
