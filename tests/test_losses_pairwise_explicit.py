# SPDX-License-Identifier: Apache-2.0
"""Pairs with a label of their own, in all conventions, as arguments of every loss."""

from typing import Any

import pytest
import torch
from torch import Tensor

import flashmetric
import loop_pairwise as loop
from flashmetric import ContrastiveLoss
from flashmetric import functional as F
from flashmetric.functional import labelled_pairs
from helpers import make_rows
from loop_pairwise import assert_same, value_and_grads

CONVENTIONS = {"similar=0": (0, 1), "similar=1": (1, 0), "similar=+1/-1": (1, -1)}
EXPLICIT = [
    (ContrastiveLoss(neg_margin=2.0), F.contrastive_loss),
    *(
        (getattr(flashmetric, name)(**options), None)
        for name, options in {
            "ExponentialContrastiveLoss": {"q": 2.0},
            "LogisticDistanceLoss": {},
            "SigmoidVerificationLoss": {},
            "CosineTargetLoss": {},
            "CosineEmbeddingLoss": {},
            "CosineContrastiveLoss": {},
            "BinomialDevianceLoss": {},
            "MarginLoss": {},
            "SNRContrastiveLoss": {},
            "VerificationLoss": {"features": 4},
            "SigLIPLoss": {},
        }.items()
    ),
]


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("dtype", [torch.int64, torch.float32, torch.int8], ids=str)
def test_conventions(convention: str, dtype: torch.dtype) -> None:
    x1, x2, similar = make_rows(8, 4), make_rows(8, 4), torch.arange(8) % 3 == 0
    yes, no = CONVENTIONS[convention]
    y = torch.where(similar, yes, no).to(dtype)
    ours = ContrastiveLoss(neg_margin=4.0, reduction="none")(
        **labelled_pairs(x1, x2, y, label_convention=convention)
    )
    d = (x1 - x2).norm(dim=1)
    torch.testing.assert_close(ours, torch.where(similar, d, (4 - d).relu()))


@pytest.mark.parametrize("loss", [loss for loss, _ in EXPLICIT], ids=lambda m: type(m).__name__)
def test_every_loss_takes_explicit_pairs(loss: torch.nn.Module) -> None:
    loss.double()
    x1, x2, y = make_rows(8, 4), make_rows(8, 4), torch.arange(8) % 3 == 0
    with torch.no_grad():
        x1.abs_()
        x2.abs_()
    for reduction in ("mean", "none"):
        loss.reduction = reduction
        value = loss(**labelled_pairs(x1, x2, y, label_convention="similar=1"))
        single = [
            loss(
                **labelled_pairs(
                    x1[i : i + 1], x2[i : i + 1], y[i : i + 1], label_convention="similar=1"
                )
            )
            for i in range(8)
        ]
        if reduction == "none":
            assert value.shape == (8,)
            if not isinstance(loss, flashmetric.SNRContrastiveLoss):  # its regulariser is a mean
                torch.testing.assert_close(value, torch.cat(single))
        else:
            torch.testing.assert_close(value, sum(single) / 8)
        value.sum().backward()
        assert x1.grad.isfinite().all() and x2.grad.isfinite().all()


def test_weights_of_pairs() -> None:
    """Carlevaris-Bianco's s: the loss per pair is the caller's to weigh."""
    x1, x2 = make_rows(7, 3), make_rows(7, 3)
    y, s = torch.arange(7) % 2, torch.rand(7, dtype=torch.float64)
    pairs = labelled_pairs(x1, x2, y, label_convention="similar=1")
    loss = ContrastiveLoss.preset("carlevaris", neg_margin=9.0, reduction="none")
    ours = (torch.where(y == 1, s, 1) * loss(**pairs)).mean()
    d2 = (x1 - x2).square().sum(1)
    truth = torch.where(y == 1, s * d2, (9 - d2).relu()).mean()
    assert_same(
        [ours.detach(), *torch.autograd.grad(ours, (x1, x2))],
        [truth.detach(), *torch.autograd.grad(truth, (x1, x2))],
    )


def test_no_explicit_pairs_and_one_kind() -> None:
    x1, x2 = make_rows(3, 2), make_rows(3, 2)
    none = labelled_pairs(x1[:0], x2[:0], torch.zeros(0), label_convention="similar=0")
    assert ContrastiveLoss()(**none) == 0
    alike = labelled_pairs(x1, x2, torch.zeros(3), label_convention="similar=0")
    torch.testing.assert_close(
        ContrastiveLoss(reduction="mean")(**alike), (x1 - x2).norm(dim=1).mean()
    )


