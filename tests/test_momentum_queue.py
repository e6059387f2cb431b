# SPDX-License-Identifier: Apache-2.0
"""Momentum contrast: the loss against its two-line definition, the queue, the key encoder."""

import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from flashmetric import LearnedTemperature, MomentumQueue
from helpers import TOLERANCE, make_rows

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

STATE = ("embeddings", "labels", "pointer", "filled")


def textbook(queries, keys, negatives, temperature, batch_negatives, reduction="mean"):
    q, k, m = (normalize(rows) for rows in (queries, keys.detach(), negatives))
    positive = (q * k).sum(1, keepdim=True)
    logits = torch.cat((positive, q @ m.T), 1)
    target = torch.zeros(len(q), dtype=torch.int64)
    if batch_negatives:
        logits, target = torch.cat((q @ k.T, q @ m.T), 1), torch.arange(len(q))
    return cross_entropy(logits / temperature, target, reduction=reduction)


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("batch_negatives", [False, True])
def test_against_the_definition(batch_negatives, reduction):
    loss = MomentumQueue(11, temperature=0.2, batch_negatives=batch_negatives, reduction=reduction)
    seen = torch.zeros(0, 5, dtype=torch.float64)
    for n in (4, 6, 3, 7, 11):
        queries, keys = make_rows(n, 5), make_rows(n, 5)
        value = loss(queries, keys)
        expected = textbook(queries, keys, seen, 0.2, batch_negatives, reduction)
        torch.testing.assert_close(value, expected)
        grads = [torch.autograd.grad(v.sum(), queries)[0] for v in (value, expected)]
        torch.testing.assert_close(*grads)
        seen = torch.cat((seen, keys.detach()))[-11:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_dtypes(dtype):
    loss = MomentumQueue(16)
    for _ in range(2):
        queries, keys = make_rows(8, 32, dtype), make_rows(8, 32, dtype)
        before = loss.embeddings.clone()
        value = loss(queries, keys)
    assert value.dtype == torch.float32 and loss.embeddings.dtype == dtype
    expected = textbook(queries.double(), keys.double(), before[:8].double(), 0.07, False)
    torch.testing.assert_close(value.double(), expected, rtol=TOLERANCE[dtype] * 10, atol=1e-3)


def test_no_gradient_reaches_the_keys():
    loss, queries, keys = MomentumQueue(8), make_rows(4, 5), make_rows(4, 5)
    loss(queries, keys)
    loss(queries, keys).backward()
    assert keys.grad is None and queries.grad.abs().sum() > 0


def test_learned_temperature():
    loss = MomentumQueue(8, temperature=LearnedTemperature(0.5)).double()
    loss(make_rows(4, 5), make_rows(4, 5))
    loss(make_rows(4, 5), make_rows(4, 5)).backward()
    (parameter,) = loss.parameters()
    assert parameter.grad != 0


def test_state_dict_restores_the_queue():
    loss, fresh = MomentumQueue(10), MomentumQueue(10)
    for n in (4, 7):
        loss(make_rows(n, 5), make_rows(n, 5))
    fresh.load_state_dict(loss.state_dict())
    queries, keys = make_rows(3, 5), make_rows(3, 5)
    assert torch.equal(fresh(queries, keys), loss(queries, keys))
    assert all(torch.equal(getattr(fresh, name), getattr(loss, name)) for name in STATE)
    loss.eval()(queries, keys)
    assert torch.equal(fresh.pointer, loss.pointer)


def test_compiles_to_one_graph():
    torch.compiler.reset()
    loss = MomentumQueue(10, embedding_size=5)
    eager = copy.deepcopy(loss)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        queries, keys = make_rows(4, 5, torch.float32), make_rows(4, 5, torch.float32)
        value, expected = compiled(queries, keys), eager(queries, keys)
        torch.testing.assert_close(value, expected)
        grads = [torch.autograd.grad(v, queries) for v in (value, expected)]
        torch.testing.assert_close(*grads)
    torch.compiler.reset()


def test_the_key_encoder_follows():
    query = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    key = copy.deepcopy(query).requires_grad_(False)
    before = copy.deepcopy(key.state_dict())
    with torch.no_grad():
        for parameter in query.parameters():
            parameter.add_(torch.randn_like(parameter))
    query(torch.randn(5, 3))
    MomentumQueue(4, momentum=0.9).update(query, key)
    for name, parameter in key.named_parameters():
        expected = 0.9 * before[name] + 0.1 * query.get_parameter(name)
        torch.testing.assert_close(parameter, expected.detach())
    assert torch.equal(key[1].running_mean, before["1.running_mean"])
    MomentumQueue(4).update(query, key, 0)
    assert torch.equal(key[0].weight, query[0].weight)


def test_errors():
    with pytest.raises(ValueError, match="momentum must be from 0 to 1"):
        MomentumQueue(4, momentum=1.5)
    with pytest.raises(ValueError, match="temperature must be above 0"):
        MomentumQueue(4, temperature=0.0)
    loss, x = MomentumQueue(4), make_rows(4, 5)
    with pytest.raises(ValueError, match="keys must have the shape of queries"):
        loss(x, make_rows(3, 5))
    with pytest.raises(
        ValueError, match=r"keys must have the dtype of queries, torch.float64; got"
    ):
        loss(x, x.float())
    with pytest.raises(TypeError, match="keys must be a tensor, got NoneType"):
        loss(x, None)
    with pytest.raises(ValueError, match=r"queries must have shape \[rows, features\], got \(4,"):
        loss(torch.zeros(4), torch.zeros(4))
    with pytest.raises(ValueError, match="parameters of query_encoder"):
        loss.update(torch.nn.Linear(2, 2), torch.nn.Linear(2, 3))
    assert loss.filled.item() == 0
    assert "momentum=0.999" in repr(loss)
    loss(x, x)
    with pytest.raises(ValueError, match="queries must have 5 features, as the rows of the memory"):
        loss(x[:, :3], x[:, :3])


def test_the_key_encoder_follows_one_in_half_precision():
    query = torch.nn.Linear(3, 4, dtype=torch.bfloat16)
    key = copy.deepcopy(query).requires_grad_(False).float()
    before, queue = key.weight.clone(), MomentumQueue(4)
    with torch.no_grad():
        query.weight += 1
    for _ in range(500):
        queue.update(query, key)
    moved = (key.weight - before) / (query.weight.float() - before)
    torch.testing.assert_close(moved, torch.full_like(moved, 1 - 0.999**500), rtol=1e-3, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_a_key_encoder_too_coarse_to_follow_is_refused(dtype):
    query, key = torch.nn.Linear(3, 4, dtype=dtype), torch.nn.Linear(3, 4, dtype=dtype)
    before = key.weight.clone()
    with pytest.raises(TypeError, match="key_encoder must be in float32 or float64, got torch."):
        MomentumQueue(4).update(query, key)
    assert torch.equal(key.weight, before)
    # A copy needs no small steps.
    MomentumQueue(4).update(query, key, 0)
    assert torch.equal(key.weight, query.weight)
