# SPDX-License-Identifier: Apache-2.0
"""What the examples of several processes share: the group, shares of a batch, a comparison."""

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple

import digits
import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmetric.demo.data import Split


class Place(NamedTuple):
    """Which process this is, of how many, and where its tensors are."""

    rank: int
    size: int
    device: torch.device

    def share(self, batch: tuple[Tensor, ...]) -> list[Tensor]:
        """Return this process's rows of a batch; sizes differ by one where they must."""
        rows = len(batch[0])
        begin, end = rows * self.rank // self.size, rows * (self.rank + 1) // self.size
        return [tensor[begin:end].to(self.device) for tensor in batch]

    def say(self, text: str) -> None:
        """Print on one process only."""
        if self.rank == 0:
            print(text, flush=True)


@contextmanager
def processes(device_type: str) -> Iterator[Place]:
    """Join the group that torchrun has started: NCCL with a GPU for each process, or Gloo."""
    if "RANK" not in os.environ:
        sys.exit("start it by: python -m torch.distributed.run --nproc-per-node 2 SCRIPT")
    local = int(os.environ["LOCAL_RANK"])
    cuda = device_type == "cuda"
    device = torch.device("cuda", local) if cuda else torch.device("cpu")
    if cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if cuda else "gloo", device_id=device if cuda else None)
    try:
        yield Place(dist.get_rank(), dist.get_world_size(), device)
    finally:
        dist.destroy_process_group()


def encoder(split: Split) -> nn.Module:
    """Return the encoder of the other examples, with statistics that do not depend on the batch.

    Batch normalisation of a part is not that of the whole batch (``nn.SyncBatchNorm`` has it on
    GPUs), and nothing here would equal one process. Group normalisation looks at one image.
    """
    model = digits.encoder(split)
    for parent in list(model.modules()):
        for name, layer in parent.named_children():
            if isinstance(layer, nn.BatchNorm2d):
                setattr(parent, name, nn.GroupNorm(4, layer.num_features))
            elif isinstance(layer, nn.BatchNorm1d):
                setattr(parent, name, nn.LayerNorm(layer.num_features, elementwise_affine=False))
    return model


def compare(
    place: Place, value: Tensor, ours: list[Tensor], expected: Tensor, theirs: list[Tensor]
) -> None:
    """Report how far value and gradients are from those of one process; exit if it is too far.

    Float32 sums in another order: 1e-6 of the value, and of the largest element of a gradient.
    """
    difference = abs((value - expected) / expected).item()
    worst = max(
        ((mine - whole).abs().max() / whole.abs().max()).item()
        for mine, whole in zip(ours, theirs, strict=True)
    )
    place.say(
        f"first step, {place.size} processes: loss {value.item():.6f}, of one process "
        f"{expected.item():.6f}; relative difference {difference:.1e}, of gradients {worst:.1e}"
    )
    if not (difference <= 1e-6 and worst <= 1e-5):
        sys.exit("the step is not that of one process on the whole batch")
