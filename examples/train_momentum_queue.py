# SPDX-License-Identifier: Apache-2.0
"""Momentum contrast (MoCo): an encoder learns from two views of each image, without a label.

The other view goes through a key encoder that follows slowly; a queue of its keys is the negatives.

python examples/train_momentum_queue.py
"""

import copy

import digits
import torch

import flashmetric
from flashmetric.demo.augment import distort


def main() -> None:
    """Train, and compare the scores before and after."""
    options = digits.arguments(__doc__).parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    split = digits.load_digits()
    images = split.train.images

    encoder = digits.encoder(split).to(device)
    key_encoder = copy.deepcopy(encoder).requires_grad_(False)
    queue = flashmetric.MomentumQueue(1024, temperature=0.2, momentum=0.99).to(device)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    before = digits.evaluate(encoder, split.test, device)

    generator = torch.Generator().manual_seed(options.seed)
    for number in range(60 if options.quick else 600):
        chosen = torch.randperm(len(images), generator=generator)[:128]
        view, other = (distort(images[chosen], generator).to(device) for _ in range(2))
        with torch.no_grad():
            keys = key_encoder(other)
        loss = queue(encoder(view), keys)  # 0 at first: the queue has no negatives yet
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        queue.update(encoder, key_encoder)
        if number % 10 == 0:
            print(f"step {number:4}  loss {loss.item():.4f}  keys {int(queue.filled)}")

    digits.require_better(before, digits.evaluate(encoder, split.test, device))


if __name__ == "__main__":
    main()
