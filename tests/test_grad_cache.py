# SPDX-License-Identifier: Apache-2.0
"""Chunked encoding: the gradients of the full batch, with the activations of a chunk."""

import copy
import weakref

import pytest
import torch
from torch import nn

from flashmetric import (
    ContrastiveLoss,
    CrossBatchMemory,
    GradCache,
    InfoNCELoss,
    LearnedTemperature,
    SupConLoss,
    TripletMarginLoss,
    grad_cache,
)


class Encoder(nn.Module):
    """Dropout, a buffer that counts the rows seen, and wide activations."""

    def __init__(self, dropout=0.0, features=6):
        super().__init__()
        self.first = nn.Linear(features, 32)
        self.dropout = nn.Dropout(dropout)
        self.second = nn.Linear(32, 4)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, scale=1.0):
        self.seen += len(x)
        return self.second(self.dropout(self.first(x).tanh())) * scale


def gradients(*modules):
    return [p.grad.clone() for module in modules for p in module.parameters()]


def clear(*modules):
    for module in modules:
        module.zero_grad()


LOSSES = [
    SupConLoss(),
    ContrastiveLoss(),
    TripletMarginLoss(),
    InfoNCELoss(LearnedTemperature(0.3)),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("chunk_size", [1, 7, 8, 24, 100])
def test_gradients_of_the_full_batch(loss, chunk_size):
    encoder, x, labels = Encoder(), torch.randn(24, 6), torch.randint(5, (24,))
    clear(encoder, loss)
    expected = loss(encoder(x), labels)
    expected.backward()
    full = gradients(encoder, loss)
    clear(encoder, loss)
    value = grad_cache(encoder, loss, x, chunk_size=chunk_size, labels=labels)
    torch.testing.assert_close(value, expected.detach())
    assert not value.requires_grad
    torch.testing.assert_close(gradients(encoder, loss), full)


def chunked(encoder, x, chunk_size):
    return torch.cat([encoder(part) for part in x.split(chunk_size)])


def test_dropout_repeats_and_the_random_stream_goes_on():
    encoder, x, labels = Encoder(dropout=0.5), torch.randn(20, 6), torch.randint(4, (20,))
    torch.manual_seed(3)
    SupConLoss()(chunked(encoder, x, 6), labels).backward()
    full, following = gradients(encoder), torch.rand(3)
    clear(encoder)
    torch.manual_seed(3)
    grad_cache(encoder, SupConLoss(), x, chunk_size=6, labels=labels)
    torch.testing.assert_close(gradients(encoder), full)
    assert torch.equal(torch.rand(3), following)
    # It can fail: another draw gives other gradients.
    clear(encoder)
    grad_cache(encoder, SupConLoss(), x, chunk_size=6, labels=labels)
    assert any(not torch.allclose(a, b) for a, b in zip(gradients(encoder), full, strict=True))


def test_buffers_are_updated_once():
    encoder = nn.Sequential(Encoder(), nn.BatchNorm1d(4))
    plain = copy.deepcopy(encoder)
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    SupConLoss()(chunked(plain, x, 5), labels).backward()
    grad_cache(encoder, SupConLoss(), x, chunk_size=5, labels=labels)
    torch.testing.assert_close(gradients(encoder), gradients(plain))
    torch.testing.assert_close(dict(encoder.named_buffers()), dict(plain.named_buffers()))


@pytest.mark.parametrize("shared", [False, True])
def test_two_towers(shared):
    loss = InfoNCELoss()
    one = Encoder(dropout=0.3)
    two = one if shared else Encoder(features=3)
    x, y = torch.randn(15, 6), torch.randn(15, 6 if shared else 3)
    modules = (one,) if shared else (one, two)

    def of_towers(a, b):
        return loss(a, ref_emb=b)

    torch.manual_seed(1)
    of_towers(chunked(one, x, 4), chunked(two, y, 6)).backward()
    full = gradients(*modules)
    clear(*modules)
    torch.manual_seed(1)
    step = GradCache((one, two), of_towers, (4, 6))
    step(x, y)
    torch.testing.assert_close(gradients(*modules), full)


def test_inputs_of_any_form():
    encoder, labels = Encoder(), torch.randint(4, (10,))
    x, scale = torch.randn(10, 6), torch.rand(10, 1)
    found = []
    for given in ((x, scale), [x, scale], {"x": x, "scale": scale}):
        clear(encoder)
        grad_cache(encoder, SupConLoss(), given, chunk_size=3, labels=labels)
        found.append(gradients(encoder))
    assert all(torch.equal(a, b) for f in found for a, b in zip(f, found[0], strict=True))
    clear(encoder)
    grad_cache(
        lambda x, scale: {"pooled": encoder(x), "scale": scale},
        SupConLoss(),
        {"x": x, "scale": "kept whole"},
        chunk_size=3,
        select=lambda found: found["pooled"] * scale[:1],
        labels=labels,
    )
    assert gradients(encoder)[0].abs().sum() > 0


def test_a_frozen_encoder_runs_once():
    query, key = Encoder(), Encoder().requires_grad_(False)
    loss, x = InfoNCELoss(), torch.randn(12, 6)
    grad_cache((query, key), lambda a, b: loss(a, ref_emb=b), x, x, chunk_size=5)
    assert key.seen == 12 and query.seen == 12
    assert query.first.weight.grad is not None and key.first.weight.grad is None


def test_cross_batch_memory():
    encoder, memory = Encoder(), CrossBatchMemory(SupConLoss(), 50)
    plain = copy.deepcopy((encoder, memory))
    for _ in range(3):
        x, labels = torch.randn(20, 6), torch.randint(4, (20,))
        expected = plain[1](plain[0](x), labels)
        expected.backward()
        value = grad_cache(encoder, memory, x, chunk_size=6, labels=labels)
        torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(gradients(encoder), gradients(plain[0]))
    assert memory.pointer == plain[1].pointer == 10
    torch.testing.assert_close(memory.embeddings, plain[1].embeddings)


def test_a_loss_that_leaves_a_tower_out():
    one, two, x = Encoder(), Encoder(), torch.randn(6, 6)
    grad_cache((one, two), lambda a, _: a.square().sum(), x, x, chunk_size=2)
    assert two.first.weight.grad.abs().sum() == 0 < one.first.weight.grad.abs().sum()


def test_without_gradients_only_the_loss():
    encoder, x, labels = Encoder(), torch.randn(9, 6), torch.randint(3, (9,))
    with torch.no_grad():
        value = grad_cache(encoder, SupConLoss(), x, chunk_size=4, labels=labels)
        torch.testing.assert_close(value, SupConLoss()(encoder(x), labels))
    assert encoder.first.weight.grad is None


def test_autocast():
    encoder, x, labels = Encoder(dropout=0.2), torch.randn(16, 6), torch.randint(4, (16,))
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        expected = SupConLoss()(chunked(encoder, x, 4), labels)
    expected.backward()
    full = gradients(encoder)
    clear(encoder)
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16):
        value = grad_cache(encoder, SupConLoss(), x, chunk_size=4, labels=labels)
    torch.testing.assert_close(value, expected.detach())
    # One graph adds the gradients of its chunks up in bfloat16, and here they are added in float32.
    for found, grad in zip(gradients(encoder), full, strict=True):
        assert (found - grad).norm() < 1e-2 * grad.norm()


