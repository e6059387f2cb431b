# SPDX-License-Identifier: Apache-2.0
"""Several processes with FSDP2, which shards the parameters, and the loss of the whole batch.

python -m torch.distributed.run --standalone --nproc-per-node 2 examples/train_fsdp2.py
"""

import copy

import digits
import torch
from processes import Place, compare, encoder, processes
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

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
    mesh = init_device_mesh(place.device.type, (place.size,))
    for layer in model.features:
        if isinstance(layer, nn.Conv2d):
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    # Its gradients are averaged over the processes, as those of DistributedDataParallel are.
    loss_fn = flashmetric.SupConLoss(temperature=0.1)
    loss_of_all = (ring_loss if ring else gather_loss)(loss_fn)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    # All processes score: each forward pass gathers parameters.
    before = digits.evaluate(model, split.test, place.device)

    for number, batch in enumerate(digits.loader(split.train, batches=batches, seed=seed)):
        images, labels = place.share(batch)
        loss = loss_of_all(model(images), labels)
        optimizer.zero_grad()
        loss.backward()
        if number == 0:
            images, labels = (tensor.to(place.device) for tensor in batch)
            expected = loss_fn(alone(images), labels)
            expected.backward()
            whole = [p.grad.full_tensor() for p in model.parameters()]
            theirs = [p.grad for p in alone.parameters()]
            compare(place, loss.detach(), whole, expected.detach(), theirs)
        optimizer.step()
        if number % 10 == 0:
            place.say(f"step {number:4}  loss {loss.item():.4f}")

    after = digits.evaluate(model, split.test, place.device)
    if place.rank == 0:
        digits.require_better(before, after)


if __name__ == "__main__":
    main()
