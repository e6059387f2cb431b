# SPDX-License-Identifier: Apache-2.0
"""Every loss in half precision: under autocast, end to end, and behind a loss scale."""

import copy

import pytest
import torch
from torch import Tensor, nn

import flashmetric
from flashmetric import distances
from flashmetric.functional import normalize_rows
from helpers import TOLERANCE
from loss_cases import CASES, FEATURES, ROWS, Case, Model, labels_of, name_of, rows

HALF = [torch.bfloat16, torch.float16]
# The logarithm of its scale is half precision itself, and so is the exponential of it.
ROUNDS_ITS_SCALE = {"ContrastiveImageTextLoss"}


def inputs_of(n: int = ROWS) -> Tensor:
    return torch.randn(n, 5, generator=torch.Generator().manual_seed(3))


def assert_close_to_exact(
    case: Case, loss: nn.Module, x: Tensor, value: Tensor, *, arithmetic: float = 1e-5
) -> None:
    """Value and gradients are those of float64 on the same rows, but for rounding of gradients."""
    exact, wide = copy.deepcopy(loss).double(), x.detach().double().requires_grad_()
    exact.zero_grad()
    expected = case(exact, wide, labels_of(len(x)))
    expected.backward()
    assert value.dtype == torch.float32
    torch.testing.assert_close(value.detach().double(), expected.detach(), rtol=arithmetic, atol=0)
    pairs = [(x, wide), *zip(loss.parameters(), exact.parameters(), strict=True)]
    for ours, theirs in pairs:
        assert ours.grad is not None and theirs.grad is not None
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).abs().max()
        allowed = 2 * TOLERANCE[ours.dtype] + arithmetic
        assert error <= allowed * theirs.grad.abs().max(), f"{error / theirs.grad.abs().max():.2g}"


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_autocast_around_encoder_and_loss(case: Case, dtype: torch.dtype) -> None:
    model = Model(case)
    with torch.autocast("cpu", dtype):
        x = model.embeddings(inputs_of())
        x.retain_grad()
        value = case(model.loss, x, labels_of())
        # Inside, which leaves the backward pass to autocast, too.
        value.backward()
    assert x.dtype == dtype
    assert_close_to_exact(case, model.loss, x, value)
    for weight in model.encoder.parameters():
        assert weight.grad is not None and weight.grad.dtype == torch.float32
        assert weight.grad.isfinite().all() and weight.grad.any()


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_loss_with_numbers_in_half_precision(case: Case, dtype: torch.dtype) -> None:
    loss, x = case.loss().to(dtype), rows(dtype=dtype).requires_grad_()
    value = case(loss, x, labels_of())
    value.backward()
    arithmetic = 1e-3 if case.name in ROUNDS_ITS_SCALE else 1e-5
    assert_close_to_exact(case, loss, x, value, arithmetic=arithmetic)


@pytest.mark.parametrize("wide_loss", [False, True], ids=["bfloat16 loss", "float32 loss"])
@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_training_in_bfloat16(case: Case, wide_loss: bool) -> None:
    model = Model(case).bfloat16()
    if wide_loss:
        model.loss.float()
    optimizer = torch.optim.Adam(model.encoder.parameters(), lr=0.01)
    inputs, losses = inputs_of().bfloat16(), []
    for _ in range(12):
        optimizer.zero_grad()
        value = model(inputs, labels_of())
        value.backward()
        optimizer.step()
        losses.append(value.item())
    assert losses[-1] < losses[0] - 1e-3 * abs(losses[0]), losses


DISTANCES = {
    "rbf": lambda: distances.RBF(0.7),
    "snr": distances.SNR,
    "snr of rows as they are": lambda: distances.SNR(normalize=False),
    "cityblock": lambda: distances.Cityblock(torch.linspace(0.3, 1.3, FEATURES)),
    "chi2": lambda: distances.ChiSquared(nn.Parameter(torch.linspace(0.3, 1.3, FEATURES))),
    "mahalanobis": lambda: distances.Mahalanobis(torch.eye(FEATURES) * 0.3 + 0.1),
    "learned": lambda: distances.LearnedMahalanobis(FEATURES, 4),
}