def test_grad_scaler():
    encoder, x, labels = Encoder(), torch.randn(16, 6), torch.randint(4, (16,))
    SupConLoss()(encoder(x), labels).backward()
    full = gradients(encoder)
    clear(encoder)
    optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    step = GradCache(encoder, SupConLoss(), 4, backward=lambda v: scaler.scale(v).backward())
    step(x, labels=labels)
    scaled = [1024 * grad for grad in full]
    torch.testing.assert_close(gradients(encoder), scaled, rtol=1e-5, atol=1e-2)
    scaler.unscale_(optimizer)
    torch.testing.assert_close(gradients(encoder), full)
    scaler.step(optimizer)
    scaler.update()
    before = copy.deepcopy(encoder.state_dict())
    clear(encoder)
    step(x * torch.inf, labels=labels)
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(encoder.first.weight, before["first.weight"])
    assert scaler.get_scale() == 512


class Kept:
    """Counts bytes that the graph of an encoder keeps, now and at most."""

    def __init__(self):
        self.now = self.most = 0

    def __enter__(self):
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda held: held.tensor)
        self.hooks.__enter__()
        return self

    def __exit__(self, *error):
        self.hooks.__exit__(*error)

    def _pack(self, tensor):
        held = type("Held", (), {"tensor": tensor})()
        size = tensor.nbytes
        self.now += size
        self.most = max(self.most, self.now)
        weakref.finalize(held, self._drop, size)
        return held

    def _drop(self, size):
        self.now -= size


def test_memory_is_that_of_a_chunk():
    encoder, labels = Encoder(dropout=0.1), torch.randint(4, (256,))
    x = torch.randn(256, 6)
    most = {}
    for rows in (16, 64):
        with Kept() as kept:
            encoder(x[:rows]).sum().backward()
        most[rows] = kept.most
        assert kept.now == 0

    with Kept() as kept:
        grad_cache(encoder, lambda x, labels: x.square().mean(), x, chunk_size=16, labels=labels)
    # Beside the chunk: the loss's own 256 x 4 numbers, before any chunk has a graph.
    assert most[16] <= kept.most <= max(most[16], 256 * 4 * 4) < most[64]


@pytest.mark.parametrize(
    ("given", "error", "match"),
    [
        ({"encoders": 3}, TypeError, r"encoders\[0\] must be callable"),
        ({"encoders": ()}, ValueError, "encoders must hold one"),
        ({"loss": None}, TypeError, "loss must be callable"),
        ({"chunk_size": 0}, ValueError, "chunk_size must be at least 1"),
        ({"chunk_size": (1, 2)}, ValueError, "chunk_size must be one number"),
        ({"select": 1}, TypeError, "select must be callable"),
        ({"inputs": ()}, ValueError, "inputs must be one per encoder, 1; got 0"),
        ({"inputs": ("text",)}, ValueError, r"inputs\[0\] must hold a tensor, got str"),
        (
            {"inputs": ([torch.zeros(3, 6), torch.zeros(2)],)},
            ValueError,
            "tensors of one length",
        ),
        ({"encoders": lambda x: None}, TypeError, "an encoder must return a tensor"),
        ({"encoders": lambda x: x.sum(0)}, ValueError, "an encoder must return a row per row, 2"),
    ],
)
def test_errors(given, error, match):
    options = {"encoders": Encoder(), "loss": lambda x: x.sum(), "chunk_size": 2} | given
    inputs = options.pop("inputs", (torch.zeros(4, 6),))
    with pytest.raises(error, match=match):
        GradCache(**options)(*inputs)
