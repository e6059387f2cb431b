# SPDX-License-Identifier: Apache-2.0
"""transformers.Trainer: the model returns its loss, and the Trainer asks for nothing else.

python examples/train_transformers.py
"""

import tempfile

import digits
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import EvalPrediction, Trainer, TrainingArguments

import flashmetric
from flashmetric.demo.data import ImageSet
from flashmetric.demo.evaluation import retrieval_scores


class Items(Dataset[dict[str, Tensor]]):
    """Images as the keyword arguments of the model."""

    def __init__(self, data: ImageSet) -> None:
        """Store the images."""
        self.data = data

    def __len__(self) -> int:
        """Return the number of images."""
        return len(self.data)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return one image."""
        return {"images": self.data.images[index], "labels": self.data.labels[index]}


class WithLoss(nn.Module):
    """An encoder that returns the loss of the batch first, as Trainer expects it of a model.

    What the loss learns, here its temperature, is trained and saved with the model.
    """

    def __init__(self, encoder: nn.Module) -> None:
        """Store the encoder."""
        super().__init__()
        self.encoder = encoder
        self.loss = flashmetric.NTXentLoss(flashmetric.LearnedTemperature(0.2))

    def forward(self, images: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Return loss and embeddings."""
        embeddings = self.encoder(images)
        return {"loss": self.loss(embeddings, labels), "embeddings": embeddings}


def scores(prediction: EvalPrediction) -> dict[str, float]:
    """Return the metrics that Trainer.evaluate adds to its own."""
    rows, labels = (
        torch.as_tensor(array) for array in (prediction.predictions, prediction.label_ids)
    )
    recall_at_1, _, map_at_r = retrieval_scores(rows.float(), labels)
    return {"recall_at_1": recall_at_1, "map_at_r": map_at_r}


def main() -> None:
    """Train, and compare the scores before and after."""
    options = digits.arguments(__doc__).parse_args()
    torch.manual_seed(options.seed)
    split = digits.load_digits()
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=WithLoss(digits.encoder(split)),
            args=TrainingArguments(
                output_dir=folder,
                use_cpu=options.device == "cpu",
                seed=options.seed,
                learning_rate=2e-3,
                per_device_train_batch_size=160,
                per_device_eval_batch_size=160,
                max_steps=40 if options.quick else 300,
                logging_steps=10,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            train_dataset=Items(split.train),
            eval_dataset=Items(split.test),
            compute_metrics=scores,
        )
        before = trainer.evaluate()
        trainer.train()
        after = trainer.evaluate()
    digits.require_better(
        *(digits.Scores(s["eval_recall_at_1"], s["eval_map_at_r"]) for s in (before, after))
    )


if __name__ == "__main__":
    main()
