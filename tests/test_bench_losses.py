# SPDX-License-Identifier: Apache-2.0
"""The benchmark's table of losses. Nothing here asserts how fast anything is."""

import csv
import importlib
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gate, loss_builders, loss_report, loss_search, measure, targets  # noqa: E402
from bench.cases import Case, draw  # noqa: E402
from bench.contenders import BARE, OURS, contenders_of, find  # noqa: E402
from bench.gate import Verdict  # noqa: E402
from bench.loss_table import LINES, PML, ST, Line, grid  # noqa: E402
from bench.loss_table import find as find_line  # noqa: E402
from bench.suite import Options, Row, Suite  # noqa: E402
from bench.worker import FORWARD, STEP, Failure  # noqa: E402
from flashmetric.catalog import ENTRIES  # noqa: E402

MODULES = {PML: "pytorch_metric_learning", ST: "sentence_transformers"}
LOSSES = {
    PML: "pytorch_metric_learning.losses",
    ST: "sentence_transformers.sentence_transformer.losses",
}
lines = pytest.mark.parametrize("line", LINES, ids=lambda line: line.kernel)
peers = pytest.mark.parametrize(
    ("line", "name"),
    [(line, name) for line in LINES for name in line.peers],
    ids=lambda value: value.kernel if isinstance(value, Line) else value,
)


def time_row(kernel: str, provider: str, n: int, p50: float | None, note: str = "") -> Row:
    mode = FORWARD if provider == BARE else STEP
    return Row(kernel, provider, mode, "time", "ms", n, 128, p50, p50, p50, note=note)


def judge(kernel: str, name: str) -> Verdict:
    """The gate on a contender, in this process."""
    case = gate.gate_case(kernel)
    x, labels = draw(case)
    peer = find_line(kernel).peers.get(name)
    truth_of = peer.judged_by if peer and peer.judged_by else kernel
    expected = gate.truth(truth_of, x, labels, 0.0)
    x.requires_grad_()
    value = find(name).build[kernel](0.0)(x, labels)
    value.backward()
    limits = peer.limits if peer and peer.limits else gate.LIMITS
    return gate.judge(value.detach(), x.grad, expected, limits)


def test_every_loss_of_the_catalog_has_a_line():
    assert {line.name for line in LINES} == {entry.name for entry in ENTRIES}


def test_lines_are_told_apart():
    names = [line.kernel for line in LINES]
    assert len(set(names)) == len(names)
    assert {line.pml.judged_by for line in LINES if line.pml} - {""} <= set(names)
    for line in LINES:
        contenders = {contender.name for contender in contenders_of(line.kernel)}
        assert contenders == {OURS, BARE, *line.peers}
        calls = {entry.name: entry.call for entry in ENTRIES}
        assert line.call in ("batch", calls[line.name])


@lines
def test_ours_passes_the_gate(line):
    verdict = judge(line.kernel, OURS)
    assert verdict.passed, verdict.text


@peers
@pytest.mark.filterwarnings("ignore:Values of Tp or Tn:UserWarning")
def test_peers_pass_the_gate(line, name):
    if find_spec(MODULES[name]) is None:
        pytest.skip(f"the peer {name} is missing")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what its own imports deprecate
        importlib.import_module(LOSSES[name])
    verdict = judge(line.kernel, name)
    assert verdict.passed, verdict.text


def test_another_mean_does_not_pass_the_gate():
    case = gate.gate_case("MarginLoss")
    x, labels = draw(case)
    by_triplets = gate.truth("MarginLoss over triplets", x, labels, 0.0)
    assert not gate.judge(*gate.truth("MarginLoss", x, labels, 0.0), by_triplets).passed


def test_targets_are_among_the_cases():
    cases = {(case.kernel, case.n, case.d): case for case in grid()}
    assert len(cases) == len(grid())
    for target in targets.LOSS_TARGETS:
        case = cases[target.kernel, target.n, target.d]
        assert target.peer == BARE or target.peer in find_line(case.kernel).peers
    assert cases["NTXentLoss", 512, 128].per_class == 4
    assert cases["batch-all triplet", 4096, 128].per_class == 64
    for loss in ("LiftedStructureLoss", "NPairsLoss", "RankedListLoss", "FastAPLoss", "MarginLoss"):
        assert (loss, 2048, 128) in cases


def test_grid_selects():
    assert {case.kernel for case in grid(quick=True)} == {line.kernel for line in LINES}
    assert all(case.n <= 256 for case in grid(quick=True))
    assert {case.kernel for case in grid(only=["MarginLoss"])} == {
        "MarginLoss",
        "MarginLoss over triplets",
    }
    assert [case.n for case in grid(16, only=["batch-all triplet"])] == [512, 4096]


def test_rows_of_two_towers_belong_together():
    x, labels = draw(Case("InfoNCELoss", 24, 8, per_class=2, towers=True))
    assert x.shape == (48, 8)
    assert torch.equal(labels[:24], labels[24:]) and len(labels[:24].unique()) == 24
    product = loss_builders.bare(find_line("InfoNCELoss"))(x, labels)
    torch.testing.assert_close(product, x[:24] @ x[24:].T)


def test_plan_takes_five_calls_or_three_slow_ones():
    for seconds, calls in ((4.0, 5), (6.0, 3)):
        blocks, block = measure.plan(seconds, 0.1, least=5)
        assert blocks * block == calls
    assert measure.forecast([measure.Known(256, 8, 1.0, 1)], 512, 8, power=3).seconds == 8.0


