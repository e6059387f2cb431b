# SPDX-License-Identifier: Apache-2.0
"""Chunked encoding: both forwards of a chunk are alike, and leave what one would leave."""

import copy
import functools

import pytest
import torch
from torch import nn

from chunked_encoders import chunked, of_both
from flashmetric import GradCache, SupConLoss, grad_cache


class Pooled(nn.Module):
    """The mean of all positions, also of padded ones, in which fast paths may differ."""

    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        self.body = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(8, 4)

    def forward(self, x, padded):
        found = self.body(x, src_key_padding_mask=padded)
        return self.head(found.mean(1))


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize("learns", ["all", "head", "input", "other tower"])
def test_fast_paths_are_taken_where_plain_code_takes_them(learns):
    encoder = Pooled().eval()
    padded = torch.zeros(12, 5, dtype=torch.bool)
    padded[:, 4:] = padded[::2, 3:] = True
    x = torch.randn(12, 5, 8, requires_grad=learns == "input")
    other, y = nn.Linear(8, 4), torch.randn(12, 8)
    if learns != "all":
        encoder.requires_grad_(False)
    if learns == "head":
        encoder.head.requires_grad_(True)
    expected = of_both(encoder(x, padded), other(y))
    expected.backward()
    tensors = [t for t in (x, *encoder.parameters(), *other.parameters()) if t.requires_grad]
    full = [tensor.grad for tensor in tensors]
    for tensor in tensors:
        tensor.grad = None
    value = GradCache((encoder, other), of_both, (5, 12))((x, padded), y)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close([tensor.grad for tensor in tensors], full)
    # It can fail: another result for padded positions is another loss.
    with torch.no_grad():
        padding = encoder.body(x, src_key_padding_mask=padded)
        assert not padding[:, 4:].any()
    assert encoder.body(x, src_key_padding_mask=padded)[:, 4:].any() == (learns in ("all", "input"))


def test_both_forwards_see_whether_gradients_are_enabled():
    encoder, x, labels = nn.Linear(6, 4), torch.randn(9, 6), torch.randint(3, (9,))
    seen = []

    def asks(x):
        seen.append(torch.is_grad_enabled())
        return encoder(x) * (2 if seen[-1] else 1)

    for enabled in (False, True):
        with torch.set_grad_enabled(enabled):
            expected = SupConLoss()(asks(x), labels)
            value = grad_cache(asks, SupConLoss(), x, chunk_size=4, labels=labels)
            torch.testing.assert_close(value, expected.detach())
    assert seen == 4 * [False] + 7 * [True]


class Towers(nn.Module):
    """A text tower, and an image tower, which is frozen and has running statistics."""

    def __init__(self):
        super().__init__()
        self.text = nn.Linear(6, 4)
        self.image = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).requires_grad_(False)

    def encode_text(self, x):
        return self.text(x)


def _one_encoder():
    model = Towers().image
    return model, (model, model), True


def _methods():
    model = Towers()
    return model, (model.encode_text, model.image), False


def _methods_in_the_other_order():
    model = Towers()
    return model, (model.image, model.encode_text), False


def _shared_in_a_row():
    """The last shares a tensor with the second, which shares a module with the first."""
    first, second, last = nn.Linear(6, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)
    last.num_batches_tracked = second.num_batches_tracked
    norm = nn.BatchNorm1d(6).requires_grad_(False)
    last.requires_grad_(False)
    second.requires_grad_(False)
    frozen = nn.Linear(6, 4).requires_grad_(False)
    towers = (
        nn.Sequential(norm, first),
        nn.Sequential(norm, frozen, second),
        nn.Sequential(frozen, last),
    )
    return nn.ModuleList(towers), towers, False


@pytest.mark.parametrize("chunk_size", [4, 12])
@pytest.mark.parametrize(
    "make", [_one_encoder, _methods, _methods_in_the_other_order, _shared_in_a_row]
)
def test_what_shares_buffers_updates_them_once_per_chunk(make, chunk_size):
    model, encoders, input_learns = make()
    inputs = [torch.randn(12, 6) + shift for shift in range(len(encoders))]
    inputs[0].requires_grad_(input_learns)

    def loss(*towers):
        return sum(of_both(towers[0], tower) for tower in towers[1:])

    before = copy.deepcopy(model.state_dict())
    towers = [chunked(e, x, chunk_size) for e, x in zip(encoders, inputs, strict=True)]
    loss(*towers).backward()
    learned = [t for t in (*inputs, *model.parameters()) if t.requires_grad]
    full, after = [t.grad for t in learned], copy.deepcopy(model.state_dict())
    for tensor in learned:
        tensor.grad = None
    model.load_state_dict(before)
    GradCache(encoders, loss, chunk_size)(*inputs)
    torch.testing.assert_close(model.state_dict(), after)
    torch.testing.assert_close([t.grad for t in learned], full)


def test_what_learns_nothing_and_shares_no_buffer_is_run_once():
    model, x, seen = nn.Linear(6, 4), torch.randn(8, 6), []
    norm = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4)).requires_grad_(False)

    def encode(x, name):
        seen.append(name)
        with torch.set_grad_enabled(name == "learns"):
            return model(x) if name != "norm" else norm(x)

    names = ("learns", "without a graph", "norm")
    encoders = [functools.partial(encode, name=name) for name in names]
    GradCache(encoders, lambda *towers: sum(towers).sum(), 4)(x, x, x)
    assert seen == [name for name in names for _ in range(2)] + 2 * ["learns"]


class Exchanging(nn.Module):
    """Notes what a module of several processes would do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4))
        self.exchanges, self.noted = True, []

    def set_requires_gradient_sync(self, exchanges):
        self.exchanges = exchanges

    def forward(self, x, learns=True):
        self.noted.append(self.exchanges)
        with torch.set_grad_enabled(learns):
            return self.layers(x)


def test_gradients_are_exchanged_at_the_last_chunk_that_has_some():
    model, x = Exchanging(), torch.randn(8, 6)
    GradCache((model, functools.partial(model, learns=False)), of_both, 4)(x, x)
    # Both towers are run again, for the statistics; the second has no gradients.
    assert model.noted == 4 * [False] + [False, True, False, False]
    assert model.exchanges