@pytest.mark.parametrize("dtype", HALF, ids=str)
@pytest.mark.parametrize("name", DISTANCES)
def test_distances_do_not_round_the_rows(name: str, dtype: torch.dtype) -> None:
    loss = flashmetric.ContrastiveLoss(distance=DISTANCES[name](), reduction="mean")
    x = rows(dtype=dtype).requires_grad_()
    value = loss(x, labels_of())
    value.backward()
    assert_close_to_exact(Case(name, lambda: loss), loss, x, value)


@pytest.mark.parametrize("dtype", HALF, ids=str)
def test_a_factor_on_anchors_does_not_round_the_rows(dtype: torch.dtype) -> None:
    loss = flashmetric.TripletMarginLoss(distance="sqeuclidean", anchor_scale=1.3)
    x = rows(dtype=dtype).requires_grad_()
    value = loss(x, labels_of())
    value.backward()
    assert_close_to_exact(Case("scaled", lambda: loss), loss, x, value)


def test_normalised_rows_are_float32_under_autocast() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        x = rows(dtype=torch.bfloat16).requires_grad_()
        unit = normalize_rows(x)
        unit.square().sum().backward()
    assert unit.dtype == torch.float32 and x.grad is not None and x.grad.dtype == torch.bfloat16


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_step_that_overflows_is_skipped(case: Case) -> None:
    model = Model(case)
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16, growth_interval=1000)
    before = copy.deepcopy(model.state_dict())

    def step(inputs: Tensor) -> Tensor:
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.float16):
            value = model(inputs, labels_of())
        scaler.scale(value).backward()
        scaler.step(optimizer)
        scaler.update()
        return value.detach()

    def moved() -> bool:
        after = model.state_dict()
        return any(not value.equal(after[name]) for name, value in before.items())

    # Row 2 holds scores of a different pair, where an infinite one costs.
    overflowing = inputs_of()
    overflowing[2] = 1e4
    with torch.autocast("cpu", torch.float16):
        assert model.embeddings(overflowing)[2].isinf().any()
    value = step(overflowing)
    assert not value.isfinite()
    assert not moved() and scaler.get_scale() == 2.0**15
    # The scale may still be too large for gradients in float16: a few steps bring it down.
    for _ in range(12):
        scale = scaler.get_scale()
        assert step(inputs_of()).isfinite()
        if moved():
            break
        assert scaler.get_scale() == scale / 2
    assert moved() and scaler.get_scale() == scale
    assert all(value.isfinite().all() for value in model.state_dict().values())


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_loss_scale_cancels(case: Case) -> None:
    """Inside, gradients are float32: a factor of 2^16 overflows nothing there."""
    loss, scale = case.loss(), 2.0**16
    grads = []
    for factor in (1.0, scale):
        x = rows().requires_grad_()
        loss.zero_grad()
        (case(loss, x, labels_of()) * factor).backward()
        grads.append([x.grad, *(p.grad for p in loss.parameters())])
    for plain, scaled in zip(*grads, strict=True):
        torch.testing.assert_close(scaled / scale, plain, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_a_loss_scale_saves_small_gradients_in_float16(case: Case) -> None:
    # As small as those of a mean over a large batch.
    small, scale = 2.0**-24, 2.0**16
    wide = rows(dtype=torch.float16).float().requires_grad_()
    case(case.loss(), wide, labels_of()).backward()
    grads = []
    for factor in (small, small * scale):
        x = rows(dtype=torch.float16).requires_grad_()
        (case(case.loss(), x, labels_of()) * factor).backward()
        grads.append(x.grad)
    lost, saved = grads
    assert wide.grad is not None and (lost.eq(0) & wide.grad.ne(0)).any()
    error = (saved.double() - wide.grad.double() * small * scale).abs().max()
    assert error <= 4e-3 * small * scale * wide.grad.abs().max()
