# SPDX-License-Identifier: Apache-2.0
"""Bytes, memory and time of a loss over the rows of many ranks, as formulas.

For a loss of one log-sum-exp sweep (multi-similarity, InfoNCE without labels): forward one product
of anchors with all references, backward three. W ranks have n rows of D features each, b bytes a
feature. A block is n D b bytes; sums of gradients are float32, for float32 rows as many bytes.
"""

import math
from dataclasses import dataclass

LABEL_BYTES = 8
PRODUCTS_FORWARD, PRODUCTS_BACKWARD = 1, 3
# All-reduces of eight numbers: totals, counts, and whether a rank has failed.
MESSAGES = 5


@dataclass(frozen=True)
class Batch:
    """W ranks, n rows of D float32 features on each."""

    ranks: int
    rows: int
    features: int

    @property
    def block(self) -> int:
        return self.rows * self.features * 4


def bytes_sent(form: str, batch: Batch, backend: str = "gloo") -> int:
    """What a rank sends in forward and backward, without the few numbers of the agreement.

    gather: the rows once. Their gradients once by reduce-scatter, twice on Gloo, which all-reduces
    and drops the rest. ring: the rows forward, and backward with the sums behind them, which travel
    one step further, to where they belong.
    """
    others = batch.ranks - 1
    labels = others * batch.rows * LABEL_BYTES
    if form == "gather":
        back = 2 if backend == "gloo" else 1
        return labels + others * batch.block * (1 + back)
    return labels + 2 * others * batch.block + batch.ranks * batch.block


def memory(form: str, batch: Batch) -> int:
    """What a rank allocates at its peak, in backward, beside its own rows; float32.

    gather: three of all rows (gathered, normalised, a gradient), two of the own. ring: ten blocks,
    whatever the number of ranks: own rows normalised as anchors and as references, two buffers each
    of rows and of sums that travel, gradients of anchors in sum and of this block, of its rows, and
    one that is being allocated.
    """
    if form == "gather":
        return (3 * batch.ranks + 2) * batch.block
    return 10 * batch.block


@dataclass(frozen=True)
class Hardware:
    """What a simulated machine is assumed to do.

    Attributes:
        gpus_per_node: GPUs that NVLink connects (NVIDIA DGX H100: 8).
        link: bytes a second from one GPU to another of its node (NVIDIA H100 SXM data sheet: NVLink
            900 GB/s, both directions together).
        network: bytes a second of a GPU's own adapter to other nodes (NVIDIA ConnectX-7 data sheet:
            400 Gb/s).
        efficiency: share of these that is reached; assumed.
        latency: seconds of one message; assumed.
        flops: of the kernels, operations a second; assumed. DESIGN.md predicts 110e12 for selection
            among float32 rows.
    """

    gpus_per_node: int = 8
    link: float = 450e9
    network: float = 50e9
    efficiency: float = 0.8
    latency: float = 10e-6
    flops: float = 100e12


@dataclass(frozen=True)
class Step:
    """Seconds of a simulated step: all of it, arithmetic, and what the ranks wait for links."""

    seconds: float
    compute: float
    waiting: float


def simulate(form: str, batch: Batch, machine: Hardware) -> Step:
    """The loss of one step on GPUs with NCCL; encoder and optimiser are not in it."""
    ranks = batch.ranks
    product = 2.0 * batch.rows * (ranks * batch.rows) * batch.features / machine.flops
    forward, backward = PRODUCTS_FORWARD * product, PRODUCTS_BACKWARD * product
    compute = forward + backward
    small = MESSAGES * 2 * math.ceil(math.log2(ranks)) * machine.latency
    within = ranks <= machine.gpus_per_node
    if form == "gather":
        # All adapters of a node work at once: NCCL lays a ring through each.
        several = min(machine.link, machine.gpus_per_node * machine.network)
        speed = machine.efficiency * (machine.link if within else several)
        pieces = 2 * (ranks - 1)
        moving = pieces * (batch.block / speed + machine.latency)
        return Step(compute + moving + small, compute, moving + small)
    # One GPU of a node sends to the next node, through its adapter alone, and all wait for it.
    speed = machine.efficiency * (machine.link if within else machine.network)
    rows = batch.block / speed + machine.latency
    both = 2 * rows
    first = (ranks - 1) * max(forward / ranks, rows) + forward / ranks
    second = (ranks - 1) * max(backward / ranks, both) + backward / ranks + both - rows
    total = first + second + small
    return Step(total, compute, total - compute)
