# SPDX-License-Identifier: Apache-2.0
"""A batch of 1200 images through an encoder that keeps the activations of 64 at a time.

Shows that the gradients are those of the whole batch, and how much less is kept for backward.

python examples/train_grad_cache.py
"""

from collections.abc import Iterator
from contextlib import contextmanager

import digits
import torch
from torch import Tensor, nn

import flashmetric


class Encoder(nn.Module):
    """An encoder whose rows do not depend on each other.

    Batch normalisation would see the rows of a chunk only, and change the gradients.
    """

    def __init__(self) -> None:
        """Build the layers."""
        super().__init__()
        self.layers = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Conv2d(32, 32, 3, stride=2, padding=1),
            nn.GroupNorm(4, 32),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 4 * 4, 64),
        )

    def forward(self, images: Tensor) -> Tensor:
        """Embed uint8 images [N, 1, 8, 8] as unit rows [N, 64]."""
        return nn.functional.normalize(self.layers(images.float() / 128 - 1))


class Kept:
    """A tensor that autograd keeps for backward. The class adds up the bytes of all there are."""

    now = peak = 0

    def __init__(self, tensor: Tensor) -> None:
        """Count the tensor."""
        # Detached: an output that kept its own graph would not go until some backward does.
        self.tensor, self.bytes = tensor.detach(), tensor.nbytes
        Kept.now += self.bytes
        Kept.peak = max(Kept.peak, Kept.now)

    def __del__(self) -> None:
        """Take it off again: autograd has dropped it."""
        Kept.now -= self.bytes


@contextmanager
def measured() -> Iterator[None]:
    """Leave in ``Kept.peak`` the most bytes that are kept at once, on any device."""
    Kept.peak = Kept.now
    with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.tensor):
        yield


def main() -> None:
    """Compare one step, train, and compare the scores before and after."""
    options = digits.arguments(__doc__).parse_args()
    torch.manual_seed(options.seed)
    device = torch.device(options.device)
    split = digits.load_digits()
    encoder = Encoder().to(device)
    loss_fn = flashmetric.SupConLoss(temperature=0.2)
    step = flashmetric.GradCache(encoder, loss_fn, chunk_size=64)
    optimizer = torch.optim.AdamW(encoder.parameters(), lr=2e-3)
    batches = 24 if options.quick else 100
    loader = digits.loader(split.train, batches=batches, seed=options.seed, images=120)
    before = digits.evaluate(encoder, split.test, device)

    images, labels = (tensor.to(device) for tensor in next(iter(loader)))
    with measured():
        loss_fn(encoder(images), labels).backward()
    whole, whole_peak = [p.grad.clone() for p in encoder.parameters()], Kept.peak
    encoder.zero_grad()
    with measured():
        step(images, labels=labels)
    parts = [p.grad for p in encoder.parameters()]
    differences = [part - other for part, other in zip(parts, whole, strict=True)]
    off = nn.utils.get_total_norm(differences) / nn.utils.get_total_norm(whole)
    print(f"{len(images)} images at once keep {whole_peak / 2**20:.1f} MiB for backward")
    print(f"in chunks of 64 they keep {Kept.peak / 2**20:.1f} MiB; gradients differ by {off:.1e}")
    assert off < 1e-3, "chunks changed the gradients"
    assert Kept.peak < whole_peak / 5, "chunks did not save memory"

    for number, batch in enumerate(loader):
        images, labels = (tensor.to(device) for tensor in batch)
        optimizer.zero_grad()
        loss = step(images, labels=labels)  # calls backward itself
        optimizer.step()
        if number % 6 == 0:
            print(f"step {number:4}  loss {loss.item():.4f}")

    digits.require_better(before, digits.evaluate(encoder, split.test, device))


if __name__ == "__main__":
    main()
