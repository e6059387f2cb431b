# SPDX-License-Identifier: Apache-2.0
"""A LightningModule whose loss learns too, trained, saved, loaded again and scored.

python examples/train_lightning.py
"""

import tempfile
from pathlib import Path

import digits
import lightning
import torch
from torch import Tensor, nn

import flashmetric


class Retrieval(lightning.LightningModule):
    """An encoder and a loss. The loss is an attribute, so its temperature is trained and saved."""

    def __init__(self, encoder: nn.Module) -> None:
        """Store the encoder."""
        super().__init__()
        self.encoder = encoder
        self.loss = flashmetric.SupConLoss(flashmetric.LearnedTemperature(0.2))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        """Return the loss of a batch."""
        images, labels = batch
        loss: Tensor = self.loss(self.encoder(images), labels)
        if batch_idx % 10 == 0:
            temperature = self.loss.temperature().item()
            print(f"step {batch_idx:4}  loss {loss.item():.4f}  temperature {temperature:.4f}")
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Train all parameters, those of the loss among them."""
        return torch.optim.AdamW(self.parameters(), lr=2e-3)


def main() -> None:
    """Train, save, load, and compare the scores before and after."""
    options = digits.arguments(__doc__).parse_args()
    lightning.seed_everything(options.seed, verbose=False)
    device = torch.device(options.device)
    split = digits.load_digits()
    model = Retrieval(digits.encoder(split))
    before = digits.evaluate(model.encoder, split.test)

    with tempfile.TemporaryDirectory() as folder:
        trainer = lightning.Trainer(
            max_epochs=1,
            accelerator="gpu" if device.type == "cuda" else "cpu",
            devices=[device.index or 0] if device.type == "cuda" else 1,
            default_root_dir=folder,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        batches = 40 if options.quick else 300
        trainer.fit(model, digits.loader(split.train, batches=batches, seed=options.seed))
        path = Path(folder) / "last.ckpt"
        trainer.save_checkpoint(path)
        loaded = Retrieval.load_from_checkpoint(path, encoder=digits.encoder(split))

    learned = loaded.loss.temperature().item()
    assert learned == model.loss.temperature().item() != 0.2, "the temperature was not learned"
    loaded.to(device)
    digits.require_better(before, digits.evaluate(loaded.encoder, split.test, device))


if __name__ == "__main__":
    main()
