# SPDX-License-Identifier: Apache-2.0
"""Command line of the benchmark: ``python -m bench --help``."""

import argparse
import os
import shlex
import sys
from pathlib import Path

import torch

from bench import loss_report, loss_search, loss_table
from bench.cases import Case, grid
from bench.clients import PARTS
from bench.contenders import CONTENDERS
from bench.machine import cpu_model, describe_machine, load_average, slug
from bench.peak import Peak, PeakMeter
from bench.plot import plot
from bench.probes import large_memory, tile_rate
from bench.report import (
    markdown_document,
    markdown_report,
    text_document,
    text_report,
    write_csv,
)
from bench.suite import Options, Suite, say
from bench.targets import LARGE_FEATURES, LARGE_ROWS, evaluate, evaluate_losses

BUDGETS = {"quick": 0.25, "default": 0.8, "full": 1.0}


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Reads the command line."""
    parser = argparse.ArgumentParser("bench", description="Compares the fused losses with peers.")
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--quick", action="store_true", help="two sizes, under two minutes")
    scope.add_argument("--full", action="store_true", help="the whole grid of N and D, hours")
    parser.add_argument(
        "--losses", nargs="*", metavar="NAME", help="a line for every loss instead, or for some"
    )
    parser.add_argument(
        "--clients", nargs="*", metavar="PART", help="training loops of the peers instead"
    )
    parser.add_argument("--data", type=Path, help="with --clients: a folder of MNIST's IDX files")
    parser.add_argument("--only", choices=("triplet", "contrastive"), help="one loss")
    parser.add_argument("--sizes", type=int, nargs="+", metavar="N", help="batch sizes")
    parser.add_argument("--dims", type=int, nargs="+", metavar="D", help="numbers of features")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--budget", type=float, help="seconds of timing per contender and mode")
    parser.add_argument(
        "--max-seconds", type=float, help="longest call to time, 5 by default, 120 with --losses"
    )
    parser.add_argument("--memory", type=float, metavar="GIB", help="most that a contender may use")
    parser.add_argument(
        "--without",
        nargs="+",
        default=[],
        metavar="NAME",
        choices=[contender.name for contender in CONTENDERS],
        help="contenders to leave out",
    )
    parser.add_argument("--st-python", help="another Python that has sentence-transformers")
    parser.add_argument("--no-probes", action="store_true", help="no peak rate, no large batch")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    options = parser.parse_args(arguments)
    if options.threads < 1:
        parser.error(f"--threads: expected at least 1, got {options.threads}")
    for name in ("sizes", "dims"):
        if any(value < 2 for value in getattr(options, name) or ()):
            parser.error(f"--{name}: expected numbers of at least 2")
    if any(value < 16 for value in options.sizes or ()):
        parser.error("--sizes: expected at least 16, so that there are two classes")
    if options.max_seconds is None and options.clients is None:
        options.max_seconds = 5.0 if options.losses is None else 120.0
    if unknown := sorted(set(options.clients or ()) - set(PARTS)):
        parser.error(f"--clients: there is no {', '.join(unknown)}; there are {', '.join(PARTS)}")
    if options.clients is not None and (options.sizes or options.only or options.losses):
        parser.error("--clients has sizes of its own: --sizes, --only, --losses are of the others")
    known = {name for line in loss_table.LINES for name in (line.name, line.kernel)}
    if unknown := sorted(set(options.losses or ()) - known):
        parser.error(f"--losses: there is no {', '.join(unknown)}; there are {sorted(known)}")
    if options.losses is not None and (options.sizes or options.only):
        parser.error("--losses has sizes of its own: --sizes and --only are of the other benchmark")
    return options


def run(suite: Suite, cases: list[Case], searching: bool = False) -> None:
    """Gates and measures all cases."""
    for kernel in dict.fromkeys(case.kernel for case in cases):
        suite.gate(kernel)
    if searching:
        cases = loss_search.search(suite, cases)
    for number, case in enumerate(cases, 1):
        say(f"[{number}/{len(cases)}] {case.title}")
        suite.run(case)


def probe(suite: Suite, scope: str, only: str | None) -> list[Peak]:
    """Measures the machine's peak, the rate of the mining operator and the large batch."""
    threads = suite.options.threads
    try:
        meter = PeakMeter()
    except OSError as error:
        say(f"peak: {error}")
        meter = None
    peaks = []
    if meter is not None:
        isas = ["generic", "avx2", "avx512"]
        for isa in isas[: isas.index(meter.isa) + 1]:
            peaks += [meter.measure(count, isa=isa) for count in sorted({1, threads})]
    if only != "contrastive":
        n, dims = (2048, (256,)) if scope == "quick" else (4096, (256, 512, 1024))
        tile_rate(suite, meter, n, dims)
    if scope != "quick":
        large_memory(suite, LARGE_ROWS, LARGE_FEATURES)
    return peaks


