# SPDX-License-Identifier: Apache-2.0
"""Every loss as a module: replaced parameters, copies, files, conversions, and nothing kept."""

import copy
import gc
import io
import pickle
import weakref

import pytest
import torch
from torch import Tensor
from torch.func import functional_call, grad

from loss_cases import CASES, Case, Model, labels_of, name_of, rows

LEARNS = [case for case in CASES if any(True for _ in case.loss().parameters())]


def inputs() -> Tensor:
    return torch.randn(24, 5, generator=torch.Generator().manual_seed(3))


def results(model: Model) -> list[Tensor | None]:
    """Value and gradients of a step."""
    model.zero_grad()
    value = model(inputs(), labels_of())
    value.backward()
    return [value.detach(), *(p.grad for p in model.parameters())]


def moved(case: Case) -> Model:
    """A model with other parameters than a new one, as after some training."""
    model = Model(case)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.02)
    return model


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_functional_call(case: Case) -> None:
    """Parameters that are passed take the place of the module's own, in value and gradient."""
    model, other = Model(case), moved(case)
    before, expected = results(model), results(other)
    given = {name: p.detach().clone().requires_grad_() for name, p in other.named_parameters()}
    value = functional_call(model, given, (inputs(), labels_of()))
    grads = torch.autograd.grad(value, list(given.values()))
    for ours, theirs in zip((value.detach(), *grads), expected, strict=True):
        assert theirs is not None and ours.equal(theirs)
    assert not value.detach().equal(before[0])
    for ours, theirs in zip(results(model), before, strict=True):
        assert ours is not None and theirs is not None and ours.equal(theirs)


@pytest.mark.parametrize("case", LEARNS, ids=name_of)
def test_functional_call_of_the_loss_alone(case: Case) -> None:
    loss, other = case.loss(), moved(case).loss
    given = {name: p.detach().clone() for name, p in other.named_parameters()}
    x = rows()
    if case.call == "towers":
        value = functional_call(loss, given, (x[:12],), {"ref_emb": x[12:]})
    else:
        value = functional_call(loss, given, (x, labels_of()))
    assert value.equal(case(other, x, labels_of()))
    assert not value.equal(case(loss, x, labels_of()))


def test_transforms_of_functions_are_refused() -> None:
    """First derivatives are torch.autograd.grad's, see above; torch.func.grad says no."""
    model = Model(CASES[0])

    def value(parameters: dict[str, Tensor]) -> Tensor:
        return functional_call(model, parameters, (inputs(), labels_of()))

    with pytest.raises(RuntimeError, match="functorch transforms"):
        grad(value)(dict(model.named_parameters()))


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_copies_after_a_step(case: Case) -> None:
    model = moved(case)
    expected = results(model)
    file = io.BytesIO()
    torch.save(model.loss, file)
    file.seek(0)
    copies = (
        copy.deepcopy(model.loss),
        copy.copy(model.loss),
        pickle.loads(pickle.dumps(model.loss)),
        torch.load(file, weights_only=False),
    )
    for twin in copies:
        assert type(twin) is type(model.loss) and repr(twin) == repr(model.loss)
        other = moved(case)
        other.loss = twin
        for ours, theirs in zip(results(other), expected, strict=True):
            assert ours is not None and theirs is not None and ours.equal(theirs)
    whole = copy.deepcopy(model)
    assert whole(inputs(), labels_of()).equal(expected[0])
    own = {id(tensor) for tensor in (*model.parameters(), *model.buffers())}
    assert not own & {id(tensor) for tensor in (*whole.parameters(), *whole.buffers())}


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_state_in_a_file(case: Case) -> None:
    model = moved(case)
    expected = results(model)
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    twin = Model(case)
    # Only tensors: what a loss keeps is safe to load.
    outcome = twin.load_state_dict(torch.load(file, weights_only=True), strict=True)
    assert not outcome.missing_keys and not outcome.unexpected_keys
    for ours, theirs in zip(results(twin), expected, strict=True):
        assert ours is not None and theirs is not None and ours.equal(theirs)


@pytest.mark.parametrize("case", LEARNS, ids=name_of)
def test_a_state_that_does_not_fit_changes_nothing(case: Case) -> None:
    loss = case.loss()
    expected = case(loss, rows(), labels_of())
    state = loss.state_dict()
    other_shape = {name: tensor.new_zeros(3, 5, 2, 2) for name, tensor in state.items()}
    with pytest.raises(RuntimeError, match="size mismatch"):
        loss.load_state_dict(other_shape)
    with pytest.raises(RuntimeError, match="Missing key"):
        loss.load_state_dict({})
    with pytest.raises(RuntimeError, match="Unexpected key"):
        loss.load_state_dict({**state, "other": torch.zeros(())})
    assert case(loss, rows(), labels_of()).equal(expected)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_conversions_reach_all_numbers(case: Case) -> None:
    loss = case.loss()
    expected = case(loss, rows(), labels_of())
    shown = repr(loss)
    for convert, dtype in (
        (torch.nn.Module.double, torch.float64),
        (torch.nn.Module.bfloat16, torch.bfloat16),
        (torch.nn.Module.float, torch.float32),
    ):
        twin = convert(copy.deepcopy(loss))
        state = twin.state_dict().values()
        assert all(tensor.dtype == dtype for tensor in state if tensor.is_floating_point())
        value = case(twin, rows(), labels_of())
        # The rows say what the loss is computed in.
        assert value.dtype == torch.float32
        close = 2e-2 if dtype == torch.bfloat16 else 1e-6
        torch.testing.assert_close(value, expected, rtol=close, atol=close)
    # Hyper-parameters are those of a new loss.
    assert repr(loss) == shown == repr(case.loss())
    assert shown.startswith(type(loss).__name__)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_no_rows_are_kept(case: Case) -> None:
    """When a step is over, nothing but its result holds the embeddings or their graph."""
    loss, x, labels = case.loss(), rows().requires_grad_(), labels_of()
    names = set(vars(loss))
    case(loss, x * 1, labels).backward()
    held = [weakref.ref(x), weakref.ref(labels)]
    del x, labels
    gc.collect()
    assert [ref() for ref in held] == [None, None]
    assert set(vars(loss)) == names
    for module in loss.modules():
        kept = [value for value in vars(module).values() if isinstance(value, Tensor)]
        kept += [*module._buffers.values(), *module._parameters.values()]
        assert all(tensor is None or tensor.is_leaf for tensor in kept)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_training_and_evaluation_mode_are_one(case: Case) -> None:
    loss = case.loss()
    expected = case(loss, rows(), labels_of())
    assert case(loss.eval(), rows(), labels_of()).equal(expected)
    with torch.inference_mode():
        assert case(loss, rows(), labels_of()).equal(expected)
