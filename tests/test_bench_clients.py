# SPDX-License-Identifier: Apache-2.0
"""The benchmark's training loops of other libraries. Nothing here asserts how fast anything is."""

import csv
import math
import multiprocessing
import sys
import warnings
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from bench import __main__ as command_line  # noqa: E402
from bench.clients import grid, report, run, suite, texts, worker  # noqa: E402
from bench.clients.dense import Dense, views  # noqa: E402
from bench.clients.digits import Batches  # noqa: E402
from bench.clients.loops import NATIVE, RECIPES, Loop  # noqa: E402
from bench.clients.session import Comparison, Contender  # noqa: E402
from bench.clients.suite import Options, Outcome, Suite, curve_difference, judge  # noqa: E402
from bench.clients.trainer import PAIRS, columns  # noqa: E402

pytest.importorskip("sklearn", reason="the digits and the photograph come with scikit-learn")
needs_pml = pytest.mark.skipif(
    find_spec("pytorch_metric_learning") is None, reason="pytorch-metric-learning is not installed"
)
needs_st = pytest.mark.skipif(
    find_spec("sentence_transformers") is None or find_spec("datasets") is None,
    reason="sentence-transformers with its trainer is not installed",
)


@pytest.fixture(autouse=True)
def _quiet_peers():
    """Peers warn about themselves and each other."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def values(comparison: Comparison, contender: Contender) -> dict:
    """What a worker answers to the gate, computed in this process."""
    builder = comparison.builder.replace(":", ".")
    module, _, name = builder.rpartition(".")
    kind = getattr(sys.modules.get(module) or __import__(module, fromlist=[name]), name)
    return worker.answer(kind(**comparison.task_options(contender, gate=True)), "values", 1)


def of(section: str, quick: bool = True) -> list[Comparison]:
    return [c for c in grid.grid(quick) if c.section == section]


def check_gate(comparison: Comparison) -> None:
    first, *others = comparison.contenders
    reference = values(comparison, first)
    assert reference["losses"][0] > 0
    assert any(reference["gradient"])
    for contender in others:
        passed, text = judge(values(comparison, contender), reference)
        assert passed, f"{contender.name}: {text}"


def named(comparison: Comparison) -> str:
    return comparison.kernel


@needs_pml
@pytest.mark.parametrize("comparison", of(grid.PML_LOOPS), ids=named)
def test_loops_agree(comparison):
    check_gate(comparison)


@needs_pml
@pytest.mark.parametrize("comparison", of(grid.MEMORY), ids=named)
def test_loops_with_a_memory_agree(comparison):
    options = comparison.gate | {"rows": 16, "memory": 100}
    check_gate(replace(comparison, gate=options))


@needs_pml
@pytest.mark.parametrize("comparison", of(grid.DENSE), ids=named)
def test_dense_losses_agree(comparison):
    check_gate(replace(comparison, gate={"pixels": 128}))


@needs_pml
def test_supervised_chunks_agree():
    (comparison,) = [c for c in of(grid.CHUNKS) if c.builder.endswith("Supervised")]
    check_gate(replace(comparison, gate={"rows": 20, "chunk": 8}))


@needs_st
@pytest.mark.parametrize("name", ["MultipleNegativesRankingLoss", "BatchAllTripletLoss"])
def test_trainer_loops_agree(name):
    (comparison,) = [c for c in of(grid.ST_LOOPS) if c.kernel == name]
    check_gate(replace(comparison, gate={"rows": 24, "steps": 2}))


@needs_st
def test_trainer_is_taken_step_by_step():
    from bench.clients.trainer import TrainerLoop

    library = "sentence_transformers.sentence_transformer.losses"
    loop = TrainerLoop(library, "MultipleNegativesRankingLoss", rows=16, steps=2)
    first, second = loop.step(), loop.step()
    assert first != second
    with pytest.raises(ValueError, match="done after 2 steps"):
        loop.step()
    loop = TrainerLoop(library, "MultipleNegativesRankingLoss", rows=16, steps=2)
    assert (loop.step(), loop.step()) == (first, second)


def test_trainer_passes_errors_on():
    pytest.importorskip("sentence_transformers")
    from bench.clients.trainer import TrainerLoop

    loop = TrainerLoop(
        "sentence_transformers.sentence_transformer.losses", "BatchHardTripletLoss", 8, 1
    )

    def fail(*arguments: object) -> None:
        raise MemoryError

    loop.trainer = fail
    with pytest.raises(MemoryError):
        loop.step()


@needs_pml
def test_curves_of_a_loop_are_the_same_for_the_same_seed():
    first, second = (
        Loop("pytorch_metric_learning", "SupConLoss", rows=16, features=8) for _ in range(2)
    )
    curve = [first.step() for _ in range(3)]
    assert curve == [second.step() for _ in range(3)]
    assert len(set(curve)) == 3


def test_reversed_rows_are_the_same_batch():
    rows, labels = next(Batches(12, views=True))
    others, their_labels = next(Batches(12, views=True, backwards=True))
    torch.testing.assert_close(rows.flip(0), others, rtol=0, atol=0)
    assert labels.tolist() == [0, 1, 2, 3, 4, 5] * 2
    assert their_labels.tolist() == labels.flip(0).tolist()


def test_a_memory_starts_full_of_other_rows():
    loop = Loop("flashmetric", "ContrastiveLoss", rows=8, features=8, memory=1500)
    assert int(loop.loss.filled) == 1500
    norms = loop.loss.embeddings.norm(dim=1)
    torch.testing.assert_close(norms, torch.ones(1500))
    assert len(loop.loss.embeddings.unique(dim=0)) == 1500


def test_own_memory_has_every_recipe_that_is_compared():
    assert set(NATIVE) <= set(RECIPES)
    with pytest.raises(ValueError, match="memory must be above 0"):
        Loop("flashmetric", "SupConLoss", rows=8, features=8)


def test_texts_are_sentences_with_their_names():
    found = texts.library_texts()
    assert len(found) > 2000
    assert len({text.sentence for text in found}) == len(found)
    by_name = {text.name: text for text in found}
    dump, loads = by_name["json dumps"], by_name["json loads"]
    assert dump.sentence.startswith("Serialize ``obj`` to a JSON formatted")
    assert dump.module == loads.module != by_name["textwrap dedent"].module
    assert texts.draw_texts(5) == texts.draw_texts(9)[:5]
    assert texts.split_words("urllib.parse.urlJoin") == "urllib parse url Join"


def test_columns_suit_their_losses():
    drawn = texts.draw_texts(40)
    pairs = columns("ContrastiveLoss", drawn)
    names = [text.name for text in drawn]
    assert pairs["label"] == [0, 1] * 20
    assert pairs["sentence2"][1::2] == names[1::2]
    assert pairs["sentence2"][::2] != names[::2]
    assert columns("MultipleNegativesRankingLoss", drawn)["positive"] == names
    assert set(columns("BatchAllTripletLoss", drawn)) == {"sentence", "label"}
    assert set(PAIRS) < {c.kernel for c in of(grid.ST_LOOPS)}


def test_views_show_the_same_pixels():
    first, second = (rows / rows.norm(dim=1, keepdim=True) for rows in views(256, 32))
    nearest = (first @ second.t()).argmax(1)
    assert (nearest == torch.arange(256)).float().mean() > 0.5
    with pytest.raises(ValueError, match="power of two"):
        views(300, 8)


def test_curve_difference():
    assert curve_difference([1.0, 2.0], [1.0, 2.0]) == 0.0
    assert curve_difference([1.0, 2.5, 9.0], [1.0, 2.0]) == pytest.approx(0.5 / 1.5)
    assert curve_difference([1.0, math.nan], [1.0, 2.0]) == math.inf
    assert curve_difference([], [1.0]) is None


@pytest.mark.parametrize(
    ("loss", "gradient", "passed"),
    [
        (1.0, [3.0, 4.0], True),
        (1.0 + 5e-5, [3.0, 4.0 + 4e-3], True),
        (1.0 + 2e-4, [3.0, 4.0], False),
        (1.0, [3.0, 4.01], False),
        (1.0, [3.0], False),
        (math.nan, [3.0, 4.0], False),
        (1.0, [math.nan, 4.0], False),
    ],
)
def test_the_gate_judges_loss_and_gradient(loss, gradient, passed):
    reference = {"losses": [1.0], "gradient": [3.0, 4.0]}
    assert judge({"losses": [loss], "gradient": gradient}, reference)[0] == passed


def test_plan_of_steps():
    assert suite.plan(0.01, 8.0, 39) == (4, 10)
    assert suite.plan(3.0, 1.0, 39) == (2, 1)
    assert suite.plan(8.0, 5.0, 39) == (1, 1)
    assert suite.plan(20.0, 5.0, 39) == (0, 0)
    assert suite.plan(0.01, 8.0, 0) == (0, 0)


def dense_case(pixels: int, *libraries: str) -> Comparison:
    contenders = tuple(
        Contender(library, {"library": library}, ours=library == "flashmetric")
        for library in libraries
    )
    return Comparison(
        grid.DENSE,
        "InfoNCE",
        "bench.clients.dense:Dense",
        pixels,
        8,
        contenders,
        {"loss": "InfoNCE", "pixels": pixels, "features": 8},
        {"pixels": 64},
        steps=3,
        curve=True,
    )


@pytest.fixture
def light_preload(monkeypatch):
    """Workers of these tests need no peer."""
    light = multiprocessing.get_context("forkserver").set_forkserver_preload
    monkeypatch.setattr(suite, "preload", lambda: light(["bench.clients.dense"]))


def outcomes(case: Comparison, memory: int, max_seconds: float = 600.0) -> dict[str, Outcome]:
    found = Suite(Options(1, 0.05, max_seconds, memory))
    found.run(case)
    assert run.status(found) == 0, [(o.gate, o.refusal) for o in found.outcomes]
    tables = report.sections(found.outcomes)
    assert [title for title, *_ in tables] == [grid.DENSE, "Correctness gate"]
    assert len(found.rows()) >= 3 * len(case.contenders)
    return {outcome.contender.name: outcome for outcome in found.outcomes}


def test_a_peer_over_the_memory_is_reported(light_preload):
    # One matrix of the plain form is as large.
    found = outcomes(dense_case(16_384, "torch", "flashmetric"), memory=2**30)
    assert found["torch"].refusal == "out of memory"
    assert found["torch"].median is None
    lines = report.case_lines(found["torch"].comparison, [*found.values()])
    assert "out of memory" in lines[0][-1]
    assert found["flashmetric"].passed
    assert found["flashmetric"].refusal == ""
    assert len(found["flashmetric"].losses) == 3


def test_a_peer_over_the_time_is_reported(light_preload, monkeypatch):
    # The gate's own step is within the limit; that of the full size is not.
    monkeypatch.setattr(Suite, "gate", lambda self, outcomes: None)
    found = outcomes(dense_case(8192, "torch"), memory=2**33, max_seconds=0.01)
    assert found["torch"].refusal.startswith("skipped (no answer within")
    assert found["torch"].seconds is None


def test_a_wrong_contender_of_ours_is_not_measured(light_preload):
    case = dense_case(256, "torch", "flashmetric")
    first, second = case.contenders
    wrong = replace(second, options=second.options | {"loss": "batch-hard triplet"})
    found = Suite(Options(1, 0.05, 600.0, 2**33))
    found.run(replace(case, contenders=(first, wrong)))
    outcome = found.outcomes[1]
    assert outcome.passed is False
    assert outcome.losses is None
    assert outcome.refusal.startswith("not measured: FAIL: loss")
    assert run.status(found) == 1


def test_the_gate_of_equal_small_cases_runs_once(light_preload, monkeypatch):
    judged = []
    monkeypatch.setattr(Suite, "judge", lambda self, outcomes: judged.append(outcomes))
    found = Suite(Options(1, 0.05, 600.0, 2**33))
    for pixels in (256, 512):
        case = dense_case(pixels, "torch", "flashmetric")
        found.gate([Outcome(case, contender) for contender in case.contenders])
    assert len(judged) == 1


def test_files_of_a_run(tmp_path):
    pytest.importorskip("matplotlib")
    found = Suite(Options(1, 0.05, 600.0, 2**33))
    for number, comparison in enumerate([*grid.grid(True), *of(grid.DENSE, quick=False)]):
        for place, contender in enumerate(comparison.contenders):
            outcome = Outcome(comparison, contender, "pass: loss 0e+00, gradient 0e+00", True)
            if (number + place) % 4:
                outcome.losses = [1.0 + 0.1 * place, 0.5]
                outcome.seconds, outcome.extra = [0.2 * (place + 1)] * 3, 2**20 * (place + 1)
            else:
                outcome.refusal = "out of memory (allocation of 9 GiB)"
            found.outcomes.append(outcome)
    header = {"processor": "a", "threads used": "1", "date": "b"}
    written = run.write(found, header, tmp_path, "x-clients", "python -m bench --clients")
    assert [path.name for path in written] == [
        "x-clients.csv",
        "x-clients.md",
        "x-clients.png",
        "x-clients-gains.png",
    ]
    assert all(path.stat().st_size > 1000 for path in written)
    document = written[1].read_text()
    for title in (*grid.SECTIONS, "Correctness gate"):
        assert f"## {title}\n" in document
    assert "![x-clients-gains](x-clients-gains.png)" in document
    with written[0].open() as file:
        rows = list(csv.DictReader(file))
    times = [row for row in rows if row["metric"] == "time" and row["p50"]]
    assert {float(row["p50"]) for row in times} == {200.0, 400.0, 600.0, 800.0, 1000.0}
    reference = next(row for row in rows if row["metric"] == "loss difference")
    assert float(reference["p50"]) == pytest.approx(0.1 / 0.75, rel=1e-5)


def test_loop_line_states_rates_and_drift():
    comparison = of(grid.PML_LOOPS)[0]
    peer, ours, reverse = (Outcome(comparison, c) for c in comparison.contenders)
    peer.seconds, ours.seconds = [0.5], [0.1]
    peer.losses, ours.losses, reverse.losses = [2.0, 2.0], [2.0, 2.5], [2.0, 2.2]
    peer.extra, ours.extra = 300 * 2**20, 10 * 2**20
    line = report.loop_line(comparison, [peer, ours, reverse])
    assert line[2:9] == ["2.00", "10.0", "5.00 x", "300", "10.0", "2.5e-01", "1.0e-01"]


def test_the_command_line_knows_the_parts():
    assert command_line.parse(["--clients", "memory", "dense"]).clients == ["memory", "dense"]
    with pytest.raises(SystemExit):
        command_line.parse(["--clients", "nothing"])
    with pytest.raises(SystemExit):
        command_line.parse(["--clients", "--sizes", "64"])
    sections = {c.section for c in grid.grid(parts=["memory", "dense"])}
    assert sections == {grid.MEMORY, grid.DENSE}


def test_full_grid_has_the_sizes_it_is_about():
    assert {c.options["memory"] for c in of(grid.MEMORY, quick=False)} == {50_000}
    assert {c.n for c in of(grid.CHUNKS, quick=False)} == {8192}
    assert max(c.n for c in of(grid.DENSE, quick=False)) == 65_536
    assert {c.n for c in of(grid.PML_LOOPS, quick=False)} == {256, 1024}


def test_dense_refuses_other_libraries():
    with pytest.raises(KeyError):
        Dense("other", "InfoNCE", 64, 8)
