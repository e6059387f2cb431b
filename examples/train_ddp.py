# SPDX-License-Identifier: Apache-2.0
"""Several processes with DistributedDataParallel, and the loss of one process on the whole batch.

python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_ddp.py --ring
"""

import copy

import digits
import torch
from processes import Place, compare, encoder, processes
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import flashmetric
from flashmetric.distributed import gather_loss, ring_loss


def main() -> None:
    """Compare the first step with that of one process, train, and compare the scores."""
    parser = digits.arguments(__doc__)
    parser.add_argument("--ring", action="store_true", help="never hold the rows of all processes")
    options = parser.parse_args()
    with processes(options.device) as place:
        train(place, options.seed, 40 if options.quick else 300, options.ring)


def train(place: Place, seed: int, batches: int, ring: bool) -> None:
    """Train on this process's share of every batch."""
    torch.manual_seed(seed)
    split = digits.load_digits()
    model = encoder(split).to(place.device)
    alone = copy.deepcopy(model)
    parallel = DistributedDataParallel(model)
    loss_fn = flashmetric.MultiSimilarityLoss()
    loss_of_all = (ring_loss if ring else gather_loss)(loss_fn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    before = digits.evaluate(model, split.test, place.device)

    # The same draws everywhere. A real data set would be read in shares, which may differ in size.
    for number, batch in enumerate(digits.loader(split.train, batches=batches, seed=seed)):
        images, labels = place.share(batch)
        loss = loss_of_all(parallel(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            images, labels = (tensor.to(place.device) for tensor in batch)
            expected = loss_fn(alone(images), labels)
            expected.backward()
            compare(place, loss.detach(), gradients(model), expected.detach(), gradients(alone))
        optimizer.step()
        if number % 10 == 0:
            place.say(f"step {number:4}  loss {loss.item():.4f}")

    if place.rank == 0:
        digits.require_better(before, digits.evaluate(model, split.test, place.device))


def gradients(model: nn.Module) -> list[torch.Tensor]:
    """Return the gradients of all parameters."""
    return [p.grad for p in model.parameters() if p.grad is not None]


if __name__ == "__main__":
    main()
