# SPDX-License-Identifier: Apache-2.0
"""The GPU benchmark without a GPU: its logic, and its dry run. Nothing here measures anything."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gate  # noqa: E402
from bench.cases import draw, settle  # noqa: E402
from bench.gpu import rows as kinds  # noqa: E402
from bench.gpu import sanitize, suite, targets, traffic  # noqa: E402
from bench.gpu.__main__ import RESULTS, SECONDS, header_of, parse  # noqa: E402
from bench.gpu.cases import GROUPS, PRECISIONS, GpuCase, grid, target_cases  # noqa: E402
from bench.gpu.contenders import (  # noqa: E402
    BARE,
    BEST,
    CONTENDERS,
    ENGINE,
    OURS,
    PML,
    SLAB,
    environment,
)
from bench.gpu.fake import FakeDevice  # noqa: E402
from bench.gpu.harness import OPS, Failure  # noqa: E402
from bench.gpu.launches import count_launches, short  # noqa: E402
from bench.gpu.report import markdown_report, text_report, write_data  # noqa: E402
from bench.gpu.rows import row_of  # noqa: E402
from bench.gpu.truth import full_truth  # noqa: E402
from bench.gpu.worker import Death, answer  # noqa: E402

CASE = GpuCase("triplet", "triplet", 8192, 512, "bfloat16", contenders=(OURS, BEST, PML, BARE))


def environ() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}


def figure(case: GpuCase, provider: str, metric: str, value: float | None, note: str = ""):
    row = row_of(case, provider, metric, "unit", note)
    row.p50 = row.p20 = row.p80 = value
    return row


class FakeWorker:
    """Answers the suite's orders from a script; ``faults`` raises instead."""

    def __init__(self, faults: dict[tuple[str, str], Exception] | None = None) -> None:
        self.faults = faults or {}
        self.log: list[tuple[str, object]] = []
        self.starts = 0

    def start(self, dry_run: bool) -> "FakeWorker":
        self.starts += 1
        return self

    def ask(self, order: str, *arguments: object, limit: float) -> object:
        name = arguments[-1] if order == "gate" else arguments[0] if arguments else ""
        self.log.append((order, name))
        if (order, name) in self.faults:
            raise self.faults[order, name]
        seconds = 1e-3 if name == OURS else 2e-3
        return {
            "facts": {"gpu": "none"},
            "peaks": {"bfloat16": 1e12, "copy": 1e12},
            "gate": (True, "ok"),
            "open": 0.5,
            "first": {"extra": 2**20, "seconds": seconds, "wrong": ""},
            "time": [seconds] * 4,
            "traffic": 2**20,
            "launches": {"kernels": 3.0, "copies": 1.0, "busy_seconds": 4e-5, "text": "3 ours"},
            "replay": [5e-5] * 20,
        }[order]

    def close(self) -> None:
        pass


def measured(worker: FakeWorker, *cases: GpuCase, seconds: float = 100.0) -> suite.Results:
    run = suite.Suite(suite.Options(seconds=seconds), worker.start)
    run.run(list(cases))
    return run.results


def found(results: suite.Results, case: GpuCase, provider: str, metric: str = kinds.TIME):
    where = (case.precision, case.n, case.d)
    return kinds.lookup(results.rows, case.group, case.label, provider, metric, *where)


def test_targets_belong_to_cases_that_run():
    for scope in ("quick", "default", "full"):
        cases = {(c.group, c.label, c.n, c.d, c.precision): c for c in grid(scope, None)}
        for target in targets.TARGETS:
            case = cases[target.group, target.kernel, target.n, target.d, target.precision]
            assert OURS in case.contenders
            assert not target.peer or target.peer in case.contenders


def test_grid_selects_groups_and_knows_all_contenders():
    assert {case.group for case in grid("default", None)} == set(GROUPS)
    assert {case.group for case in grid("full", ["memory"])} == {"memory"}
    assert len(grid("quick", None)) < len(grid("default", None)) < len(grid("full", None))
    for case in grid("full", None):
        assert set(case.contenders) <= set(CONTENDERS) and case.precision in PRECISIONS


@pytest.mark.parametrize("seconds", [1e-9, 1e-4, 1e-2, 0.3, 2.9])
def test_plan_takes_twenty_calls_or_four_budgets(seconds):
    calls = suite.plan(seconds, 0.2) * suite.ROUNDS
    assert suite.ROUNDS <= calls <= suite.MOST
    assert calls >= suite.FEWEST or calls * seconds >= 0.5 * 4 * 0.2


