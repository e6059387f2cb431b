# SPDX-License-Identifier: Apache-2.0
"""The header of a report: what ran where, without anything private to the machine."""

import datetime
import os
import platform
import re
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from bench.peak import Peak

OMP_VARIABLES = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_SPINCOUNT")
PACKAGES = ("flashmetric", "pytorch-metric-learning", "sentence-transformers", "numpy")


def cpu_model() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return " ".join(line.split(":", 1)[1].split())
    return platform.processor() or platform.machine()


def slug(text: str) -> str:
    """Lower-case letters, digits and hyphens only, for a file name."""
    text = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def git_commit() -> str:
    """Commit of the source tree, marked if files differ from it."""
    root = Path(__file__).resolve().parent

    def git(*arguments: str) -> str:
        done = subprocess.run(["git", *arguments], cwd=root, capture_output=True, text=True)
        return done.stdout.strip() if done.returncode == 0 else ""

    commit = git("rev-parse", "--short=12", "HEAD")
    if not commit:
        return "unknown"
    changed = git("status", "--porcelain", "--untracked-files=no")
    return commit + (" with local changes" if changed else "")


def package(name: str) -> str:
    """Installed version of a package."""
    try:
        return version(name)
    except PackageNotFoundError:
        return "not installed"


def library_facts() -> str:
    """What the library says about itself: backend, instruction set and threads."""
    try:
        from flashmetric._library import describe

        facts = describe()
    except ImportError as error:
        return f"not importable ({error})"
    known = {key: facts[key] for key in ("backend", "cpu_isa", "threads") if key in facts}
    return ", ".join(f"{key} {value}" for key, value in known.items())


def load_average() -> str:
    """Runnable processes, averaged over one minute; other work on the machine shows here."""
    return f"{os.getloadavg()[0]:.2f}"


def describe_machine(threads: int, peaks: list[Peak], load_before: str) -> dict[str, str]:
    """Collects the header.

    Args:
        threads: Threads of every contender.
        peaks: Peaks measured in this run.
        load_before: Load average when the run began.

    Returns:
        Lines of the header by name.
    """
    omp = [f"{key}={os.environ[key]}" for key in OMP_VARIABLES if key in os.environ]
    rates = [f"{p.gflops:.0f} GFLOP/s ({p.isa} x {p.threads})" for p in peaks]
    return {
        "date": datetime.date.today().isoformat(),
        "commit": git_commit(),
        "processor": cpu_model(),
        "cores visible": str(len(os.sched_getaffinity(0))),
        "threads used": str(threads),
        "torch": f"{torch.__version__}, CPU capability {torch.backends.cpu.get_cpu_capability()}",
        "python": platform.python_version(),
        "flashmetric": library_facts(),
        "packages": ", ".join(f"{name} {package(name)}" for name in PACKAGES),
        "OpenMP": ", ".join(omp) or "defaults (no variable set)",
        "fp32 peak (x threads)": "; ".join(rates) or "not measured",
        "load average": f"{load_before} before, {load_average()} after (own work included)",
    }
