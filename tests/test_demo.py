# SPDX-License-Identifier: Apache-2.0
"""The training job: its data, sampler, scores and files, and a short run from end to end."""

import gzip
import importlib.util
import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flashmetric.demo import errors, train
from flashmetric.demo.data import load_digits, load_split
from flashmetric.demo.evaluation import knn_accuracy, retrieval_scores
from flashmetric.demo.sampler import BalancedSampler
from flashmetric.demo.storage import load_checkpoint, write_atomically

pytest.importorskip("sklearn")
pytest.importorskip("matplotlib")
pytest.importorskip("tqdm")

TRAIN_IMAGES = "train-images-idx3-ubyte"
TRAIN_LABELS = "train-labels-idx1-ubyte"


def idx_bytes(values: Tensor) -> bytes:
    header = struct.pack(f">I{values.ndim}I", 0x0800 + values.ndim, *values.shape)
    return header + bytes(values.flatten().tolist())


@pytest.fixture
def idx_folder(tmp_path: Path) -> Path:
    """A folder in MNIST's format with 60 images to train on and 30 held out, of 5 classes."""
    for part, count in (("train", 60), ("t10k", 30)):
        labels = torch.arange(count) % 5
        images = torch.randint(0, 60, (count, 10, 8)) + 40 * labels[:, None, None]
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
        (tmp_path / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    return tmp_path


def test_idx_folder_is_read_plain_and_compressed(idx_folder: Path) -> None:
    plain = load_split(idx_folder)
    for path in list(idx_folder.iterdir()):
        path.with_name(path.name + ".gz").write_bytes(gzip.compress(path.read_bytes()))
        path.unlink()
    compressed = load_split(idx_folder)
    assert plain.train.images.shape == (60, 1, 10, 8)
    assert plain.test.labels.tolist() == [i % 5 for i in range(30)]
    assert torch.equal(plain.train.images, compressed.train.images)
    assert torch.equal(plain.test.labels, compressed.test.labels)


def set_bytes(name: str, change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return damage


def compress(name: str, keep: slice) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        content = gzip.compress((folder / name).read_bytes())
        (folder / f"{name}.gz").write_bytes(content[keep])
        (folder / name).unlink()

    return damage


DAMAGES = {
    "missing": (lambda folder: (folder / TRAIN_LABELS).unlink(), "has neither"),
    "magic": (set_bytes(TRAIN_IMAGES, lambda b: b"\x89PNG" + b[4:]), "magic number 0x89504e47"),
    "wrong-kind": (set_bytes(TRAIN_LABELS, lambda b: b"\0\0\x08\x03" + b[4:]), "0x00000803"),
    "empty": (set_bytes(TRAIN_IMAGES, lambda b: b""), "too few for an IDX header"),
    "short": (set_bytes(TRAIN_IMAGES, lambda b: b[:-1]), "60x10x8 = 4800 bytes, found only 4799"),
    "long": (set_bytes(TRAIN_IMAGES, lambda b: b + b"!"), "4800 bytes, found more"),
    "implausible": (
        set_bytes(TRAIN_IMAGES, lambda b: b[:4] + b"\xff" * 4 + b[8:]),
        "implausible size 4294967295x10x8",
    ),
    "count": (
        set_bytes(TRAIN_LABELS, lambda b: idx_bytes(torch.zeros(59, dtype=torch.long))),
        "60 images but train-labels-idx1-ubyte has 59 labels",
    ),
    "size": (
        set_bytes("t10k-images-idx3-ubyte", lambda b: idx_bytes(torch.ones(30, 9, 8).long())),
        "training images are 10x8 but held-out images are 9x8",
    ),
    "truncated-gz": (compress(TRAIN_IMAGES, slice(0, 200)), "gzip file is truncated"),
    "damaged-gz": (compress(TRAIN_IMAGES, slice(3, None)), "gzip file is damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_unusable_files_end_in_one_line_and_code_2(
    damage: str, idx_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    apply, message = DAMAGES[damage]
    apply(idx_folder)
    assert train.main(["--data", str(idx_folder), "--output", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert output.err.startswith("flashmetric train: error: ") and output.err.count("\n") == 1
    assert message in output.err
    assert output.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "no-such-folder"], "no-such-folder is not a folder"),
        (["--batch", "11x4"], "only 10 classes"),
        (["--batch", "10x1000"], "smallest class has only"),
        (["--resume", "no-such-file.pt"], "No such file"),
    ],
)
def test_unusable_options_end_in_one_line_and_code_2(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train.main([*arguments, "--output", str(tmp_path / "out")]) == 2
    output = capsys.readouterr()
    assert message in output.err and output.err.count("\n") == 1


def test_output_that_is_a_file_is_refused_before_training(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "taken").touch()
    assert train.main(["--output", str(tmp_path / "taken")]) == 2
    assert "--output" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--batch", "10"], ["--epochs", "0"], ["--lr", "nan"]])
def test_malformed_options_exit_with_code_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        train.main(arguments)
    assert exit_info.value.code == 2


def test_missing_packages_are_named_with_the_command(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(
        errors.importlib.util,
        "find_spec",
        lambda name: None if name in {"sklearn", "tqdm"} else find_spec(name),
    )
    assert train.main([]) == 2
    assert "python -m pip install tqdm scikit-learn" in capsys.readouterr().err


def test_digits_are_held_out_by_class() -> None:
    split = load_digits()
    train_counts = torch.bincount(split.train.labels)
    test_counts = torch.bincount(split.test.labels)
    assert int(train_counts.sum() + test_counts.sum()) == 1797
    share = test_counts / (train_counts + test_counts)
    assert bool(((share - 0.3).abs() < 0.003).all())
    assert int(split.train.images.max()) == 255


def test_open_set_shares_no_class() -> None:
    split = load_split(None, open_set=True)
    assert split.train.classes() == [0, 1, 2, 3, 4, 5, 6]
    assert split.test.classes() == [7, 8, 9]


def test_batches_are_balanced_distinct_and_repeatable() -> None:
    labels = torch.arange(300) % 7 * 3
    sampler = BalancedSampler(labels, 5, 6, seed=1)
    batches = list(sampler.epoch(0, 20))
    for batch in batches:
        assert len(set(batch.tolist())) == 30
        _, counts = labels[batch].unique(return_counts=True)
        assert counts.tolist() == [6] * 5
    again = list(BalancedSampler(labels, 5, 6, seed=1).epoch(0, 20))
    assert all(map(torch.equal, batches, again))
    assert not torch.equal(batches[0], next(sampler.epoch(1, 1)))
    assert not torch.equal(batches[0], next(BalancedSampler(labels, 5, 6, seed=2).epoch(0, 1)))


def test_an_epoch_uses_up_a_class_before_it_repeats() -> None:
    labels = torch.arange(48) % 2
    drawn = torch.cat(list(BalancedSampler(labels, 2, 6, seed=0).epoch(0, 4)))
    assert sorted(drawn.tolist()) == list(range(48))


def scores_by_loop(rows: Tensor, labels: Tensor) -> tuple[float, float, float]:
    first, fifth, average = [], [], []
    for i in range(len(rows)):
        others = [j for j in range(len(rows)) if j != i]
        others.sort(key=lambda j: float((rows[i] - rows[j]).norm()))  # noqa: B023
        hits = [bool(labels[j] == labels[i]) for j in others]
        r = sum(hits)
        if r == 0:
            continue
        first.append(hits[0])
        fifth.append(any(hits[:5]))
        average.append(sum(sum(hits[: k + 1]) / (k + 1) for k in range(r) if hits[k]) / r)
    return tuple(sum(values) / len(values) for values in (first, fifth, average))


def clustered(count: int) -> tuple[Tensor, Tensor]:
    # Uneven classes, and one of a single row, which no query can find.
    labels = (torch.rand(count).square() * 6).long() * 10
    labels[0] = 99
    return torch.randn(count, 5, dtype=torch.float64) + labels[:, None] / 25, labels


@pytest.mark.parametrize("tile_elements", [1, 500, 2**22])
def test_retrieval_scores_match_a_loop(tile_elements: int) -> None:
    rows, labels = clustered(83)
    found = retrieval_scores(rows, labels, tile_elements=tile_elements)
    assert found == pytest.approx(scores_by_loop(rows, labels), abs=1e-12)


def test_retrieval_scores_of_a_hand_made_row() -> None:
    # From 0 the order is 1 (same), 2, 4 (same): R = 2 and MAP@R is (1/1) / 2 there. From 1 it is 0
    # (same) and 2 first: 1/2. From 4 it is 2 (other), 1 (same): (1/2) / 2. The query at 2 is alone.
    rows, labels = torch.tensor([[0.0], [1.0], [2.2], [4.0]]), torch.tensor([0, 0, 1, 0])
    assert retrieval_scores(rows, labels) == pytest.approx((2 / 3, 1.0, (0.5 + 0.5 + 0.25) / 3))


def test_retrieval_scores_match_pytorch_metric_learning() -> None:
    calculators = pytest.importorskip("pytorch_metric_learning.utils.accuracy_calculator")
    inference = pytest.importorskip("pytorch_metric_learning.utils.inference")
    distances = pytest.importorskip("pytorch_metric_learning.distances")
    rows, labels = clustered(120)
    rows = rows.float()
    calculator = calculators.AccuracyCalculator(
        include=("precision_at_1", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=inference.CustomKNN(distances.LpDistance(normalize_embeddings=False)),
    )
    expected = calculator.get_accuracy(rows, labels)
    recall_at_1, _, map_at_r = retrieval_scores(rows, labels)
    assert recall_at_1 == pytest.approx(expected["precision_at_1"], abs=1e-6)
    assert map_at_r == pytest.approx(expected["mean_average_precision_at_r"], abs=1e-6)


@pytest.mark.parametrize("with_gallery", [True, False])
def test_knn_accuracy_matches_a_loop(with_gallery: bool) -> None:
    query, query_labels = clustered(60)
    gallery, labels = clustered(90) if with_gallery else (query, query_labels)
    right = 0
    for i in range(len(query)):
        order = (gallery - query[i]).norm(dim=1).argsort().tolist()
        voters = [int(labels[j]) for j in order if with_gallery or j != i][:5]
        # max returns the first of equals, so equal counts go to the nearest voter's class.
        right += max(voters, key=voters.count) == query_labels[i]
    arguments = (gallery, labels) if with_gallery else ()
    found = knn_accuracy(query, query_labels, *arguments, tile_elements=1000)
    assert found == pytest.approx(right / len(query))


def test_a_failed_write_keeps_the_previous_file(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"before")

    def fail(stream: Any) -> None:
        stream.write(b"half of the new")
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_atomically(path, fail)
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]


def run_quick(folder: Path, *arguments: str) -> dict[str, Any]:
    assert train.main(["--quick", "--threads", "1", "--output", str(folder), *arguments]) == 0
    return json.loads((folder / "metrics.json").read_text())


@pytest.mark.parametrize("loss", ["triplet", "contrastive"])
def test_quick_run_learns_and_writes_its_files(
    loss: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    metrics = run_quick(tmp_path, "--loss", loss)
    before, after = metrics["scores"]["untrained"], metrics["scores"]["trained"]
    assert after["recall_at_1"] > before["recall_at_1"]
    assert after["map_at_r"] > before["map_at_r"] + 0.1
    assert metrics["comparison"][1]["gradient_difference"] < 1e-3
    assert (tmp_path / "embedding.png").read_bytes().startswith(b"\x89PNG")
    assert {path.name for path in tmp_path.iterdir()} == {
        "checkpoint.pt", "embedding.png", "metrics.json",
    }  # fmt: skip
    report = capsys.readouterr().out
    assert "Recall@1" in report and "plain PyTorch" in report


def test_interrupted_run_resumes_to_the_same_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = run_quick(tmp_path / "whole", "--no-compare")
    train_epoch, calls = train.train_epoch, []

    def interrupted(*arguments: Any) -> float:
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return train_epoch(*arguments)

    part = tmp_path / "part"
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epoch", interrupted)
        arguments = ["--quick", "--no-compare", "--threads", "1", "--output", str(part)]
        assert train.main(arguments) == 130
    checkpoint = part / "checkpoint.pt"
    assert load_checkpoint(checkpoint)["epoch"] == 2
    resumed = ["--resume", str(checkpoint), "--threads", "1"]
    assert train.main(resumed) == 0
    metrics = json.loads((part / "metrics.json").read_text())
    assert metrics["loss_of_epoch"] == whole["loss_of_epoch"]
    assert metrics["scores"] == whole["scores"]


def test_resume_refuses_a_contradiction_and_a_damaged_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_quick(tmp_path, "--no-compare", "--epochs", "1", "--steps", "2")
    checkpoint = tmp_path / "checkpoint.pt"
    assert train.main(["--resume", str(checkpoint), "--dim", "32"]) == 2
    assert "dim=32 contradicts dim=64" in capsys.readouterr().err
    checkpoint.write_bytes(checkpoint.read_bytes()[:5000])
    assert train.main(["--resume", str(checkpoint)]) == 2
    assert "not a readable checkpoint" in capsys.readouterr().err


def test_command_line_returns_the_exit_code() -> None:
    command = [sys.executable, "-m", "flashmetric", "train", "--data", "no-such-folder"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
