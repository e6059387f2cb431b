# SPDX-License-Identifier: Apache-2.0
"""The job ``python -m flashmetric train``: train, evaluate, compare, draw."""

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

import flashmetric
from flashmetric.demo import report
from flashmetric.demo.comparison import Comparison, compare, large_batch
from flashmetric.demo.data import Split, load_split
from flashmetric.demo.errors import DemoError, optional_module, require_packages
from flashmetric.demo.evaluation import Scores, score
from flashmetric.demo.network import EmbeddingNetwork, embed
from flashmetric.demo.options import Options, combine, output_folder, parse_options
from flashmetric.demo.plot import plot_embeddings
from flashmetric.demo.sampler import BalancedSampler, epoch_seed
from flashmetric.demo.storage import load_checkpoint, save_checkpoint, write_atomically
from flashmetric.demo.training import StepTimes, cosine_rate, train_epoch

_MAX_CLASSES_IN_BATCH = 10
# Raw pixels are a good yardstick, but on all of MNIST they would cost more than the training.
_MAX_PIXEL_WORK = 10**10


def main(argv: Sequence[str]) -> int:
    """Run the job.

    Args:
        argv: The options, without the name of the program.

    Returns:
        Exit code: 0 if all went well, 2 if the user can put something right, 130 if interrupted.
    """
    try:
        _run(argv)
    except DemoError as error:
        print(f"flashmetric train: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("flashmetric train: interrupted", file=sys.stderr)
        return 130
    return 0


def _run(argv: Sequence[str]) -> None:
    started = time.perf_counter()
    given = parse_options(argv)
    checkpoint = load_checkpoint(Path(given["resume"])) if "resume" in given else None
    options = combine(given, checkpoint["options"] if checkpoint else None)
    require_packages(["tqdm", "matplotlib", *(["sklearn"] if options.data is None else [])])
    if options.threads is not None:
        torch.set_num_threads(options.threads)
    split = load_split(Path(options.data) if options.data else None, open_set=options.open_set)
    job = _Job(options, split, output_folder(options))
    try:
        job.train(checkpoint)
        job.finish()
    except KeyboardInterrupt:
        if job.history:
            print(f"\nto go on from here: --resume {job.folder / 'checkpoint.pt'}")
        raise
    print(f"\ndone in {time.perf_counter() - started:.0f} s")


class _Job:
    """One run: what is built once, and what the steps hand on to each other."""

    def __init__(self, options: Options, split: Split, folder: Path) -> None:
        self.options, self.split, self.folder = options, split, folder
        train = split.train
        available = len(train.classes())
        self.batch = options.classes or min(available, _MAX_CLASSES_IN_BATCH), options.images
        self.sampler = BalancedSampler(train.labels, *self.batch, options.seed)
        self.steps = options.steps or self.sampler.batches_per_pass()
        torch.manual_seed(options.seed)
        height, width = train.images.shape[2:]
        self.network = EmbeddingNetwork(height, width, options.dim, *split.pixel_statistics())
        self.loss_function = _loss(options)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=options.lr)
        self.history: list[float] = []
        self.times = StepTimes()

    def train(self, checkpoint: dict[str, Any] | None) -> None:
        """Score the untrained network, then train it, from a checkpoint if there is one."""
        options = self.options
        print(report.describe_run(options, self.split, self.network, self.batch, self.steps))
        self.columns: dict[str, Scores] = {}
        if len(self.split.test) * self.split.train.images.numel() < _MAX_PIXEL_WORK:
            pixels, gallery = (
                part.images.flatten(1) / 255 for part in (self.split.test, self.split.train)
            )
            self.columns["raw pixels"] = self._score(pixels, gallery)
        self.untrained = embed(self.network, self.split.test.images)
        self.columns["untrained"] = self._score_network(self.untrained)
        if checkpoint is not None:
            self._restore(checkpoint)
        epochs = options.effective_epochs
        first = len(self.history)
        if first > epochs:
            raise DemoError(f"--epochs {epochs}: the checkpoint already has {first} epochs")
        total = epochs * self.steps
        bar = optional_module("tqdm").tqdm(
            total=total, initial=first * self.steps, unit="step", disable=None, leave=False
        )
        with bar:
            for epoch in range(first, epochs):
                rates = (
                    cosine_rate(options.lr, step, total)
                    for step in range(epoch * self.steps, (epoch + 1) * self.steps)
                )
                mean_loss = train_epoch(
                    self.network,
                    self.loss_function,
                    self.optimizer,
                    self.split.train,
                    self.sampler.epoch(epoch, self.steps),
                    rates,
                    torch.Generator().manual_seed(epoch_seed(options.seed, epoch)),
                    self.times,
                    bar,
                )
                self.history.append(mean_loss)
                bar.clear()
                print(f"epoch {epoch + 1:3}/{epochs}  loss {mean_loss:.4f}", flush=True)
                self._save({})

    def finish(self) -> None:
        """Score the trained network, compare the loss with plain PyTorch, write the results."""
        trained = embed(self.network, self.split.test.images)
        self.columns["trained"] = self._score_network(trained)
        print("\n" + report.score_table(self.split, self.columns))
        if self.times.loss:
            print("\n" + report.step_lines(self.times))
        comparisons = self._compare() if self.options.compare else []
        if comparisons:
            print("\n" + report.comparison_lines(comparisons))
        if hint := report.thread_hint():
            print("\n" + hint)
        content = report.metrics_content(
            self.options, self.split, self.history, self.columns, self.times, comparisons
        )
        self._save(content["scores"])
        text = (json.dumps(content, indent=2) + "\n").encode()
        write_atomically(self.folder / "metrics.json", lambda stream: stream.write(text))
        plot_embeddings(
            self.folder / "embedding.png",
            f"Held-out images of {self.split.name}",
            self.split.test.labels,
            [
                ("before training", self.untrained, self.columns["untrained"]),
                ("after training", trained, self.columns["trained"]),
            ],
        )
        print(f"\nwrote checkpoint.pt, metrics.json and embedding.png to {self.folder}")

    def _score_network(self, test: torch.Tensor) -> Scores:
        # Embedding the training images only serves the kNN vote, which an open set lacks.
        gallery = None if self.split.open_set else embed(self.network, self.split.train.images)
        return self._score(test, gallery)

    def _score(self, test: torch.Tensor, gallery: torch.Tensor | None) -> Scores:
        if gallery is None or self.split.open_set:
            return score(test, self.split.test.labels)
        return score(test, self.split.test.labels, gallery, self.split.train.labels)

    def _compare(self) -> list[Comparison]:
        options = self.options
        index = next(self.sampler.epoch(0, 1))
        batch = embed(self.network, self.split.train.images[index])
        large = large_batch(options.compare_size, options.seed)
        return [
            compare(self.loss_function, options, batch, self.split.train.labels[index]),
            compare(self.loss_function, options, *large),
        ]

    def _save(self, metrics: dict[str, Any]) -> None:
        content = {
            "options": self.options.to_dict(),
            "epoch": len(self.history),
            "model": self.network.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "history": self.history,
            "metrics": metrics,
        }
        save_checkpoint(self.folder / "checkpoint.pt", content)

    def _restore(self, checkpoint: dict[str, Any]) -> None:
        try:
            self.network.load_state_dict(checkpoint["model"])
            self.optimizer.load_state_dict(checkpoint["optimizer"])
        except (RuntimeError, ValueError) as error:
            raise DemoError("--resume: the checkpoint is of a different network or data") from error
        self.history = list(checkpoint["history"])
        print(f"resumed   after {len(self.history)} epochs")


def _loss(options: Options) -> nn.Module:
    margin = options.effective_margin
    if options.loss == "triplet":
        return flashmetric.TripletMarginLoss(margin)
    return flashmetric.ContrastiveLoss(0.0, margin)
