# SPDX-License-Identifier: Apache-2.0
"""Chunked encoding: the gradients of the full batch, with the activations of a chunk."""

import copy
import functools
import weakref

import pytest
import torch
from torch import nn

from chunked_encoders import Encoder, chunked, clear, gradients, of_both
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


class Replacing(nn.Module):
    """Buffers that forward replaces: by another tensor, by a first one, and by none."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(6, 4)
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("first", None)
        self.register_buffer("once", torch.ones(()))

    def forward(self, x):
        self.steps = self.steps + 1
        found = self.layer(x) - self.mean
        self.mean = 0.9 * self.mean + 0.1 * found.detach().mean(0)
        if self.first is None:
            self.first = found.detach().mean(0)
        if self.once is not None:
            found = found * 3
        self.once = None
        return found - self.first


def test_buffers_that_are_replaced_are_updated_once():
    encoder, x, labels = Replacing(), torch.randn(10, 6), torch.randint(3, (10,))
    plain = copy.deepcopy(encoder)
    SupConLoss()(chunked(plain, x, 4), labels).backward()
    grad_cache(encoder, SupConLoss(), x, chunk_size=4, labels=labels)
    assert encoder.steps == 3 and encoder.once is None
    torch.testing.assert_close(gradients(encoder), gradients(plain))
    torch.testing.assert_close(dict(encoder.named_buffers()), dict(plain.named_buffers()))


def test_the_module_of_a_method_or_partial_is_found():
    class Named(Encoder):
        def encode(self, x, scale):
            return self(x, scale)

    x, labels = torch.randn(10, 6), torch.randint(3, (10,))
    for bind in (
        lambda module: functools.partial(module, scale=2.0),
        lambda module: functools.partial(module.encode, scale=2.0),
        lambda module: functools.partial(functools.partial(module.encode), scale=2.0),
    ):
        module = Named()
        grad_cache(bind(module), SupConLoss(), x, chunk_size=4, labels=labels)
        assert module.seen == 10
        # What a partial binds may learn even if the module does not.
        module.requires_grad_(False)
        scale = torch.tensor(2.0, requires_grad=True)
        bound = functools.partial(module, scale=scale)
        grad_cache(bound, ContrastiveLoss(), x, chunk_size=4, labels=labels)
        assert scale.grad != 0


@pytest.mark.parametrize("fails", ["loss", "first", "second"])
def test_after_an_error_the_encoder_is_as_before(fails):
    class Failing(Replacing):
        calls = 0

        def forward(self, x):
            self.calls += 1
            if (fails, self.calls) in (("first", 3), ("second", 5)):
                raise RuntimeError("in the encoder")
            return super().forward(x)

    encoder = nn.Sequential(nn.Dropout(), nn.BatchNorm1d(6), Failing())
    frozen = nn.BatchNorm1d(6).requires_grad_(False)
    modules, x = nn.ModuleList((encoder, frozen)), torch.randn(10, 6)
    buffers = dict(modules.named_buffers())
    contents = {name: buffer.clone() for name, buffer in buffers.items()}
    random = torch.get_rng_state()

    def loss(a, b):
        if fails == "loss":
            raise RuntimeError("in the loss")
        return of_both(a, b[:, :4])

    with pytest.raises(RuntimeError, match="in the"):
        grad_cache((encoder, frozen), loss, x, x, chunk_size=4)
    after = dict(modules.named_buffers())
    assert after.keys() == buffers.keys()
    assert all(after[name] is buffer for name, buffer in buffers.items())
    assert all(torch.equal(after[name], held) for name, held in contents.items())
    assert torch.equal(torch.get_rng_state(), random)


def test_dropout_repeats_on_a_device_that_no_tensor_shows(monkeypatch):
    # A generator in the place of CUDA's, which only the encoder uses.
    device = torch.Generator()
    states = {"get_rng_state": lambda _: device.get_state()}
    states["set_rng_state"] = lambda state, _: device.set_state(state)
    for name, function in states.items():
        monkeypatch.setattr(torch.cuda, name, function)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    model, x, labels = Encoder(), torch.randn(20, 6), torch.randint(4, (20,))

    def encoder(x):
        return model(x * (torch.rand(x.shape, generator=device) > 0.5))

    device.manual_seed(3)
    SupConLoss()(chunked(encoder, x, 6), labels).backward()
    full, following = gradients(model), torch.rand(3, generator=device)
    clear(model)
    device.manual_seed(3)
    grad_cache(encoder, SupConLoss(), x, chunk_size=6, labels=labels)
    torch.testing.assert_close(gradients(model), full)
    assert torch.equal(torch.rand(3, generator=device), following)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_dropout_repeats_on_a_device_that_only_the_encoder_knows():
    model = Encoder(dropout=0.5).cuda()
    x, labels = torch.randn(20, 6), torch.randint(4, (20,))
    on_device = labels.cuda()
    torch.manual_seed(3)
    SupConLoss()(chunked(model, x.cuda(), 6), on_device).backward()
    full = gradients(model)
    clear(model)
    torch.manual_seed(3)
    grad_cache(lambda x: model(x.cuda()), SupConLoss(), x, chunk_size=6, labels=on_device)
    torch.testing.assert_close(gradients(model), full)


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
        # Detached: a saved output that held its own graph would keep it alive until a backward.
        held = type("Held", (), {"tensor": tensor.detach()})()
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


def test_embeddings_do_not_keep_what_they_were_taken_from():
    hidden = []

    def encoder(x):
        assert all(array() is None for array in hidden)
        array = x.numpy().repeat(100, axis=1)
        hidden.append(weakref.ref(array))
        return torch.from_numpy(array)

    x = torch.randn(12, 6, 1)
    with torch.no_grad():
        grad_cache(encoder, torch.sum, x, chunk_size=4, select=lambda found: found[:, 0])
    assert len(hidden) == 3


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
        ({"inputs": (torch.tensor(1.0),)}, ValueError, "tensors of one length"),
        (
            {"inputs": ((torch.zeros(4, 6), (2, 3)),)},
            ValueError,
            r"inputs\[0\] must hold an entry per row, 4, .*got 2 in a tuple",
        ),
        ({"encoders": nn.LazyLinear(2)}, ValueError, r"encoders\[0\] must be initialised"),
        (
            {"encoders": nn.LazyBatchNorm1d(affine=False)},
            ValueError,
            r"encoders\[0\] must be initialised",
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
