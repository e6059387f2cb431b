# SPDX-License-Identifier: Apache-2.0
"""The state of the memories: saved, loaded, refused, copied, moved."""

import copy
import io
import itertools
import pickle

import pytest
import torch

from flashmetric import CrossBatchMemory, SupConLoss
from helpers import make_labels, make_rows

STATE = ("embeddings", "labels", "pointer", "filled")


def batches(count, n=10):
    return [(make_rows(n, 5, torch.float64), make_labels(n, 3)) for _ in range(count)]


@pytest.mark.parametrize("options", [{}, {"embedding_size": 5, "dtype": torch.float64}], ids=str)
def test_state_dict_restores_the_memory_exactly(options):
    given = batches(4, n=7)
    memory = CrossBatchMemory(SupConLoss(), 16, **options)
    for batch in given[:2]:
        memory(*batch)
    file = io.BytesIO()
    torch.save(memory.state_dict(), file)
    file.seek(0)
    fresh = CrossBatchMemory(SupConLoss(), 16, **options)
    used = CrossBatchMemory(SupConLoss(), 16, **options)
    used(*given[3])
    copies = [copy.deepcopy(memory), pickle.loads(pickle.dumps(memory))]
    state = torch.load(file)
    for other in (fresh, used):
        other.load_state_dict(state)
    for batch in given[2:]:
        expected = memory(*batch)
        for other in (fresh, used, *copies):
            assert torch.equal(other(*batch), expected)
            assert all(torch.equal(getattr(other, n), getattr(memory, n)) for n in STATE)


def test_state_from_before_the_first_batch_and_of_another_size():
    empty = CrossBatchMemory(SupConLoss(), 16).state_dict()
    used = CrossBatchMemory(SupConLoss(), 16)
    (x, labels), _ = batches(2)
    used(x, labels)
    used.load_state_dict(empty)
    assert used.filled.item() == 0 and used(x.float(), labels).isfinite()
    with pytest.raises(RuntimeError, match="size mismatch"):
        CrossBatchMemory(SupConLoss(), 8).load_state_dict(used.state_dict())


def wrong_states(state):
    return {
        "size": {**state, "embeddings": torch.zeros(8, 5), "labels": torch.zeros(8).long()},
        "labels": {**state, "labels": state["labels"][:3]},
        "pointer": {**state, "pointer": torch.zeros(1, dtype=torch.int64)},
        "dimensions": {**state, "embeddings": state["embeddings"][0]},
        "integer rows": {**state, "embeddings": state["embeddings"].long()},
        "float labels": {**state, "labels": state["labels"].double()},
        "no tensor": {**state, "filled": 3},
        "pointer beyond the end": {**state, "pointer": torch.tensor(6)},
        "negative pointer": {**state, "pointer": torch.tensor(-1)},
        "more than all": {**state, "filled": torch.tensor(7)},
        "fewer than none": {**state, "filled": torch.tensor(-1)},
        "missing": {name: value for name, value in state.items() if name != "labels"},
    }


WRONG = list(wrong_states({name: torch.zeros(6, 5) for name in STATE}))


@pytest.mark.parametrize(
    ("wrong", "fixed"),
    [*itertools.product(WRONG, [False, True]), ("features", True)],
)
def test_a_state_that_does_not_fit_changes_nothing(wrong, fixed):
    options = {"embedding_size": 5, "dtype": torch.float64} if fixed else {}
    memory = torch.nn.ModuleDict({"m": CrossBatchMemory(SupConLoss(), 6, **options)})
    other = copy.deepcopy(memory)
    for x, labels in batches(2, n=4):
        memory["m"](x, labels)
        other["m"](x + 1, labels + 1)
    state = other["m"].state_dict()
    if wrong == "features":
        state = {**state, "embeddings": torch.zeros(6, 4)}
    else:
        state = wrong_states(state)[wrong]
    held = memory["m"]
    before = copy.deepcopy(held.state_dict())
    with pytest.raises(RuntimeError, match="Missing key" if wrong == "missing" else "as it was"):
        memory.load_state_dict({f"m.{name}": value for name, value in state.items()})
    assert all(torch.equal(getattr(held, n), before[n]) for n in STATE)
    memory.load_state_dict(other.state_dict())
    assert all(torch.equal(getattr(held, n), getattr(other["m"], n)) for n in STATE)


@pytest.mark.parametrize("learning", [torch.nn.Parameter, lambda t: t.requires_grad_()])
@pytest.mark.parametrize("assign", [False, True])
def test_rows_of_a_state_do_not_learn(assign, learning):
    memory, (first, second, third) = CrossBatchMemory(SupConLoss(), 16), batches(3, n=7)
    memory(*first)
    state = copy.deepcopy(memory.state_dict())
    state["embeddings"] = learning(state["embeddings"])
    fresh = CrossBatchMemory(SupConLoss(), 16)
    fresh.load_state_dict(state, assign=assign)
    assert not list(fresh.parameters()) and not fresh.embeddings.requires_grad
    assert list(fresh.state_dict()) == list(STATE)
    for x, labels in (second, third):
        values = [module(x, labels) for module in (fresh, memory)]
        torch.testing.assert_close(*values, rtol=0, atol=0)
        values[0].backward()
    assert state["embeddings"].grad is None


def test_an_unknown_key_is_still_one():
    memory = CrossBatchMemory(SupConLoss(), 6)
    with pytest.raises(RuntimeError, match='Unexpected key.*"rows"'):
        memory.load_state_dict({**memory.state_dict(), "rows": torch.zeros(1)})


@pytest.mark.parametrize("assign", [False, True])
def test_the_state_is_no_buffer_but_is_treated_as_one(assign):
    memory = torch.nn.Sequential(CrossBatchMemory(SupConLoss(), 6))
    memory[0](*batches(1, n=4)[0])
    assert not list(memory.buffers()) and not list(memory[0].named_buffers())
    assert [name for name, _ in memory[0].named_buffers("a", recurse=False)] == [
        f"a.{name}" for name in STATE
    ]
    assert list(memory.state_dict()) == [f"0.{name}" for name in STATE]
    memory.half()
    assert memory[0].embeddings.dtype == torch.float16 and memory[0].labels.dtype == torch.int64
    other = torch.nn.Sequential(CrossBatchMemory(SupConLoss(), 6)).to("meta")
    assert all(getattr(other[0], name).is_meta for name in STATE)
    other = other if assign else other.to_empty(device="cpu")
    other.load_state_dict(memory.state_dict(), assign=assign)
    assert all(torch.equal(getattr(memory[0], n), getattr(other[0], n)) for n in STATE)


@pytest.mark.parametrize("options", [{}, {"embedding_size": 5, "dtype": torch.float64}], ids=str)
def test_the_first_batch_may_come_in_inference_mode(options):
    given, plain = batches(2), CrossBatchMemory(SupConLoss(), 25, **options)
    with torch.inference_mode():
        memory = CrossBatchMemory(SupConLoss(), 25, **options)
        memory(*given[0])
    assert not any(getattr(memory, name).is_inference() for name in STATE)
    plain(*given[0])
    (x, labels), values = given[1], []
    for module in (memory, plain):
        value = module(x, labels)
        values.append((value, torch.autograd.grad(value, x)[0]))
    torch.testing.assert_close(*values)
