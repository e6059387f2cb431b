# SPDX-License-Identifier: Apache-2.0
"""The harness that runs pytorch-metric-learning's own tests, on a checkout made for the purpose."""

import os
from pathlib import Path

import pytest

import pml_suite

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

OUTDATED = "TestCrossBatchMemory::test_loss"
TEST = """
import torch
from pytorch_metric_learning import miners
from pytorch_metric_learning.losses import TripletMarginLoss

from .. import TEST_DEVICE


def test_substituted():
    assert TEST_DEVICE == "cpu"
    assert TripletMarginLoss.__module__.startswith("flashmetric.pml")
    x, labels = torch.eye(4), torch.tensor([0, 0, 1, 1])
    assert TripletMarginLoss()(x, labels, miners.BatchHardMiner()(x, labels)) > 0


def test_wrong():
    assert False
"""


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    for folder in ("tests", "tests/losses", "tests/trainers"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "__init__.py").touch()
    (tmp_path / "tests/__init__.py").write_text(
        "import os\nTEST_DEVICE = os.environ['TEST_DEVICE']\n"
    )
    (tmp_path / "tests/losses/test_one.py").write_text(TEST)
    (tmp_path / "tests/trainers/test_elsewhere.py").write_text("def test(): assert False")
    # A relative "src" comes first on the path of its tests; the installed package is to be tested.
    (tmp_path / "src/pytorch_metric_learning").mkdir(parents=True)
    (tmp_path / "src/pytorch_metric_learning/__init__.py").write_text("raise ImportError")
    return tmp_path


def test_substitution(checkout):
    finished = pml_suite.run(checkout, [])
    assert "1 failed, 1 passed" in finished.stdout and finished.returncode == 1
    assert "BatchHardMiner: 1 calls fused, 0 left to the parent" in finished.stdout
    assert "TripletMarginLoss: 1 calls fused, 0 left to the parent" in finished.stdout


def test_plain(checkout):
    finished = pml_suite.run(checkout, ["--plain", "-k", "substituted"])
    assert "1 failed, 1 deselected" in finished.stdout


def test_missing_checkout(tmp_path, capsys):
    assert pml_suite.main([str(tmp_path)]) == 0
    assert "skipped" in capsys.readouterr().out


@pytest.mark.skipif(
    "PML_CHECKOUT" not in os.environ,
    reason="PML_CHECKOUT names no checkout of pytorch-metric-learning",
)
def test_the_peers_own_tests():
    finished = pml_suite.run(
        Path(os.environ["PML_CHECKOUT"]),
        # Of version 2.8.1, where a pair could be positive and negative; 2.9 itself fails it.
        [f"--deselect=tests/losses/test_cross_batch_memory.py::{OUTDATED}"],
    )
    assert finished.returncode == 0, finished.stdout[-4000:]
