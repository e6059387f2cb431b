# SPDX-License-Identifier: Apache-2.0
"""Compiled, exported and mixed-precision use: one graph, the same numbers."""

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from flashmetric import ContrastiveLoss, TripletMarginLoss
from helpers import make_labels, make_rows

LOSSES = [
    TripletMarginLoss(),
    TripletMarginLoss(distance="cosine", smooth=True, swap=True, empty="keep"),
    TripletMarginLoss(reduction="mean_nonzero", normalize=True),
    TripletMarginLoss(reduction="none"),
    TripletMarginLoss(exact=True),
    ContrastiveLoss(),
    ContrastiveLoss(distance="cosine", power=2, reduction="mean"),
    ContrastiveLoss(reduction="none"),
]

# TorchDynamo itself creates an instance of autograd.Function while it traces one.
pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def step(loss: Callable[..., Tensor], x: Tensor, *args: Any, **options: Any) -> tuple[Tensor, ...]:
    leaves = [x, *(v for v in options.values() if isinstance(v, Tensor) and v.requires_grad)]
    for leaf in leaves:
        leaf.grad = None
    value = loss(x, *args, **options)
    value.sum().backward()
    return value.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)


def assert_same(ours: tuple[Tensor, ...], expected: tuple[Tensor, ...]) -> None:
    for left, right in zip(ours, expected, strict=True):
        torch.testing.assert_close(left, right)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_compiles_to_one_graph(loss: nn.Module, device: torch.device) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x, labels = make_rows(24, 8, torch.float32, device=device), make_labels(24, device=device)
    r, ref_labels = make_rows(17, 8, torch.float32, device=device), make_labels(17, device=device)
    assert_same(step(compiled, x, labels), step(loss, x, labels))
    ref = {"ref_emb": r, "ref_labels": ref_labels}
    assert_same(step(compiled, x, labels, **ref), step(loss, x, labels, **ref))


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[1], LOSSES[5]], ids=repr)
def test_compiles_given_triplets(loss: nn.Module, device: torch.device) -> None:
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    x = make_rows(24, 8, torch.float32, device=device)
    triplets = tuple(torch.randint(24, (30,), device=device) for _ in range(3))
    assert_same(step(compiled, x, indices_tuple=triplets), step(loss, x, indices_tuple=triplets))


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=repr)
def test_batch_size_may_vary(loss: nn.Module, device: torch.device) -> None:
    graphs = []

    def count(graph: torch.fx.GraphModule, _: list[Tensor]) -> Callable[..., Any]:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(loss, fullgraph=True, dynamic=True, backend=count)
    for n in (24, 31, 40):
        x, labels = make_rows(n, 8, torch.float32, device=device), make_labels(n, device=device)
        assert_same(step(compiled, x, labels), step(loss, x, labels))
    assert len(graphs) == 1


# Importing TorchInductor defines scripted modules.
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_inductor(device: torch.device) -> None:
    net = nn.Linear(8, 4).to(device)
    loss = TripletMarginLoss(1.0)
    x, labels = torch.randn(24, 8, device=device), make_labels(24, device=device)

    def model(x: Tensor, labels: Tensor) -> Tensor:
        return loss(net(x), labels) + ContrastiveLoss()(net(x), labels)

    expected = torch.autograd.grad(model(x, labels), list(net.parameters()))
    compiled = torch.compile(model, fullgraph=True)
    assert_same(torch.autograd.grad(compiled(x, labels), list(net.parameters())), expected)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=repr)
def test_export(loss: nn.Module) -> None:
    x, labels = make_rows(24, 8, torch.float32), make_labels(24)
    with torch.no_grad():
        exported = torch.export.export(loss, (x, labels))
        torch.testing.assert_close(exported.module()(x, labels), loss(x, labels))
    targets = {str(node.target) for node in exported.graph.nodes}
    assert any(target.startswith("flashmetric.") for target in targets)


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_autocast_does_not_round_the_loss(loss: nn.Module, device: torch.device) -> None:
    x, labels = make_rows(24, 8, torch.float32, device=device), make_labels(24, device=device)
    expected = step(loss, x, labels)
    with torch.autocast(device.type, torch.bfloat16):
        got = step(loss, x, labels)
    for left, right in zip(got, expected, strict=True):
        assert left.dtype == right.dtype
        assert left.equal(right)


def test_autocast_network(device: torch.device) -> None:
    net = nn.Linear(8, 4).to(device)
    x, labels = torch.randn(24, 8, device=device), make_labels(24, device=device)
    for loss in LOSSES:
        with torch.autocast(device.type, torch.bfloat16):
            value = loss(net(x), labels)
        assert value.dtype == torch.float32
        value.sum().backward()
    assert net.weight.grad is not None and net.weight.grad.isfinite().all()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_deterministic_algorithms(loss: nn.Module, device: torch.device) -> None:
    x, labels = make_rows(24, 8, torch.float32, device=device), make_labels(24, device=device)
    r, ref_labels = make_rows(17, 8, torch.float32, device=device), make_labels(17, device=device)
    expected = step(loss, x, labels, ref_emb=r, ref_labels=ref_labels)
    torch.use_deterministic_algorithms(True)
    try:
        assert_same(step(loss, x, labels, ref_emb=r, ref_labels=ref_labels), expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("loss", [LOSSES[0], LOSSES[5]], ids=repr)
def test_numpy_margin_compiles(loss: nn.Module) -> None:
    margin = "margin" if hasattr(loss, "margin") else "neg_margin"
    loss = type(loss)(**{margin: np.float32(0.5)})
    x, labels = make_rows(24, 8, torch.float32), make_labels(24)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    assert_same(step(compiled, x, labels), step(type(loss)(**{margin: 0.5}), x, labels))


def test_meta_tensors() -> None:
    x = torch.empty(24, 8, device="meta", requires_grad=True)
    labels = torch.empty(24, dtype=torch.int64, device="meta")
    for loss in LOSSES:
        value = loss(x, labels)
        assert value.device.type == "meta"
        assert value.shape == ((24,) if loss.reduction == "none" else ())


def test_rows_of_any_strides_compile(device: torch.device) -> None:
    loss = TripletMarginLoss(normalize=True)
    labels = (torch.arange(12) % 4).to(device)
    x = torch.randn(6, 12, device=device).t()
    results = []
    for run in (loss, torch.compile(loss, fullgraph=True, backend="aot_eager")):
        leaf = x.detach().requires_grad_()
        assert not leaf.is_contiguous()
        value = run(leaf, labels)
        value.backward()
        assert leaf.grad is not None
        results.append((value.detach(), leaf.grad))
    torch.testing.assert_close(results[1], results[0])
