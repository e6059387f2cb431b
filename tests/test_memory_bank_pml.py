# SPDX-License-Identifier: Apache-2.0
"""The cross-batch memory against pytorch-metric-learning 2.9, step by step."""

import pytest
import torch

from flashmetric import (
    CircleLoss,
    ContrastiveLoss,
    CrossBatchMemory,
    MultiSimilarityLoss,
    NTXentLoss,
    SupConLoss,
    TripletMarginLoss,
    miners,
)
from helpers import make_labels, make_rows

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import losses  # noqa: E402
from pytorch_metric_learning import miners as their_miners  # noqa: E402

LOSSES = [
    (ContrastiveLoss.preset("pml"), losses.ContrastiveLoss()),
    (NTXentLoss(), losses.NTXentLoss()),
    (SupConLoss(0.1), losses.SupConLoss(0.1)),
    (MultiSimilarityLoss.preset("pml"), losses.MultiSimilarityLoss()),
    (CircleLoss(), losses.CircleLoss()),
    (TripletMarginLoss.preset("pml"), losses.TripletMarginLoss()),
]


def assert_same_steps(ours, theirs, sizes, **options):
    for step, n in enumerate(sizes):
        x, labels = make_rows(n, 6), make_labels(n, 3)
        given = {k: v[:n] for k, v in options.items()}
        values = [memory(x, labels, **given) for memory in (ours, theirs)]
        grads = [torch.autograd.grad(value, x)[0] for value in values]
        message = f"step {step}"
        torch.testing.assert_close(*values, rtol=1e-6, atol=1e-7, msg=message)
        torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-7, msg=message)
    assert ours.pointer.item() == theirs.queue_idx
    # Places of the queue are those of the peer, in which nothing has been written otherwise.
    count = int(ours.filled)
    torch.testing.assert_close(ours.embeddings[:count], theirs.embedding_memory[:count])
    assert torch.equal(ours.labels[:count], theirs.label_memory[:count])


@pytest.mark.parametrize("size", [12, 20, 23])
@pytest.mark.parametrize("pair", LOSSES, ids=lambda pair: type(pair[0]).__name__)
def test_losses(pair, size):
    ours, theirs = pair
    # 8 + 8 + 12 rows and more: the last place is written twice, also in the middle of a batch.
    assert_same_steps(
        CrossBatchMemory(ours, size),
        losses.CrossBatchMemory(theirs, 6, size),
        (8, 8, 12, 5, 9),
    )


@pytest.mark.parametrize("name", ["BatchHardMiner", "MultiSimilarityMiner", "TripletMarginMiner"])
def test_miners(name):
    pair = TripletMarginLoss.preset("pml"), losses.TripletMarginLoss()
    if name == "MultiSimilarityMiner":
        pair = ContrastiveLoss.preset("pml"), losses.ContrastiveLoss()
    ours, theirs = getattr(miners, name)(), getattr(their_miners, name)()
    assert_same_steps(
        CrossBatchMemory(pair[0], 20, miner=ours),
        losses.CrossBatchMemory(pair[1], 6, 20, miner=theirs),
        (8, 8, 12, 5, 9),
    )


def test_masked_rows():
    mask = torch.arange(12) % 3 != 0
    assert_same_steps(
        CrossBatchMemory(ContrastiveLoss.preset("pml"), 20),
        losses.CrossBatchMemory(losses.ContrastiveLoss(), 6, 20),
        (8, 8, 12, 5, 9),
        enqueue_mask=mask,
    )


def test_what_the_peer_forgets():
    """Its pointer is no state; ours goes on where it was."""
    x, labels = make_rows(8, 6), make_labels(8, 3)
    memory, peer = (
        CrossBatchMemory(SupConLoss(), 20),
        losses.CrossBatchMemory(losses.SupConLoss(), 6, 20),
    )
    loaded = CrossBatchMemory(SupConLoss(), 20), losses.CrossBatchMemory(losses.SupConLoss(), 6, 20)
    for old, new in zip((memory, peer), loaded, strict=True):
        old(x, labels)
        new.double().load_state_dict(old.double().state_dict())
    values = [m(x, labels) for m in (memory, loaded[0], peer, loaded[1])]
    torch.testing.assert_close(values[0], values[1])
    assert (values[2] - values[3]).abs() > 1e-3
