# SPDX-License-Identifier: Apache-2.0
"""A training loop of sentence-transformers, taken step by step; what is imported is an argument."""

import importlib
import random
import tempfile
import threading
from typing import Any

from torch import Tensor

from bench.clients.session import Session, flat_gradient, trained
from bench.clients.texts import Text, draw_texts, static_model

PAIRS = {"MultipleNegativesRankingLoss", "ContrastiveLoss", "OnlineContrastiveLoss"}


def columns(loss: str, texts: list[Text], seed: int = 0) -> dict[str, list]:
    """The data set that a loss takes.

    Args:
        loss: Its class.
        texts: What to make it of.
        seed: Of the negative pairs.

    Returns:
        Pairs of a sentence and a name; with labels 1 and 0, every second name another's; or
        sentences with their modules.
    """
    sentences, names = [text.sentence for text in texts], [text.name for text in texts]
    if loss not in PAIRS:
        return {"sentence": sentences, "label": [text.module for text in texts]}
    if loss == "MultipleNegativesRankingLoss":
        return {"anchor": sentences, "positive": names}
    draw = random.Random(seed)
    labels = [i % 2 for i in range(len(texts))]
    second = [name if i % 2 else draw.choice(names) for i, name in enumerate(names)]
    return {"sentence1": sentences, "sentence2": second, "label": labels}


class TrainerLoop(Session):
    """``SentenceTransformerTrainer`` in a thread of its own, which waits after each step.

    A step is what lies between the ends of two steps of the trainer: drawing and tokenising the
    batch, loss, gradient, optimiser.

    Args:
        library: Module of the losses.
        loss: Class of the loss.
        rows: Rows of a batch.
        steps: After how many steps the trainer is done.
    """

    def __init__(self, library: str, loss: str, rows: int, steps: int) -> None:
        """Make the model, the data and the trainer, which starts with the first step."""
        self.model = static_model()
        self.losses: list[float] = []
        self.last_gradient: Tensor | None = None
        self.error: BaseException | None = None
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        # The one line.
        made = getattr(importlib.import_module(library), loss)(self.model)
        made.register_forward_hook(self.note)
        # No batch twice, so that the order of the data is not read from the disk again.
        data = columns(loss, draw_texts(rows * steps))
        self.thread = threading.Thread(
            target=self.train, args=(made, data, rows, steps), daemon=True
        )

    def note(self, module: Any, arguments: Any, value: Tensor) -> None:
        """Keeps every loss in full precision; the trainer rounds them in its log."""
        self.losses.append(float(value.detach()))

    def train(self, loss: Any, data: dict[str, list], rows: int, steps: int) -> None:
        """What the thread runs."""
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.trainer(loss, data, rows, steps, folder).train()
        except BaseException as error:
            self.error = error
        self.done.release()

    def trainer(self, loss: Any, data: dict[str, list], rows: int, steps: int, folder: str) -> Any:
        """The trainer as its users make it, but for logs and check points."""
        from datasets import Dataset
        from sentence_transformers import (
            SentenceTransformerTrainer,
            SentenceTransformerTrainingArguments,
        )
        from transformers import TrainerCallback

        session = self
        # A card that has an example draws none from the data, with a progress bar.
        self.model.model_card_data.widget = [{"text": ""}]

        class Turns(TrainerCallback):
            """Hands control back after each step."""

            def on_pre_optimizer_step(self, *arguments: Any, **known: Any) -> None:
                session.last_gradient = flat_gradient(trained(session.model))

            def on_step_end(self, *arguments: Any, **known: Any) -> None:
                session.done.release()
                session.go.acquire()

        return SentenceTransformerTrainer(
            model=self.model,
            args=SentenceTransformerTrainingArguments(
                output_dir=folder,
                max_steps=steps,
                per_device_train_batch_size=rows,
                learning_rate=0.01,
                max_grad_norm=0.0,
                seed=0,
                use_cpu=True,
                disable_tqdm=True,
                logging_strategy="no",
                save_strategy="no",
                report_to="none",
            ),
            train_dataset=Dataset.from_dict(data),
            loss=loss,
            callbacks=[Turns()],
        )

    def step(self) -> float:  # noqa: D102
        if not self.thread.ident:
            self.thread.start()
        else:
            self.go.release()
        before = len(self.losses)
        self.done.acquire()
        if self.error is not None:
            raise self.error
        if len(self.losses) == before:
            raise ValueError(f"the trainer is done after {before} steps")
        return self.losses[-1]

    def gradient(self) -> Tensor:  # noqa: D102
        assert self.last_gradient is not None
        return self.last_gradient
