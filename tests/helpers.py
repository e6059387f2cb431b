# SPDX-License-Identifier: Apache-2.0
"""Batches and comparisons that the tests share."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot"]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
SHAPES = [(1, 3), (2, 1), (5, 7), (47, 13), (48, 16), (49, 17), (95, 31), (97, 33)]
REF_SHAPES = [(1, 5, 3), (7, 1, 4), (48, 97, 16), (101, 47, 19)]
TOLERANCE = {
    torch.float64: 1e-11,
    torch.float32: 2e-5,
    torch.float16: 2e-3,
    torch.bfloat16: 1.6e-2,
}


def make_rows(
    n: int,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
) -> Tensor:
    """Random rows [n, d] that lie in memory as ``strides`` says; a leaf that wants a gradient."""
    size = {"contiguous": (n, d), "columns": (d, n), "slice": (2 * n, d + 3)}[strides]
    rows = torch.randn(size, dtype=torch.float64).to(dtype).to(device)
    if strides == "columns":
        rows = rows.T
    elif strides == "slice":
        rows = rows[::2, 1 : d + 1]
    return rows.detach().requires_grad_()


def make_labels(n: int, classes: int = 4, *, device: torch.device | str = "cpu") -> Tensor:
    return torch.randint(classes, (n,)).to(device)


def make_refs(
    m: int | None,
    d: int,
    dtype: torch.dtype = torch.float64,
    *,
    classes: int = 4,
    device: torch.device | str = "cpu",
    strides: str = "contiguous",
) -> dict[str, Tensor]:
    """The arguments for m references; none for None."""
    if m is None:
        return {}
    return {
        "ref_emb": make_rows(m, d, dtype, device=device, strides=strides),
        "ref_labels": make_labels(m, classes, device=device),
    }


def make_indices(
    length: int, counts: tuple[int, int], rows: int, refs: int, device: torch.device | str = "cpu"
) -> tuple[Tensor, ...]:
    """Random triplets (length 3, the first count), or random pairs of both kinds (length 4)."""
    first, second = counts
    sizes = [(first, rows), (first, refs), (second, rows), (second, refs)]
    if length == 3:
        sizes = [(first, rows), (first, refs), (first, refs)]
    return tuple(torch.randint(k, (count,), device=device) for count, k in sizes)


def rows_with_overflowing_distances(device: torch.device) -> Tensor:
    """Eight rows of which the squared norms are still finite, one squared distance no longer."""
    x = make_rows(8, 4, torch.float32, device=device).detach()
    x[2:4] = 0
    x[2, 1], x[3, 1] = 1.7e19, -1.7e19
    return x.requires_grad_()


def check_unwanted_gradients(loss: Callable[..., Tensor], device: torch.device) -> None:
    """Only what requires a gradient gets one, and it is that of a call where all do."""
    x, labels = make_rows(10, 4, device=device), make_labels(10, 2, device=device)
    with torch.no_grad():
        assert not loss(x, labels).requires_grad
    refs = make_refs(9, 4, classes=2, device=device)
    for reduction in ("mean", "none"):
        grads = []
        for wanted in ((True, True), (True, False), (False, True)):
            rows, bank = (
                side.detach().requires_grad_(flag)
                for side, flag in zip((x, refs["ref_emb"]), wanted, strict=True)
            )
            loss(rows, labels, **{**refs, "ref_emb": bank}, reduction=reduction).sum().backward()
            grads.append((rows.grad, bank.grad))
        (both_x, both_r), (only_x, no_r), (no_x, only_r) = grads
        assert no_r is None and no_x is None
        assert both_x.any() and both_r.any() and only_x.equal(both_x) and only_r.equal(both_r)


def assert_no_worse_than_eager(
    truth: Tensor, eager: Tensor, ours: Tensor, dtype: torch.dtype
) -> None:
    """``ours`` is at most twice as far from ``truth`` as ``eager``, plus the rounding of ``dtype``.

    ``truth`` is the reference in float64, ``eager`` the reference in ``dtype``.
    """
    assert ours.shape == truth.shape
    truth, eager, ours = truth.double(), eager.double(), ours.double()
    assert ours.isfinite().all()
    error = (ours - truth).abs()
    scale = truth.abs().amax().clamp(min=1) if truth.numel() else truth.new_tensor(1.0)
    allowed = 2 * (eager - truth).abs() + TOLERANCE[dtype] * scale
    assert (error <= allowed).all(), f"off by {error.max():.3g}, {allowed.min():.3g} allowed"


def assert_grad_close(truth: Tensor | None, ours: Tensor | None, dtype: torch.dtype) -> None:
    """Gradients agree in relative L2 norm and in direction."""
    assert truth is not None and ours is not None
    assert ours.shape == truth.shape and ours.dtype == dtype
    truth, ours = truth.double().flatten(), ours.double().flatten()
    assert ours.isfinite().all()
    norm = truth.norm()
    if norm < 1e-12:
        assert ours.norm() <= TOLERANCE[dtype]
        return
    assert (ours - truth).norm() <= 4 * TOLERANCE[dtype] * norm
    assert ours @ truth >= (1 - 4 * TOLERANCE[dtype]) * norm * ours.norm()


def compare(
    loss: Callable[..., Tensor], reference: Callable[..., Tensor], *args: Any, **options: Any
) -> None:
    """Value and gradients of ``loss`` against ``reference``, which also runs in float64.

    The leaf tensors among the arguments are those that gradients are compared for.
    """
    rows = next(value for value in args if isinstance(value, Tensor))
    dtype = rows.dtype

    def run(function: Callable[..., Tensor], to: torch.dtype) -> tuple[Tensor, list[Tensor | None]]:
        def convert(value: Any) -> Any:
            if not isinstance(value, Tensor) or not value.requires_grad:
                return value
            if to == dtype:
                # A detached tensor keeps its strides, which the test may be about.
                return value.detach().requires_grad_()
            return value.detach().to(to).requires_grad_()

        positional = [convert(value) for value in args]
        named = {name: convert(value) for name, value in options.items()}
        result = function(*positional, **named)
        leaves = [
            value
            for value in (*positional, *named.values())
            if isinstance(value, Tensor) and value.requires_grad
        ]
        # Unequal weights: a uniform gradient would hide rows that are mixed up.
        weight = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype, device=result.device)
        (result * weight.view(result.shape)).sum().backward()
        return result.detach(), [leaf.grad for leaf in leaves]

    truth, truth_grads = run(reference, torch.float64)
    eager, _ = run(reference, dtype)
    ours, grads = run(loss, dtype)
    assert ours.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert_no_worse_than_eager(truth, eager, ours, dtype)
    for expected, got in zip(truth_grads, grads, strict=True):
        assert_grad_close(expected, got, dtype)
