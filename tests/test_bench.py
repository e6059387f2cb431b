# SPDX-License-Identifier: Apache-2.0
"""The benchmark's own logic. Nothing here asserts how fast anything is."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import gate, measure, report, targets  # noqa: E402
from bench.cases import SAMPLES_PER_CLASS, Case, draw, grid, settle  # noqa: E402
from bench.contenders import BARE, OURS, best_triplet, naive_triplet, plain_contrastive  # noqa: E402
from bench.machine import slug  # noqa: E402
from bench.suite import Row  # noqa: E402
from bench.worker import FORWARD, STEP  # noqa: E402


def time_row(provider: str, p50: float | None, mode: str = STEP, note: str = "") -> Row:
    row = Row("triplet", provider, mode, "time", "ms", 4096, 128, p50, p50, p50, note=note)
    row.ratio_to_ours = None if p50 is None else p50 / 2.0
    return row


def test_percentile_interpolates():
    values = [4.0, 1.0, 3.0, 2.0, 5.0]
    assert measure.percentile(values, 0.5) == 3.0
    assert measure.percentile(values, 0.2) == pytest.approx(1.8)
    assert measure.percentile([7.0], 0.8) == 7.0
    assert measure.spread(values) == measure.Spread(3.0, pytest.approx(1.8), pytest.approx(4.2))


def test_percentile_of_nothing_is_an_error():
    with pytest.raises(ValueError, match="at least one measurement"):
        measure.percentile([], 0.5)


@pytest.mark.parametrize("seconds", [1e-9, 1e-4, 1e-2, 0.3, 20.0])
def test_plan_takes_three_to_some_hundred_calls(seconds):
    blocks, block = measure.plan(seconds, budget=1.0)
    assert 3 <= blocks * block <= 330
    assert blocks >= 3


def test_interleave_keeps_counts_and_mixes():
    order = measure.interleave({"a": 6, "b": 6, "c": 2})
    assert [order.count(name) for name in "abc"] == [6, 6, 2]
    assert order[:2] == ["a", "b"]
    assert "c" in order[: len(order) // 2 + 1] and "c" in order[len(order) // 2 :]
    assert measure.interleave({}) == []


def test_forecast_scales_with_the_square():
    known = [measure.Known(512, 128, 0.5, 10), measure.Known(1024, 128, 1.0, 100)]
    ahead = measure.forecast(known, 4096, 256)
    assert ahead.seconds == pytest.approx(32.0)
    assert ahead.extra_bytes == 1600
    assert measure.forecast(known, 256, 128) is None
    assert measure.forecast([], 256, 128) is None


def test_time_calls_counts_and_resets():
    events = []
    seconds = measure.time_calls(lambda: events.append("call"), lambda: events.append("reset"), 4)
    assert len(seconds) == 4
    assert events == ["reset", "call"] * 5


def test_extra_memory_sees_a_buffer_that_is_gone_afterwards():
    measured = measure.extra_memory(lambda: torch.ones(8 * 2**20).sum())
    if measured is None:
        pytest.skip("this system does not let a process reset its high-water mark")
    assert 30 * measure.MIB < measured[0] < 64 * measure.MIB


def test_draw_is_repeatable_and_balanced():
    x, labels = draw(Case("triplet", 64, 16))
    again, _ = draw(Case("triplet", 64, 16))
    assert torch.equal(x, again)
    torch.testing.assert_close(x.norm(dim=1), torch.ones(64))
    assert labels.bincount().tolist() == [SAMPLES_PER_CLASS] * 8


@pytest.mark.parametrize(("activity", "share"), [("few", 0.02), ("half", 0.5)])
def test_settle_reaches_the_activity(activity, share):
    case = Case("contrastive", 128, 16, activity)
    setting = settle(case)
    x, labels = draw(case)
    negatives = torch.cdist(x, x)[labels[:, None] != labels[None, :]]
    assert (negatives < setting.margin).double().mean().item() == pytest.approx(share, abs=2e-3)
    assert setting.active == pytest.approx(share, abs=2e-3)


def test_grid_selects():
    cases = grid("triplet", [64, 32], [8], "default")
    assert cases == [Case("triplet", 32, 8), Case("triplet", 64, 8)]
    both = grid(None, None, None, "default")
    assert {case.label for case in both} == {"triplet", "contrastive (few)", "contrastive (half)"}
    for target in targets.TARGETS:
        assert any((c.label, c.n, c.d) == (target.kernel, target.n, target.d) for c in both)


@pytest.mark.parametrize(
    ("kernel", "build"),
    [
        ("triplet", best_triplet),
        ("triplet", naive_triplet),
        ("contrastive", plain_contrastive),
    ],
)
@pytest.mark.parametrize("fault", ["none", "margin", "gradient", "nan"])
def test_gate_passes_the_right_and_stops_the_wrong(kernel, build, fault):
    case = gate.gate_case(kernel)
    margin = settle(case).margin
    x, labels = draw(case)
    expected = gate.truth(kernel, x, labels, margin)
    x.requires_grad_()
    loss = build(margin * 1.01 if fault == "margin" else margin)(x, labels)
    loss.backward()
    grad = x.grad * 1.001 if fault == "gradient" else x.grad
    result = loss.detach() * float("nan") if fault == "nan" else loss.detach()
    verdict = gate.judge(result, grad, expected)
    assert verdict.passed == (fault == "none"), verdict.text


def test_gate_needs_a_gradient():
    expected = torch.tensor(1.0).double(), torch.ones(2, 2).double()
    assert not gate.judge(torch.tensor(1.0), None, expected).passed
    assert gate.judge(torch.tensor(1.0), torch.ones(2, 2), expected).passed


def test_disagreement_names_what_differs():
    reference = {"loss": 1.0, "grad_norm": 2.0}
    assert gate.disagreement({"loss": 1.0001, "grad_norm": 2.0}, reference) == ""
    assert "grad_norm" in gate.disagreement({"loss": 1.0, "grad_norm": 2.1}, reference)
    assert "loss" in gate.disagreement({"loss": float("nan"), "grad_norm": 2.0}, reference)


def test_target_passes_misses_or_says_why_not():
    target = targets.Target("triplet", 4096, 128, "torch best", 10)
    ours = time_row(OURS, 2.0)
    assert target.evaluate([ours, time_row("torch best", 30.0)]).mark == "pass"
    missed = target.evaluate([ours, time_row("torch best", 15.0)])
    assert (missed.mark, missed.gap) == ("MISS", "missed by 25 %")
    refused = target.evaluate([ours, time_row("torch best", None, note="out of memory")])
    assert refused.mark == "not measured" and "out of memory" in refused.figure
    assert target.evaluate([]).mark == "not measured"


def test_target_against_the_bare_product_uses_its_forward():
    target = targets.Target("triplet", 4096, 128, BARE, 0.35, at_most=True)
    rows = [time_row(OURS, 2.0), time_row(BARE, 4.0, mode=FORWARD)]
    outcome = target.evaluate(rows)
    assert (outcome.figure, outcome.mark, outcome.gap) == ("0.50 x", "MISS", "missed by 43 %")


def test_every_target_gets_an_outcome():
    outcomes = targets.evaluate([])
    assert len(outcomes) == len(targets.TARGETS) + 1 + 2
    assert {outcome.mark for outcome in outcomes} == {"not measured"}


def test_report_keeps_losses_and_refusals_in_sight(tmp_path):
    rows = [time_row(OURS, 2.0), time_row("torch best", 1.0)]
    rows.append(time_row("torch naive", None, note="out of memory"))
    text = report.text_report({"date": "today"}, rows, targets.evaluate(rows))
    assert "0.500 x" in text and "out of memory" in text and "not part of this run" in text
    summary = report.markdown_report({"date": "today"}, ["ok"], rows, [], "python -m bench")
    assert "| torch naive |" in summary and "## Correctness gate" in summary
    report.write_csv(tmp_path / "rows.csv", rows)
    with (tmp_path / "rows.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [line["provider"] for line in lines] == [OURS, "torch best", "torch naive"]
    assert lines[1]["ratio_to_ours"] == "0.5" and lines[2]["p50"] == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(None, ""), (0.0, "0"), (0.012345, "0.0123"), (3.14159, "3.14"), (1234.5, "1234")],
)
def test_number_has_three_digits(value, text):
    assert report.number(value) == text


def test_slug_is_a_plain_file_name():
    assert slug("Maker(R) Model(TM) CPU @ 2.50GHz") == "maker-model-2-50ghz"


def test_smoke_run(tmp_path):
    command = [sys.executable, "-m", "bench", "--quick", "--only", "triplet", "--sizes", "64"]
    command += ["--dims", "16", "--threads", "1", "--budget", "0.01", "--no-probes"]
    command += ["--without", OURS, "torch.compile best", "pytorch-metric-learning"]
    command += ["sentence-transformers"]
    command += ["--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr
    assert "triplet, N = 64, D = 16" in done.stdout
    (table,) = tmp_path.glob("*.csv")
    with table.open() as file:
        lines = [line for line in csv.DictReader(file) if line["metric"] == "time"]
    timed = {line["provider"] for line in lines if line["p50"]}
    assert {"flashmetric fallback", "torch best", "torch naive", BARE} <= timed
    assert all(line["note"] for line in lines if not line["p50"])
    assert len(list(tmp_path.glob("*.md"))) == 1