@pytest.mark.parametrize("kernel", ["hardest", "triplet", "contrastive"])
def test_truth_at_full_size_agrees_with_the_gate(kernel, monkeypatch):
    monkeypatch.setattr("bench.gpu.truth.CHUNK_ELEMENTS", 1500)  # several chunks, a short last one
    case = gate.gate_case(kernel)
    margin = settle(case).margin
    x, labels = draw(case)
    result, grad = gate.truth(kernel, x, labels, margin)
    ours = full_truth(kernel, x, labels, margin)
    torch.testing.assert_close(ours.result, result, rtol=1e-9, atol=1e-9)
    assert 0 < ours.active < 1
    if grad is None:
        assert ours.grad_norm is None
    else:
        assert ours.grad_norm == pytest.approx(float(grad.norm()), rel=1e-9)


def test_environment_comes_back(monkeypatch):
    monkeypatch.delenv(ENGINE, raising=False)
    with environment({ENGINE: "slab"}):
        assert os.environ[ENGINE] == "slab"
        with environment({ENGINE: "tile"}):
            assert os.environ[ENGINE] == "tile"
        assert os.environ[ENGINE] == "slab"
    assert ENGINE not in os.environ


def test_launches_are_counted_per_call_and_by_owner():
    kernel = "void flashmetric::(anonymous namespace)::tile_kernel<float, 128>(float const*)"
    fill = "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float> >()"
    events = [{"cat": "kernel", "name": kernel, "dur": 10.0}] * 4
    events += [{"cat": "kernel", "name": fill, "dur": 2.0}] * 2
    events += [{"cat": "gpu_memset", "name": "Memset (Device)", "dur": 1.0}] * 2
    events += [{"cat": "cuda_runtime", "name": "cudaLaunchKernel", "dur": 3.0}] * 6
    events += [{"cat": "gpu_user_annotation", "name": "ProfilerStep#1"}, {"ph": "M"}]
    counted = count_launches({"traceEvents": events}, 2)
    assert (counted.kernels, counted.ours, counted.copies) == (3.0, 2.0, 1.0)
    assert counted.busy_seconds == pytest.approx(22e-6)
    assert "2 x tile_kernel" in counted.text and "1 x vectorized_elementwise_kernel" in counted.text
    assert short("ampere_sgemm_128x64_nn") == "ampere_sgemm_128x64_nn"


def test_a_profile_without_kernels_is_no_measurement():
    assert count_launches({"traceEvents": [{"cat": "cpu_op", "name": "aten::mm"}]}, 3) is None
    assert count_launches({}, 3) is None
    with pytest.raises(ValueError, match="calls: expected at least 1"):
        count_launches({}, 0)


def test_traffic_counts_operators_but_no_views_and_no_repeated_rows():
    x = torch.randn(8, 4)
    assert traffic.traffic(lambda: x.T[1:].unsqueeze(0)) == 0
    assert traffic.traffic(lambda: x @ x.T) == 4 * (2 * 32 + 64)
    assert traffic.traffic(lambda: x + x[:1].expand(8, 4)) == 4 * (32 + 4 + 32)
    leaf = x.clone().requires_grad_()
    forward = traffic.traffic(lambda: (leaf @ leaf.T).sum())
    assert traffic.traffic(lambda: (leaf @ leaf.T).sum().backward()) > 2 * forward


def test_an_op_without_kernel_is_known():
    import flashmetric  # noqa: F401

    assert not traffic.has_cuda_kernel("no_such_op")


def test_every_target_is_met_missed_or_not_yet_measured():
    target = targets.Target("triplet", "triplet", 8192, 512, "bfloat16", "times", 20, PML)
    ours = figure(CASE, OURS, kinds.TIME, 1.0)
    assert target.evaluate([ours, figure(CASE, PML, kinds.TIME, 30.0)]).mark == "met"
    missed = target.evaluate([ours, figure(CASE, PML, kinds.TIME, 15.0)])
    assert (missed.mark, missed.gap, missed.figure) == ("MISSED", "by 25 %", "15.0 x")
    refused = target.evaluate([ours, figure(CASE, PML, kinds.TIME, None, "out of memory")])
    assert refused.mark == "not yet measured" and "out of memory" in refused.figure
    assert target.evaluate([ours]).mark == "not yet measured"


