# SPDX-License-Identifier: Apache-2.0
"""What ``python -m bench --clients`` does."""

from collections.abc import Sequence
from pathlib import Path

from bench.clients import report
from bench.clients.grid import grid
from bench.clients.plots import plot_curves, plot_gains
from bench.clients.suite import Options, Suite
from bench.machine import cpu_model, describe_machine, load_average, package, slug
from bench.report import markdown_document, text_document, write_csv
from bench.suite import say

VERSIONS = (
    "torch",
    "pytorch-metric-learning",
    "sentence-transformers",
    "transformers",
    "datasets",
    "scikit-learn",
)
BUDGET, QUICK_BUDGET = 6.0, 0.3
MAX_SECONDS, MEMORY_GIB = 60.0, 8.0
# How ``bench.worker`` begins what is no matter of time or memory.
FAILURES = ("failed", "not installed")


def run(
    parts: Sequence[str],
    out: Path,
    command: str,
    *,
    threads: int,
    quick: bool = False,
    budget: float | None = None,
    max_seconds: float | None = None,
    memory: float | None = None,
    data: Path | None = None,
) -> int:
    """Compares training loops and writes CSV, Markdown and plots.

    Args:
        parts: Some of ``bench.clients.PARTS``; all of them if empty.
        out: Folder for the files.
        command: What the report says it was written by.
        threads: Threads of every contender.
        quick: Small sizes and few steps: whether all of it runs.
        budget: Seconds of steps per contender and comparison; 6 by default.
        max_seconds: Longest step; 60 by default.
        memory: Most GiB that a contender may use; 8 by default.
        data: Folder of IDX files (MNIST); scikit-learn's digits if None.

    Returns:
        1 if a contender of ours failed the gate or broke off for other reasons than time and
        memory, else 0.
    """
    load_before = load_average()
    if float(load_before) > 0.3:
        say(f"warning: the load average is {load_before}; other work on the machine skews ratios")
    suite = Suite(
        Options(
            threads,
            budget or (QUICK_BUDGET if quick else BUDGET),
            max_seconds or MAX_SECONDS,
            int((memory or MEMORY_GIB) * 2**30),
        )
    )
    folder = None if data is None else str(data)
    try:
        for comparison in grid(quick, list(parts), folder):
            suite.run(comparison)
    except KeyboardInterrupt:
        say("interrupted: the report holds what was measured until now")
    header = describe_machine(threads, [], load_before)
    header["packages"] = ", ".join(f"{name} {package(name)}" for name in VERSIONS)
    limits = suite.options
    header["limits"] = f"{limits.max_seconds:g} s a step, {memory or MEMORY_GIB:g} GiB a contender"
    header["images"] = "scikit-learn digits" if data is None else data.name
    del header["fp32 peak (x threads)"]
    stem = f"{slug(cpu_model())}-{header['date']}-clients" + ("-quick" if quick else "")
    for path in write(suite, header, out, stem, command):
        say(f"wrote {path}")
    return status(suite)


def write(suite: Suite, header: dict[str, str], out: Path, stem: str, command: str) -> list[Path]:
    """Prints the report and writes its files."""
    out.mkdir(parents=True, exist_ok=True)
    tables = report.sections(suite.outcomes)
    print(text_document(header, tables))
    written = [out / f"{stem}.csv", out / f"{stem}.md"]
    write_csv(written[0], suite.rows())
    about = f"Written by `{command}`. {report.ABOUT}"
    subtitle = f"{header['processor']}, {header['threads used']} threads, {header['date']}"
    try:
        figures = plot_curves(suite.outcomes, subtitle, out / f"{stem}.png")
        figures += plot_gains(suite.outcomes, subtitle, out / f"{stem}-gains.png")
    except ImportError as error:
        say(f"no plots: {error}")
        figures = []
    shown = [f"![{path.stem}]({path.name})" for path in figures]
    document = markdown_document("Training loops of other libraries", about, header, shown, tables)
    written[1].write_text(document)
    return written + figures


def status(suite: Suite) -> int:
    """The exit status: whether all of ours agreed, and none broke off."""
    # What ran into a limit has not failed: the plain form of a large batch is there to show that.
    failed = [
        outcome
        for outcome in suite.outcomes
        if outcome.contender.ours
        and (outcome.passed is False or outcome.refusal.startswith(FAILURES))
    ]
    for outcome in failed:
        said = outcome.refusal or outcome.gate
        say(f"{outcome.comparison.title}: {outcome.contender.name}: {said}")
    return 1 if failed else 0