def test_target_falls_back_to_the_largest_batch_of_the_peer():
    target = targets.Target("LiftedStructureLoss", 2048, 128, PML, 5, largest=True)
    rows = [time_row(target.kernel, OURS, n, 1.0) for n in (256, 2048)]
    rows.append(time_row(target.kernel, PML, 256, 8.0))
    assert target.evaluate(rows).mark == "not measured"  # the size was not tried
    rows.append(time_row(target.kernel, PML, 2048, None, "out of memory"))
    outcome = target.evaluate(rows)
    assert outcome.passed and "8.00 x at N=256" in outcome.figure
    assert "N=2048: out of memory" in outcome.figure
    rows[-1] = time_row(target.kernel, PML, 2048, 3.0)
    assert target.evaluate(rows).mark == "MISS"


def test_every_target_gets_a_verdict():
    outcomes = targets.evaluate_losses([])
    assert len(outcomes) == len(targets.LOSS_TARGETS) + 1
    assert {outcome.mark for outcome in outcomes} == {"not measured"}
    kernel = "batch-all triplet"
    row = Row(kernel, OURS, STEP, "extra memory", "MiB", 4096, 128, 96.0)
    assert targets.evaluate_losses([row])[-1].mark == "MISS"  # 100.7 MB


def test_search_finds_the_largest_batch(monkeypatch):
    line = find_line("batch-all triplet")
    contender = find(ST)

    def attempt(suite, contender, case, limit=1000):
        if case.n > limit:
            raise Failure("out of memory")
        return case.n**2

    suite = Suite(Options(1, memory=1536**2))
    monkeypatch.setattr(loss_search, "attempt", attempt)
    n, reason = loss_search.largest(suite, line, contender, 16)
    assert n == 960 and "N=1024: out of memory" in reason
    monkeypatch.setattr(loss_search, "attempt", lambda *a: attempt(*a, limit=1700))
    assert loss_search.largest(suite, line, contender, 16)[0] == 1664
    suite = Suite(Options(1, memory=8192**2))
    assert loss_search.largest(suite, line, contender, 16) == (4096, "")
    suite.verdicts[line.kernel, ST] = Verdict(True, "")
    monkeypatch.setattr(loss_search, "largest", lambda *a: (960, "too large"))
    cases = loss_search.search(suite, grid(16, only=[line.kernel, "LMNNLoss"]))
    assert [case.n for case in cases] == [512, 960, 4096, 2048]
    assert (suite.rows[0].metric, suite.rows[0].p50) == (loss_search.LARGEST, 960)


def test_report_has_a_line_per_loss_and_peer():
    kernel = "InfoNCELoss"
    rows = [time_row(kernel, OURS, 4096, 2.0, "5 calls"), time_row(kernel, BARE, 4096, 4.0)]
    rows.append(time_row(kernel, PML, 4096, 40.0, "5 calls; differs at this size"))
    rows.append(time_row(kernel, ST, 4096, None, "not installed"))
    rows.append(replace(rows[0], metric="extra memory", unit="MiB", p50=3.0))
    verdicts = {(kernel, OURS): Verdict(True, "good", ("row_lse",))}
    verdicts[kernel, PML] = Verdict(False, "bad")
    tables = {
        title: table
        for title, _, table in loss_report.sections(rows, verdicts, targets.evaluate_losses(rows))
    }
    first, second = tables["Losses, D = 128"]
    assert first[:5] == [kernel, "4096", "2.00 [2.00, 2.00]", "0.500 x", "3.00"]
    assert first[5:11] == [PML, "40.0 [40.0, 40.0]", "20.0 x", "", "pass/FAIL", "row_lse"]
    assert "differs at this size" in first[11] and "two towers" in first[11]
    assert second[5] == ST and "not installed" in second[11]
    assert len(tables["Targets"]) == len(targets.LOSS_TARGETS) + 1
    assert [row.p50 for row in loss_report.gate_rows(verdicts, 128)] == [1.0, 0.0]


def test_smoke_run(tmp_path):
    names = ["MarginLoss over triplets", "SigLIPLoss"]
    command = [sys.executable, "-m", "bench", "--quick", "--threads", "1", "--budget", "0.01"]
    command += ["--dims", "16", "--out", str(tmp_path), "--without", PML, ST, "--losses", *names]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(p for p in sys.path if p),
            "FLASHMETRIC_REQUIRE_NATIVE": "0",
        },
        capture_output=True,
        text=True,
        timeout=240,
    )
    (table,) = tmp_path.glob("*.csv")
    (summary,) = tmp_path.glob("*.md")
    assert "Every loss" in summary.read_text() and "Targets" in done.stdout
    with table.open() as file:
        rows = list(csv.DictReader(file))
    assert {row["kernel"] for row in rows} == set(names)
    assert all(row["p50"] for row in rows if row["provider"] == BARE)
    gated = [row for row in rows if row["metric"] == "gate" and row["provider"] == OURS]
    # Without the native library ours is refused with the reason, and the status says so.
    assert len(gated) == 2 and {row["p50"] for row in gated} <= {"0", "1"}
    assert done.returncode == int("0" in {row["p50"] for row in gated}), done.stderr