@pytest.mark.parametrize(
    ("what", "metric", "good", "bad"),
    [
        ("rate", kinds.RATE, 400.0, 100.0),
        ("device time", kinds.DEVICE_TIME, 50.0, 70.0),
        ("launches", kinds.LAUNCHES, 3.0, 4.0),
        ("memory", kinds.MEMORY, 1.0, 300.0),
    ],
)
def test_bounds_point_the_right_way(what, metric, good, bad):
    bound = {"rate": 350, "device time": 60, "launches": 3, "memory": 4}[what]
    target = targets.Target("triplet", "triplet", 8192, 512, "bfloat16", what, bound)
    assert target.evaluate([figure(CASE, OURS, metric, good)]).mark == "met"
    assert target.evaluate([figure(CASE, OURS, metric, bad)]).mark == "MISSED"
    silent = target.evaluate([figure(CASE, OURS, kinds.TIME, None, "failed the gate")])
    assert silent.mark == "not yet measured" and "failed the gate" in silent.figure


def test_made_up_figures_meet_no_target():
    rows = [figure(case, OURS, kinds.RATE, 1e6) for case in target_cases()]
    marks = [outcome.mark for outcome in targets.evaluate(rows, made_up=True)]
    assert len(marks) == len(targets.TARGETS)
    assert set(marks) == {"DRY RUN", "not yet measured"}


def test_report_of_nothing_lists_all_targets_and_meets_none(tmp_path):
    results = suite.Results()
    outcomes = targets.evaluate(results.rows)
    header = header_of(results, "default")
    text = text_report(header, results, outcomes, dry_run=False)
    summary = markdown_report(header, results, outcomes, "command", False, [])
    for target in targets.TARGETS:
        assert target.text in text and target.text in summary
    assert text.count("not yet measured") == len(targets.TARGETS)
    assert " met" not in text and "MISSED" not in text
    table, data = write_data(tmp_path, "stem", header, results, outcomes, False)
    assert table.read_text().startswith("group,kernel,provider,precision,")
    marks = [entry["mark"] for entry in json.loads(data.read_text())["targets"]]
    assert set(marks) == {"not yet measured"}


def test_suite_measures_in_turns_and_reports_ratios():
    worker = FakeWorker()
    results = measured(worker, CASE)
    turns = [name for order, name in worker.log if order == "time"]
    assert turns[:4] == [OURS, BEST, PML, BARE] and len(turns) == 4 * suite.ROUNDS
    assert found(results, CASE, BEST).ratio_to_ours == pytest.approx(2.0)
    assert found(results, CASE, BARE).mode == kinds.FORWARD
    assert found(results, CASE, OURS, kinds.RATE).p50 == pytest.approx(CASE.flops / 1e-3 / 1e12)
    assert not results.failed


def test_suite_names_who_was_wrong_and_goes_on():
    wrong = FakeWorker({("gate", OURS): Failure("failed (RuntimeError: no)")})
    results = measured(wrong, CASE)
    assert found(results, CASE, OURS).p50 is None
    assert found(results, CASE, BEST).p50 is not None
    assert found(results, CASE, BEST).ratio_to_ours is None
    assert len(results.failed) == 1 and OURS in results.failed[0]


def test_a_fault_of_a_peer_is_not_ours():
    fault = {("first", PML): Failure("out of memory"), ("gate", BEST): Failure("failed (E: no)")}
    results = measured(FakeWorker(fault), CASE)
    assert found(results, CASE, PML).note == "out of memory"
    assert found(results, CASE, PML, kinds.MEMORY).note == "out of memory"
    assert not results.failed


def test_suite_survives_the_death_of_the_device():
    worker = FakeWorker({("first", OURS): Death("failed (illegal access)")})
    again = GpuCase("triplet", "triplet", 512, 64, "bfloat16", contenders=CASE.contenders)
    third = GpuCase("triplet", "triplet", 256, 64, "bfloat16", contenders=CASE.contenders)
    results = measured(worker, CASE, again, third)
    assert worker.starts == 3
    for case in (CASE, again, third):
        assert found(results, case, OURS).p50 is None
        assert found(results, case, BEST).p50 is not None
    assert "ended the process" in found(results, third, OURS).note
    assert len(results.failed) == 2


