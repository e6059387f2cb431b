# SPDX-License-Identifier: Apache-2.0
"""Hugging Face Accelerate, with batches several times larger than the encoder's activations allow.

Gradient accumulation does not enlarge the batch of a metric-learning loss: rows of different
micro-batches never meet. flashmetric.grad_cache compares all rows, and encodes a chunk at a time.

python examples/train_accelerate.py --mixed-precision bf16
"""

import digits
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed

import flashmetric


def main() -> None:
    """Train, and compare the scores before and after."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--mixed-precision", default="no", choices=["no", "bf16", "fp16"])
    options = parser.parse_args()
    accelerator = Accelerator(cpu=options.device == "cpu", mixed_precision=options.mixed_precision)
    set_seed(options.seed)

    split = digits.load_digits()
    encoder = digits.encoder(split)
    before = digits.evaluate(encoder, split.test)
    loss_fn = flashmetric.MultiSimilarityLoss()
    batches = 15 if options.quick else 150
    encoder, optimizer, loader = accelerator.prepare(
        encoder,
        torch.optim.AdamW(encoder.parameters(), lr=2e-3),
        digits.loader(split.train, batches=batches, seed=options.seed, images=64),
    )

    for number, (images, labels) in enumerate(loader):
        with accelerator.autocast():
            # Calls accelerator.backward itself, with the loss of all 640 rows.
            loss = flashmetric.grad_cache(
                encoder,
                loss_fn,
                images,
                chunk_size=160,
                backward=accelerator.backward,
                labels=labels,
            )
        optimizer.step()
        optimizer.zero_grad()
        if number % 5 == 0:
            accelerator.print(f"step {number:4}  loss {loss.item():.4f}")

    encoder = accelerator.unwrap_model(encoder)
    digits.require_better(before, digits.evaluate(encoder, split.test, accelerator.device))


if __name__ == "__main__":
    main()
