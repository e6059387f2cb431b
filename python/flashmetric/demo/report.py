# SPDX-License-Identifier: Apache-2.0
"""What the job prints and writes down as JSON."""

import os
from dataclasses import asdict
from typing import Any

import torch

from flashmetric import _library
from flashmetric.demo.comparison import Comparison
from flashmetric.demo.data import Split
from flashmetric.demo.evaluation import Scores
from flashmetric.demo.network import EmbeddingNetwork
from flashmetric.demo.options import Options
from flashmetric.demo.training import StepTimes

_SCORE_NAMES = {
    "recall_at_1": "Recall@1",
    "recall_at_5": "Recall@5",
    "map_at_r": "MAP@R",
    "knn_accuracy": "kNN accuracy (k=5)",
}


def describe_run(
    options: Options, split: Split, network: EmbeddingNetwork, batch: tuple[int, int], steps: int
) -> str:
    """Return the lines above the training: data, network, loss and schedule."""
    height, width = split.train.images.shape[2:]
    classes = len(split.train.classes())
    loss = "batch-hard triplet" if options.loss == "triplet" else "contrastive, all pairs"
    return "\n".join(
        [
            f"data      {split.name}: {len(split.train)} images of {classes} classes to train on, "
            f"{height}x{width} pixels",
            f"held out  {len(split.test)} images: {split.rule}",
            f"network   one small convolutional network for every image, "
            f"{network.parameter_count():,} parameters, {options.dim} features of length one",
            f"loss      {loss}, margin {options.effective_margin:g}; "
            f"{_library.backend} backend, {torch.get_num_threads()} threads",
            f"training  {options.effective_epochs} epochs of {steps} batches, "
            f"{batch[0]} classes x {batch[1]} images; AdamW, learning rate {options.lr:g} to 0",
        ]
    )


def score_table(split: Split, columns: dict[str, Scores]) -> str:
    """Return the scores with one column for each set of embeddings."""
    lines = ["held-out images".ljust(20) + "".join(f"{name:>14}" for name in columns)]
    for field, name in _SCORE_NAMES.items():
        values = (f"{getattr(scores, field):14.4f}" for scores in columns.values())
        lines.append(name.ljust(20) + "".join(values))
    voters = "the other held-out images" if split.open_set else "the training images"
    lines.append(f"(held-out images query each other; the kNN vote is among {voters})")
    return "\n".join(lines)


def step_lines(times: StepTimes) -> str:
    """Return the time of a training step, split into encoder and loss."""
    encoder, loss = times.medians_ms()
    share = loss / (encoder + loss)
    return (
        f"median training step: encoder {encoder:.2f} ms, loss {loss:.2f} ms "
        f"({share:.0%} of the step), forward and backward"
    )


def comparison_lines(comparisons: list[Comparison]) -> str:
    """Return the table of the fused loss against plain PyTorch, with what to make of it."""
    lines = [
        f"{'loss alone, median ms':<24}{'flashmetric':>13}{'plain PyTorch':>15}{'ratio':>8}"
        f"{'distance matrix':>18}"
    ]
    for entry in comparisons:
        batch = f"{entry.rows} rows x {entry.dim}"
        matrix = f"{entry.rows**2 * 4 / 2**20:.1f} MiB"
        lines.append(
            f"{batch:<24}{entry.fused_ms:13.2f}{entry.plain_ms:15.2f}{entry.ratio:7.1f}x{matrix:>18}"
        )
    lines.append(
        "Plain PyTorch holds several distance matrices at once, the native backend none.\n"
        "With small batches the encoder takes most of a step and a faster loss changes little. It\n"
        "pays where one loss sees many rows: large batches, memory banks, dense descriptors, and\n"
        "batches gathered from many GPUs."
    )
    return "\n".join(lines)


def thread_hint() -> str | None:
    """Return advice on OpenMP threads where it applies."""
    if torch.get_num_threads() == 1 or "OMP_WAIT_POLICY" in os.environ:
        return None
    # The OpenMP runtime reads it as it is loaded, so it is too late to set it from here.
    return "hint: on a machine shared with other work, OMP_WAIT_POLICY=passive can be far faster"


def metrics_content(
    options: Options,
    split: Split,
    history: list[float],
    columns: dict[str, Scores],
    times: StepTimes,
    comparisons: list[Comparison],
) -> dict[str, Any]:
    """Return everything of the report as plain values."""
    encoder, loss = times.medians_ms() if times.loss else (None, None)
    return {
        "options": options.to_dict(),
        "data": {
            "name": split.name,
            "rule": split.rule,
            "train_images": len(split.train),
            "held_out_images": len(split.test),
        },
        "loss_of_epoch": history,
        "scores": {name: asdict(scores) for name, scores in columns.items()},
        "step_ms": {"encoder": encoder, "loss": loss},
        "comparison": [{**asdict(entry), "ratio": entry.ratio} for entry in comparisons],
        "backend": _library.backend,
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
