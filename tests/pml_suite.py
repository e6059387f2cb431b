# SPDX-License-Identifier: Apache-2.0
"""Runs the tests of pytorch-metric-learning itself with the classes of flashmetric.pml in place.

Its wheel has no tests: they are in its repository, of which a checkout is needed::

    python tests/pml_suite.py CHECKOUT [--plain] [pytest options]

``--plain`` runs the same tests on its own classes, to tell whose failure one is. Without test files
among the options, the folders in FOLDERS run. It is the installed version that is tested.
"""

import collections
import functools
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

MODULES = ("losses", "miners", "distances", "reducers")
FOLDERS = (*MODULES, "regularizers")
PLAIN = "PML_SUITE_PLAIN"

calls: collections.Counter[tuple[str, str]] = collections.Counter()


def substitute() -> None:
    """Rebind the names that the tests import."""
    for module in MODULES:
        ours = importlib.import_module(f"flashmetric.pml.{module}")
        peer = importlib.import_module(f"pytorch_metric_learning.{module}")
        for name in ours.__all__:
            setattr(peer, name, getattr(ours, name))


def count_calls() -> None:
    """Note which calls the kernels compute, and which are left to the parents."""
    from flashmetric.pml import losses, miners
    from flashmetric.pml.fallback import NotFusedError

    def counted(name, method):
        @functools.wraps(method)
        def wrapper(self, batch):
            try:
                result = method(self, batch)
            except NotFusedError:
                calls[name, "left"] += 1
                raise
            calls[name, "fused"] += 1
            return result

        return wrapper

    for module in (losses, miners):
        for name in module.__all__:
            kind = getattr(module, name)
            if "fused" in vars(kind):
                kind.fused = counted(name, kind.fused)


def pytest_configure(config: pytest.Config) -> None:
    if not os.environ.get(PLAIN):
        substitute()
        count_calls()


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    for name in sorted({name for name, _ in calls}):
        fused, left = calls[name, "fused"], calls[name, "left"]
        terminalreporter.write_line(f"{name}: {fused} calls fused, {left} left to the parent")


def run(checkout: Path, options: list[str]) -> subprocess.CompletedProcess[str]:
    """Run the tests of a checkout in a process of their own."""
    tests = checkout.resolve() / "tests"
    plain = "--plain" in options
    options = [option for option in options if option != "--plain"]
    if not any(Path(option.partition("::")[0]).exists() for option in options):
        options += [str(tests / name) for name in FOLDERS if (tests / name).is_dir()]
    environment = {"TEST_DEVICE": "cpu", "TEST_DTYPES": "float32,float64", **os.environ}
    paths = [str(Path(__file__).parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    environment[PLAIN] = "1" if plain else ""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "pml_suite", "-p", "no:cacheprovider"]
    command += ["-c", os.devnull, "--rootdir", str(tests.parent), *options]
    # Elsewhere, because the tests put a relative "src" first on the path.
    with tempfile.TemporaryDirectory() as elsewhere:
        return subprocess.run(
            command, cwd=elsewhere, env=environment, text=True, stdout=subprocess.PIPE, check=False
        )


def main(arguments: list[str]) -> int:
    if not arguments:
        print(__doc__)
        return 2
    checkout = Path(arguments[0])
    if not (checkout / "tests").is_dir():
        print(f"skipped: {checkout} is no checkout of pytorch-metric-learning: it has no tests/")
        return 0
    finished = run(checkout, arguments[1:])
    print(finished.stdout, end="")
    return finished.returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