def test_a_graph_that_cannot_be_captured_costs_only_its_row():
    worker = FakeWorker({("replay", OURS): Death("failed (capture)")})
    case = GpuCase("step", "triplet", 512, 128, contenders=(OURS, SLAB, PML), launches=True)
    results = measured(worker, case)
    assert "no graph" in found(results, case, OURS, kinds.DEVICE_TIME).note
    assert found(results, case, SLAB, kinds.DEVICE_TIME).p50 == pytest.approx(50.0)
    assert found(results, case, PML, kinds.DEVICE_TIME) is None
    assert found(results, case, OURS, kinds.LAUNCHES).p50 == 4.0
    assert not results.failed


def test_time_limit_leaves_reasons_and_no_faults():
    results = measured(FakeWorker(), CASE, seconds=-1.0)
    assert {row.p50 for row in results.rows} == {None}
    assert all("time limit" in row.note for row in results.rows)
    assert not results.failed


def test_answer_keeps_the_process_and_drops_the_contender():
    class Broken:
        problems = {OURS: object()}
        device = FakeDevice()

        def first(self, name: str) -> None:
            raise RuntimeError("no such thing")

    assert answer(Broken(), "first", (OURS,)) == (
        "failure",
        "failed (RuntimeError: no such thing)",
    )
    assert OURS not in Broken.problems
    assert answer(Broken(), "facts", ())[0] == "failure"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--dry-run", "--only", "nothing"], "invalid choice: 'nothing'"),
        (["--dry-run", "--quick", "--full"], "not allowed with"),
        (["--dry-run", "--seconds", "0"], "--seconds: expected a positive number"),
        (["--dry-run", "--out", "somewhere"], "leave --out away"),
    ],
)
def test_bad_arguments_have_one_clear_message(arguments, words, capsys):
    with pytest.raises(SystemExit) as stopped:
        parse(arguments)
    assert stopped.value.code == 2
    assert words in capsys.readouterr().err


def test_without_a_gpu_it_says_so(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SystemExit):
        parse([])
    assert "sees no CUDA device; --dry-run" in capsys.readouterr().err
    assert parse(["--dry-run"]).scope in SECONDS


def test_sanitizer_program_calls_every_op(capsys):
    arguments = ["--device", "cpu", "--quick", "--engines", ""]
    assert sanitize.main(arguments) == 0
    text = capsys.readouterr().out
    assert all(op in text for op in OPS)


def test_dry_run_end_to_end(tmp_path):
    before = sorted(RESULTS.iterdir())
    done = subprocess.run(
        [sys.executable, "-m", "bench.gpu", "--dry-run", "--quick"]
        + ["--only", "step", "memory", "sweep-selection"],
        cwd=ROOT,
        env=environ() | {"TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("DRY RUN")
    assert "not yet measured" in done.stdout and " met" not in done.stdout
    assert sorted(RESULTS.iterdir()) == before
    (folder,) = tmp_path.glob("flashmetric-dry-run-*")
    data = json.loads(next(folder.glob("*.json")).read_text())
    assert data["dry_run"] and not data["faults"]
    assert {target["mark"] for target in data["targets"]} == {"DRY RUN", "not yet measured"}
    timed = {row["provider"] for row in data["rows"] if row["p50"] and row["metric"] == kinds.TIME}
    assert {OURS, SLAB, BEST, BARE} <= timed
    assert all("DRY RUN" in row["note"] for row in data["rows"])
    assert "DRY RUN" in next(folder.glob("*.md")).read_text()
    pytest.importorskip("matplotlib")
    names = {path.name.split("-quick-")[1] for path in folder.glob("*.png")}
    assert names == {"roofline.png", "speedup.png", "sweep-selection-bfloat16.png"}


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--fast"], "unknown option --fast"),
        (["--wheels"], "--wheels needs a folder"),
        (["--wheels", "no/such/folder"], "--wheels: no folder"),
        (["--dry-run", "--out", "somewhere"], "leave --out away"),
    ],
)
def test_script_rejects_bad_arguments(arguments, words):
    done = subprocess.run(
        ["bash", str(ROOT / "bench/gpu.sh"), *arguments], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert words in done.stderr and len(done.stderr.splitlines()) == 1


def test_script_explains_itself():
    script = str(ROOT / "bench/gpu.sh")
    subprocess.run(["bash", "-n", script], check=True)
    done = subprocess.run(["bash", script, "--help"], capture_output=True, text=True, check=True)
    for option in ("--quick", "--wheels DIR", "--out DIR", "--dry-run", "FLASHMETRIC_LIBRARY"):
        assert option in done.stdout


def test_readme_lists_the_targets():
    text = (ROOT / "bench/README.md").read_text()
    for target in targets.TARGETS:
        assert target.text in text