def write(
    suite: Suite, header: dict[str, str], folder: Path, stem: str, command: str
) -> list[Path]:
    """Writes CSV, Markdown and plots, and prints the report."""
    folder.mkdir(parents=True, exist_ok=True)
    outcomes = evaluate(suite.rows)
    print(text_report(header, suite.rows, outcomes))
    gate = [f"{k}: {name}: {v.text}" for (k, name), v in suite.verdicts.items()]
    written = [folder / f"{stem}.csv", folder / f"{stem}.md"]
    write_csv(written[0], suite.rows)
    written[1].write_text(markdown_report(header, gate, suite.rows, outcomes, command))
    subtitle = f"{header['processor']}, {header['threads used']} threads, {header['date']}"
    try:
        for kernel in dict.fromkeys(row.kernel for row in suite.rows if row.metric == "time"):
            for metric in ("time", "extra memory"):
                name = f"{stem}-{slug(kernel)}-{slug(metric)}"
                written += plot(suite.rows, kernel, metric, subtitle, folder / name)
    except ImportError as error:
        say(f"no plots: {error}")
    return written


def write_losses(
    suite: Suite, header: dict[str, str], folder: Path, stem: str, command: str
) -> list[Path]:
    """Writes CSV and Markdown of the table of losses, and prints the report."""
    folder.mkdir(parents=True, exist_ok=True)
    tables = loss_report.sections(suite.rows, suite.verdicts, evaluate_losses(suite.rows))
    print(text_document(header, tables))
    features = next((row.d for row in suite.rows), 0)
    written = [folder / f"{stem}.csv", folder / f"{stem}.md"]
    write_csv(written[0], suite.rows + loss_report.gate_rows(suite.verdicts, features))
    about = f"Written by `{command}`. {loss_report.ABOUT}"
    written[1].write_text(markdown_document("Every loss", about, header, [], tables))
    return written


def main(arguments: list[str] | None = None) -> int:
    """Runs the benchmark; returns 1 if a contender of ours failed the gate."""
    options = parse(arguments)
    # Before any worker starts: OpenMP and the compiler read these when they are loaded. Compiling
    # in the worker itself saves the start of a pool of processes for every case.
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    shown = [a for a in sys.argv[1:] if not Path(a).is_absolute()] if arguments is None else []
    command = shlex.join(["python", "-m", "bench", *shown])
    if options.clients is not None:
        from bench.clients.run import run as run_clients

        return run_clients(
            options.clients,
            options.out,
            command,
            threads=options.threads,
            quick=options.quick,
            budget=options.budget,
            max_seconds=options.max_seconds,
            memory=options.memory,
            data=options.data,
        )
    scope = "quick" if options.quick else "full" if options.full else "default"
    interpreters = {"st": options.st_python} if options.st_python else {}
    suite = Suite(
        Options(
            options.threads,
            options.budget or BUDGETS[scope],
            options.max_seconds,
            interpreters,
            frozenset(options.without),
            least=3 if options.losses is None else 5,
            memory=None if options.memory is None else int(options.memory * 2**30),
            steps_only=options.losses is not None,
        )
    )
    load_before = load_average()
    if float(load_before) > 0.3:
        say(f"warning: the load average is {load_before}; other work on the machine skews ratios")
    peaks: list[Peak] = []
    try:
        if options.losses is not None:
            cases = loss_table.grid((options.dims or [128])[0], options.quick, options.losses)
            run(suite, cases, searching=not options.quick)
        else:
            run(suite, grid(options.only, options.sizes, options.dims, scope))
            if not options.no_probes:
                peaks = probe(suite, scope, options.only)
    except KeyboardInterrupt:
        say("interrupted: the report holds what was measured until now")
    header = describe_machine(options.threads, peaks, load_before)
    stem = f"{slug(cpu_model())}-{header['date']}" + ("" if scope == "default" else f"-{scope}")
    stem += "-losses" if options.losses is not None else ""
    writer = write if options.losses is None else write_losses
    for path in writer(suite, header, options.out, stem, command):
        say(f"wrote {path}")
    ours = [v for (_, name), v in suite.verdicts.items() if name.startswith("flashmetric")]
    return 0 if all(v.passed for v in ours) else 1


if __name__ == "__main__":
    sys.exit(main())
