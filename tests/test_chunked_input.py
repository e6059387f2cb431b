# SPDX-License-Identifier: Apache-2.0
"""Chunked encoding: what encoders may be given, and the gradients of that."""

import functools
from collections import UserDict, defaultdict, namedtuple

import pytest
import torch
from torch import nn

from chunked_encoders import Encoder, chunked, clear, gradients, of_both
from flashmetric import SupConLoss, grad_cache


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


@pytest.mark.parametrize("chunk_size", [3, 8])
@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("frozen", [True, False])
def test_inputs_that_learn(frozen, leaf, chunk_size):
    towers = Encoder(), Encoder(dropout=0.4).requires_grad_(not frozen)
    source, other = torch.randn(8, 6, requires_grad=True), nn.Linear(6, 6)

    def inputs():
        # Both towers see what learns, and the second one twice.
        given = source if leaf else other(source).sigmoid()
        return given, {"x": given, "scale": given[:, :1] if not leaf else 2.0}

    torch.manual_seed(2)
    one, two = inputs()
    scale = two["scale"].split(chunk_size) if not leaf else [2.0] * 8
    first = chunked(towers[0], one, chunk_size)
    second = [
        towers[1](part, s) for part, s in zip(two["x"].split(chunk_size), scale, strict=False)
    ]
    of_both(first, torch.cat(second)).backward()
    modules = [towers[0], *([] if frozen else [towers[1]]), *([] if leaf else [other])]
    full, of_source = gradients(*modules), source.grad.clone()
    clear(*modules)
    source.grad = None
    torch.manual_seed(2)
    grad_cache(towers, of_both, *inputs(), chunk_size=chunk_size)
    torch.testing.assert_close(gradients(*modules), full)
    torch.testing.assert_close(source.grad, of_source)
    # As by backward(), gradients are added to those there are.
    torch.manual_seed(2)
    grad_cache(towers, of_both, *inputs(), chunk_size=chunk_size)
    torch.testing.assert_close(source.grad, 2 * of_source)


def test_an_input_that_learns_and_no_parameter():
    x, unused, labels = torch.randn(8, 3), torch.randn(8, 2), torch.arange(8) % 2
    full = x.clone().requires_grad_()
    SupConLoss()(full, labels).backward()
    for encoder in (nn.Identity(), lambda x: x, lambda x: x.view_as(x)):
        given = x.clone().requires_grad_()
        grad_cache(encoder, SupConLoss(), given, chunk_size=3, labels=labels)
        torch.testing.assert_close(given.grad, full.grad)
    given = x.clone().requires_grad_(), unused.requires_grad_()
    grad_cache(lambda x, _: x, SupConLoss(), given, chunk_size=3, labels=labels)
    torch.testing.assert_close(given[0].grad, full.grad)
    assert unused.grad is None


def test_an_encoder_that_works_in_place():
    encoder, x, labels = Encoder(), torch.randn(8, 6), torch.arange(8) % 3

    def shifted(x):
        return encoder(x.add_(1))

    SupConLoss()(shifted(x.clone()), labels).backward()
    full, before = gradients(encoder), x.clone()
    clear(encoder)
    grad_cache(shifted, SupConLoss(), x, chunk_size=3, labels=labels)
    torch.testing.assert_close(gradients(encoder), full)
    assert torch.equal(x, before)


Pair = namedtuple("Pair", "x texts")


class Wrapped(UserDict):
    """A mapping that is no dict, made from a mapping, such as BatchEncoding of transformers."""


@pytest.mark.parametrize("chunk_size", [3, 10])
@pytest.mark.parametrize(
    "wrap",
    [
        lambda x, texts: Pair(x, texts),
        lambda x, texts: (x, tuple(texts)),
        lambda x, texts: [x, texts],
        lambda x, texts: {"x": x, "texts": texts},
        lambda x, texts: Wrapped(x=x, texts=texts),
        lambda x, texts: (x, torch.tensor([int(t) for t in texts]).numpy()),
    ],
)
def test_all_that_has_rows_is_cut_and_keeps_its_type(wrap, chunk_size):
    model, x, labels = Encoder(), torch.randn(8, 6), torch.arange(8) % 3
    texts = [str(number) for number in range(8)]
    given, seen = wrap(x, texts), []

    def encoder(given, option):
        assert option == "whole" and type(given) is kind
        rows, said = given.values() if hasattr(given, "values") else given
        numbers = [int(text) for text in said]
        assert torch.equal(rows, x[numbers])
        seen.extend(numbers)
        return model(rows)

    kind = type(given)
    grad_cache(encoder, SupConLoss(), (given, "whole"), chunk_size=chunk_size, labels=labels)
    assert seen == 2 * list(range(8))


def test_a_mapping_that_cannot_be_made_again_becomes_a_dict():
    model, x, labels = Encoder(), torch.randn(4, 6), torch.arange(4) % 2

    def encoder(given):
        assert type(given) is dict
        return model(given["x"])

    given = defaultdict(list, x=x)
    grad_cache(encoder, SupConLoss(), (given,), chunk_size=2, labels=labels)


def test_an_option_that_is_a_tuple_is_bound_to_the_encoder():
    def encode(x, size):
        assert size == (2, 3)
        return x.view(-1, *size).sum(1)

    x, labels = torch.randn(4, 6), torch.arange(4) % 2
    bound = functools.partial(encode, size=(2, 3))
    with torch.no_grad():
        value = grad_cache(bound, SupConLoss(), x, chunk_size=3, labels=labels)
    torch.testing.assert_close(value, SupConLoss()(encode(x, (2, 3)), labels))