PAIR_ERRORS: list[tuple[dict[str, Any], type[Exception], str]] = [
    ({"label_convention": "similar"}, ValueError, "label_convention must be one of"),
    ({"x1": [1.0]}, TypeError, "x1 must be a tensor"),
    ({"x2": torch.zeros(3, 3)}, ValueError, r"x2 must have the shape of x1, \(3, 2\)"),
    ({"y": [0, 1, 1]}, TypeError, "y must be a tensor, got list"),
    (
        {"y": torch.zeros(2)},
        ValueError,
        r"y must have shape \(3,\), one label per pair; got \(2,\)",
    ),
    ({"y": torch.zeros(3, device="meta")}, ValueError, "y must be on cpu, as the pairs are"),
    ({"y": torch.tensor([0, 1, -1])}, ValueError, "y must hold 0 or 1 with label_convention"),
    (
        {"y": torch.zeros(3), "label_convention": "similar=+1/-1"},
        ValueError,
        "y must hold 1 or -1",
    ),
    (
        {"y": torch.zeros(3, dtype=torch.bool), "label_convention": "similar=+1/-1"},
        TypeError,
        "y must hold 1 and -1 for 'similar=.1/-1', got bool",
    ),
]


@pytest.mark.parametrize(("changed", "error", "message"), PAIR_ERRORS)
def test_pair_errors(changed: dict[str, Any], error: type[Exception], message: str) -> None:
    given = {
        "x1": torch.zeros(3, 2),
        "x2": torch.zeros(3, 2),
        "y": torch.tensor([0, 1, 1]),
        "label_convention": "similar=0",
        **changed,
    }
    with pytest.raises(error, match=message):
        labelled_pairs(**given)


def test_labels_of_pairs_have_no_default() -> None:
    with pytest.raises(TypeError, match="label_convention"):
        labelled_pairs(torch.zeros(3, 2), torch.zeros(3, 2), torch.zeros(3))
    with pytest.raises(TypeError, match="label_convention"):
        F.pair_hinge_loss(torch.zeros(3), torch.zeros(3))


@pytest.mark.parametrize("convention", CONVENTIONS)
@pytest.mark.parametrize("margin", [1.0, 0.3])
def test_pair_hinge(convention: str, margin: float) -> None:
    scores, similar = make_rows(3, 5), torch.rand(3, 5) < 0.5
    y = torch.where(similar, *CONVENTIONS[convention])
    signs = torch.where(similar, 1.0, -1.0).tolist()
    each = [
        loop.positive_part(margin - sign * score)
        for sign, score in zip(sum(signs, []), scores.flatten(), strict=True)
    ]
    total = sum(each)
    truth = {
        "none": torch.stack(each).view(3, 5),
        "sum": total,
        "mean": total / 15,
        "mean_nonzero": total / sum(bool(v > 0) for v in each),
    }
    for reduction, expected in truth.items():
        loss = flashmetric.PairHingeLoss(convention, margin, reduction=reduction)
        ours = loss(scores, y)
        torch.testing.assert_close(ours, expected)
        pair = [
            torch.autograd.grad(v.sum(), scores, retain_graph=True)[0] for v in (ours, expected)
        ]
        torch.testing.assert_close(*pair)
    assert F.pair_hinge_loss(scores[:0], y[:0], label_convention=convention) == 0
    assert F.pair_hinge_loss(scores.half(), y, label_convention=convention).dtype == torch.float32
    with pytest.raises(ValueError, match="y must hold"):
        F.pair_hinge_loss(scores, y + 3, label_convention=convention)
    with pytest.raises(TypeError, match="scores must be float32"):
        F.pair_hinge_loss(y, y, label_convention=convention)


@pytest.mark.parametrize("margin", [0.0, 0.3])
def test_torch_cosine_embedding(margin: float) -> None:
    x1, x2, y = make_rows(9, 4), make_rows(9, 4), torch.arange(9) % 2 * 2 - 1
    theirs = torch.nn.CosineEmbeddingLoss(margin=margin)
    ours = flashmetric.CosineEmbeddingLoss(margin)
    assert_same(
        value_and_grads(
            lambda a, b: ours(**labelled_pairs(a, b, y, label_convention="similar=+1/-1")), x1, x2
        ),
        value_and_grads(lambda a, b: theirs(a, b, y), x1, x2),
        1e-9,
    )


@pytest.mark.parametrize("distance", ["cityblock", "chi2"])
def test_verification_weights_of_any_sign(distance: str) -> None:
    x1, x2, y = make_rows(8, 4).detach().abs(), make_rows(8, 4).detach().abs(), torch.arange(8) % 2
    weight = torch.tensor([1.0, -0.7, 0.3, -0.1], dtype=torch.float64)
    bias = torch.tensor(0.4, dtype=torch.float64)

    def ours(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        pairs = labelled_pairs(x1, x2, y, label_convention="similar=1")
        return F.verification_loss(**pairs, weight=weight, bias=bias, distance=distance)

    def theirs(x1: Tensor, x2: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        features = (x1 - x2).abs() if distance == "cityblock" else (x1 - x2) ** 2 / (x1 + x2)
        return torch.nn.functional.binary_cross_entropy_with_logits(
            bias - features @ weight, y.double()
        )

    leaves = (x1, x2, weight, bias)
    assert_same(value_and_grads(ours, *leaves), value_and_grads(theirs, *leaves))
