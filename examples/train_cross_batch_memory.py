# SPDX-License-Identifier: Apache-2.0
"""Small batches compared with a thousand rows of earlier ones, stopped and resumed half-way.

python examples/train_cross_batch_memory.py --out checkpoint.pt
"""

import tempfile
from pathlib import Path
from typing import Any

import digits
import torch
from torch import nn

import flashmetric


def build(split: Any, device: torch.device) -> tuple[nn.Module, nn.Module, torch.optim.Optimizer]:
    """Return encoder, loss and optimizer as a run starts with them."""
    encoder = digits.encoder(split).to(device)
    # Its queue is in buffers: .to(device) moves it, state_dict() holds it.
    loss_fn = flashmetric.CrossBatchMemory(
        flashmetric.ContrastiveLoss(pos_margin=0.2, neg_margin=0.8, normalize=True), size=1000
    ).to(device)
    return encoder, loss_fn, torch.optim.AdamW(encoder.parameters(), lr=2e-3)


def main() -> None:
    """Train, save, load, train on, and compare the scores before and after."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--out", type=Path, help="checkpoint to write. Default: a temporary file")
    options = parser.parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    split = digits.load_digits()
    encoder, loss_fn, optimizer = build(split, device)
    before = digits.evaluate(encoder, split.test, device)
    half = 30 if options.quick else 300
    batches = digits.loader(split.train, batches=half, seed=options.seed, images=4)

    def train(first: int) -> None:
        for number, batch in enumerate(batches, start=first):
            images, labels = (tensor.to(device) for tensor in batch)
            loss = loss_fn(encoder(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if number % 10 == 0:
                rows = int(loss_fn.filled)
                print(f"step {number:4}  loss {loss.item():.4f}  rows in memory {rows}")

    train(0)
    with tempfile.TemporaryDirectory() as folder:
        path = options.out or Path(folder) / "checkpoint.pt"
        parts = {"encoder": encoder, "loss": loss_fn, "optimizer": optimizer}
        torch.save({name: part.state_dict() for name, part in parts.items()}, path)
        saved = torch.load(path, map_location=device)

    queue = loss_fn.embeddings
    encoder, loss_fn, optimizer = build(split, device)
    for name, part in {"encoder": encoder, "loss": loss_fn, "optimizer": optimizer}.items():
        part.load_state_dict(saved[name])
    assert torch.equal(loss_fn.embeddings, queue), "the queue did not survive the checkpoint"
    train(half)

    digits.require_better(before, digits.evaluate(encoder, split.test, device))


if __name__ == "__main__":
    main()
