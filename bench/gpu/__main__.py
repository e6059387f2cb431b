# SPDX-License-Identifier: Apache-2.0
"""Command line of the GPU benchmark: ``python -m bench.gpu --help``."""

import argparse
import datetime
import platform
import shlex
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from bench.gpu.cases import GROUPS, grid
from bench.gpu.plots import plot
from bench.gpu.report import DRY_RUN, markdown_report, text_report, write_data
from bench.gpu.suite import Options, Results, Suite
from bench.gpu.targets import evaluate
from bench.machine import PACKAGES, cpu_model, git_commit, package, slug
from bench.suite import say

SECONDS = {"quick": 45.0, "default": 165.0, "full": 1500.0}
DRY_RUN_SECONDS = 600.0  # of a busy machine: a dry run is to be complete, not fast
BUDGETS = {"quick": 0.06, "default": 0.2, "full": 0.5}
RESULTS = Path(__file__).resolve().parents[1] / "results"


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("bench.gpu", description="Times the CUDA ops against peers.")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="targets and a few sizes")
    scope.add_argument("--full", action="store_true", help="sweeps in two precisions")
    parser.add_argument("--only", nargs="+", choices=GROUPS, metavar="CASE", help=str(GROUPS))
    parser.add_argument("--seconds", type=float, help="time limit of the run; it ends in a report")
    parser.add_argument("--budget", type=float, help="seconds of timing per contender and case")
    parser.add_argument("--out", type=Path, help="folder of the results (bench/results)")
    parser.add_argument("--dry-run", action="store_true", help="no GPU, made-up figures")
    options = parser.parse_args(arguments)
    options.scope = "quick" if options.quick else "full" if options.full else "default"
    for name in ("seconds", "budget"):
        value = getattr(options, name)
        if value is not None and not value > 0:
            parser.error(f"--{name}: expected a positive number, got {value:g}")
    if options.dry_run and options.out is not None:
        parser.error("--dry-run writes made-up figures to a temporary folder: leave --out away")
    if not options.dry_run and not torch.cuda.is_available():
        parser.error("this PyTorch sees no CUDA device; --dry-run checks everything else")
    return options


def header_of(results: Results, scope: str) -> dict[str, str]:
    """What ran where."""
    rates = []
    for name, rate in results.peaks.items():
        rates.append(
            f"copy {rate / 1e9:.0f} GB/s" if name == "copy" else f"{name} {rate / 1e12:.0f} TFLOP/s"
        )
    packages = [name for name in PACKAGES if name != "flashmetric"]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        **results.facts,
        "measured peaks": ", ".join(rates) or "not measured",
        "processor": cpu_model(),
        "python": platform.python_version(),
        "packages": ", ".join(f"{name} {package(name)}" for name in packages),
        "scope": scope,
    }


def write(options: argparse.Namespace, results: Results, command: str) -> list[Path]:
    """Writes all files and prints the report."""
    dry_run = options.dry_run
    folder = Path(tempfile.mkdtemp(prefix="flashmetric-dry-run-")) if dry_run else options.out
    folder = folder or RESULTS
    folder.mkdir(parents=True, exist_ok=True)
    header = header_of(results, options.scope)
    gpu = "dry-run" if dry_run else slug(header.get("gpu", "unknown-gpu"))
    stem = f"{gpu}-{header['date']}" + ("" if options.scope == "default" else f"-{options.scope}")
    outcomes = evaluate(results.rows, dry_run)
    print(text_report(header, results, outcomes, dry_run))
    title = DRY_RUN if dry_run else f"{header.get('gpu', '')}, {header['date']}"
    written = []
    try:
        written += plot(results.rows, results.peaks, title, folder, stem)
    except ImportError as error:
        say(f"no plots: {error}")
    names = [path.name for path in written]
    summary = folder / f"{stem}.md"
    summary.write_text(markdown_report(header, results, outcomes, command, dry_run, names))
    return [*write_data(folder, stem, header, results, outcomes, dry_run), summary, *written]


def interrupt(*_: Any) -> None:
    """Turns a request to end, such as that of ``timeout``, into an early report."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a group of processes may be told twice
    raise KeyboardInterrupt


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if one of our own contenders was wrong or failed."""
    options = parse(arguments)
    signal.signal(signal.SIGTERM, interrupt)
    suite = Suite(
        Options(
            options.dry_run,
            options.seconds or (DRY_RUN_SECONDS if options.dry_run else SECONDS[options.scope]),
            options.budget or BUDGETS[options.scope],
        )
    )
    suite.run(grid(options.scope, options.only))
    shown = [a for a in sys.argv[1:] if not Path(a).is_absolute()] if arguments is None else []
    command = shlex.join(["python", "-m", "bench.gpu", *shown])
    for path in write(options, suite.results, command):
        say(f"wrote {path}")
    return 1 if suite.results.failed else 0


if __name__ == "__main__":
    sys.exit(main())
