# SPDX-License-Identifier: Apache-2.0
"""Pair losses as papers, slides and other libraries define them, and their learned parts."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import flashmetric
import loop_pairwise as loop
from flashmetric import ContrastiveLoss, MarginLoss
from flashmetric import functional as F
from helpers import make_indices, make_labels, make_rows
from loop_pairwise import assert_same, value_and_grads

# What the formula of a preset gives for distance d: of a positive, of a negative, and what of all
# pairs is taken. Written from the formulas, not from the options.
FORMS: dict[str, tuple[str, Callable[[Tensor], Tensor], Callable[[Tensor], Tensor], str]] = {
    "hadsell": (
        "euclidean",
        lambda d: d**2 / 2,
        lambda d: loop.positive_part(1 - d) ** 2 / 2,
        "mean",
    ),
    "caffe_legacy": (
        "euclidean",
        lambda d: d**2 / 2,
        lambda d: loop.positive_part(1 - d**2) / 2,
        "mean",
    ),
    "tum": ("euclidean", lambda d: d**2, lambda d: loop.positive_part(1 - d**2), "mean"),
    "carlevaris": ("euclidean", lambda d: d**2, lambda d: loop.positive_part(1 - d**2), "mean"),
    "fracking": ("euclidean", lambda d: d, lambda d: loop.positive_part(4 - d), "mean"),
    "hoffer": ("euclidean", lambda d: d**2, lambda d: loop.positive_part(1 - d) ** 2, "mean"),
    "deepid2": (
        "euclidean",
        lambda d: d**2 / 2,
        lambda d: loop.positive_part(1 - d) ** 2 / 2,
        "mean",
    ),
    "deepid2_l1": (
        "cityblock",
        lambda d: d**2 / 2,
        lambda d: loop.positive_part(1 - d) ** 2 / 2,
        "mean",
    ),
    "radenovic": (
        "euclidean",
        lambda d: d**2 / 2,
        lambda d: loop.positive_part(0.7 - d) ** 2 / 2,
        "sum",
    ),
}


@pytest.mark.parametrize("name", FORMS)
def test_contrastive_presets(name: str) -> None:
    distance, plus, minus, reduction = FORMS[name]
    x, labels = make_rows(9, 4).detach() * 0.4, make_labels(9, 3)
    pairs = loop.all_pairs(labels)

    def truth(x: Tensor) -> Tensor:
        return loop.contrastive(
            x, x, pairs, plus=plus, minus=minus, distance=distance, reduction=reduction
        )

    loss = ContrastiveLoss.preset(name)
    assert_same(value_and_grads(lambda x: loss(x, labels), x), value_and_grads(truth, x))


def test_contrastive_presets_are_all_tested() -> None:
    with pytest.raises(ValueError, match="name must be one of") as message:
        ContrastiveLoss.preset("oml")
    for name in (*FORMS, "pml", "sentence_transformers", "tensorflow_addons"):
        assert repr(name) in str(message.value)
        ContrastiveLoss.preset(name, neg_margin=0.3)
    assert str(message.value).count("'") == 2 * (len(FORMS) + 3) + 2


def test_hoffer_is_twice_hadsell_and_equals_tensorflow_addons() -> None:
    x, labels = make_rows(12, 3), make_labels(12)
    hoffer, hadsell, addons = (
        ContrastiveLoss.preset(name)(x, labels)
        for name in ("hoffer", "hadsell", "tensorflow_addons")
    )
    torch.testing.assert_close(hoffer, 2 * hadsell)
    assert hoffer.equal(addons)


def test_chopras_loss_is_not_what_slides_call_chopras() -> None:
    x, labels = make_rows(6, 3), make_labels(6, 2)
    chopra = F.exponential_contrastive_loss(x, labels, q=1.0, distance="euclidean")
    legacy = ContrastiveLoss.preset("caffe_legacy", reduction="sum")(x, labels)
    assert abs(chopra - legacy) > 0.1


def test_bier_and_horde_divisors() -> None:
    """BIER counts the diagonal among the positives, HORDE adds up means per anchor."""
    x, labels = make_rows(12, 5), torch.arange(12) // 3
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T
    equal = labels[:, None] == labels
    off = ~torch.eye(12, dtype=torch.bool)
    pos, neg = ((1 + (-2 * (s - 0.5)).exp()).log() * off, (1 + (50 * (s - 0.5)).exp()).log())
    weight = off * equal / equal.sum() + ~equal / (~equal).sum()
    truth = (weight * torch.where(equal, pos, neg)).sum()
    torch.testing.assert_close(F.binomial_deviance_loss(x, labels, reduction="bier"), truth)
    truth = (pos * equal).sum(1).div(2).sum() + neg[~equal].sum() / 9
    torch.testing.assert_close(F.binomial_deviance_loss(x, labels, reduction="horde"), truth)


def test_deviance_does_not_overflow() -> None:
    x = torch.ones(6, 4, dtype=torch.float16)
    loss = F.binomial_deviance_loss(x, torch.arange(6), alpha=1000.0, cost=100.0)
    assert loss == 50000.0


def test_siglip_of_two_towers() -> None:
    images, texts = make_rows(7, 5), make_rows(7, 5)
    module = flashmetric.SigLIPLoss().double()

    def theirs(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        images, texts = map(torch.nn.functional.normalize, (images, texts))
        logits = log_scale.exp() * images @ texts.T + bias
        return -torch.nn.functional.logsigmoid((2 * torch.eye(7) - 1) * logits).sum() / 7

    def ours(images: Tensor, texts: Tensor, log_scale: Tensor, bias: Tensor) -> Tensor:
        return F.siglip_loss(images, ref_emb=texts, log_scale=log_scale, bias=bias)

    leaves = (images, texts, module.log_scale, module.bias)
    assert_same(value_and_grads(ours, *leaves), value_and_grads(theirs, *leaves))
    assert module(images, ref_emb=texts).equal(ours(*leaves))
    module(images, ref_emb=texts).backward()
    assert module.log_scale.grad and module.bias.grad
    # The loss of two halves of a batch with labels of position is that of the whole.
    position = torch.arange(7)
    halves = [
        F.siglip_loss(
            images[rows], position[rows], ref_emb=texts, ref_labels=position, reduction="sum"
        )
        for rows in (slice(4), slice(4, 7))
    ]
    torch.testing.assert_close(sum(halves) / 7, F.siglip_loss(images, ref_emb=texts))


def test_siglip_needs_two_towers() -> None:
    x = make_rows(4, 3)
    with pytest.raises(ValueError, match="ref_emb, .*must be given unless labels"):
        F.siglip_loss(x)
    with pytest.raises(ValueError, match="ref_emb must have a row for each of .* 4, .*; got 3"):
        F.siglip_loss(x, ref_emb=x[:3])
    with pytest.raises(ValueError, match="labels must be given with ref_labels; got None"):
        F.siglip_loss(x, ref_emb=x, ref_labels=torch.arange(4))
    with pytest.raises(TypeError, match="ref_emb must be a tensor"):
        F.siglip_loss(x, ref_emb=[1])


def test_siglip_with_rows_that_belong_to_none() -> None:
    images, texts = make_rows(4, 3).detach(), make_rows(7, 3).detach()

    def theirs(images: Tensor, texts: Tensor) -> Tensor:
        unit = torch.nn.functional.normalize
        z = 10 * unit(images) @ unit(texts).T - 10
        sign = 2 * torch.eye(4, 7, dtype=z.dtype) - 1
        return -torch.nn.functional.logsigmoid(sign * z).sum() / 4

    assert_same(
        value_and_grads(lambda x, r: F.siglip_loss(x, ref_emb=r), images, texts),
        value_and_grads(theirs, images, texts),
    )


@pytest.mark.parametrize("distance", ["cityblock", "chi2"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_verification_weights_below_0_come_back(distance: str, dtype: torch.dtype) -> None:
    x, labels = make_rows(8, 5).detach().abs().to(dtype), make_labels(8, 3)
    # Of the class, and of nothing: the first feature should weigh more, the second less.
    x[:, 1], x[:, 2] = labels, labels.flip(0) * 3.0
    weight = torch.tensor([1.0, -0.7, -0.2, 0.3, 0.0], dtype=dtype)
    ours = value_and_grads(
        lambda weight: F.verification_loss(x, labels, weight=weight, distance=distance), weight
    )

    def theirs(weight: Tensor) -> Tensor:
        difference = x[:, None] - x
        total = x[:, None] + x
        chi2 = difference.square() / total.masked_fill(total == 0, 1)
        features = difference.abs() if distance == "cityblock" else chi2
        same = (labels[:, None] == labels).to(dtype)
        each = torch.nn.functional.binary_cross_entropy_with_logits(
            -(features * weight).sum(2), same, reduction="none"
        )
        return each[~torch.eye(8, dtype=torch.bool)].mean()

    value, grad = value_and_grads(theirs, weight.clamp(min=0))
    assert grad[1] < 0
    grad[(weight <= 0) & (grad > 0)] = 0
    torch.testing.assert_close(ours[0], value)
    torch.testing.assert_close(ours[1], grad)


def test_a_verification_weight_of_0_gets_a_gradient_from_listed_pairs() -> None:
    x, labels = make_rows(6, 2), make_labels(6, 2)
    a1, p = ((labels[:, None] == labels) & ~torch.eye(6, dtype=torch.bool)).nonzero().unbind(1)
    a2, n = (labels[:, None] != labels).nonzero().unbind(1)
    grads = []
    for zero in (0.0, 1e-9):
        weight = torch.tensor([1.0, zero], dtype=torch.float64, requires_grad=True)
        F.verification_loss(x, indices_tuple=(a1, p, a2, n), weight=weight).backward()
        grads.append(weight.grad)
    assert grads[0] is not None and grads[0][1] != 0
    torch.testing.assert_close(*grads)


def test_margin_per_class() -> None:
    x, labels = make_rows(9, 4), make_labels(9, 3)
    beta = torch.tensor([0.9, 1.2, 1.4], dtype=torch.float64)
    pairs, classes = loop.all_pairs(labels), labels.tolist()
    for reduction in ("mean_nonzero", "mean", "sum", "none"):
        for nu in (0.0, 0.4):
            options = {"margin": 0.2, "nu": nu, "distance": "euclidean", "reduction": reduction}

            def ours(x: Tensor, beta: Tensor, options: Any = options) -> Tensor:
                return F.margin_loss(x, labels, beta=beta, **options).sum()

            def truth(x: Tensor, beta: Tensor, options: Any = options) -> Tensor:
                return loop.margin(x, x, pairs, beta=beta, classes=classes, **options).sum()

            assert_same(value_and_grads(ours, x, beta), value_and_grads(truth, x, beta))
    known = flashmetric.labels.ignoring(torch.where(labels == 2, -1, labels))
    kept = labels != 2
    torch.testing.assert_close(
        F.margin_loss(x, known, beta=beta, nu=0.3),
        F.margin_loss(x[kept], labels[kept], beta=beta, nu=0.3),
    )
    indices = make_indices(4, (5, 5), 9, 9)
    listed = F.margin_loss(x, labels, beta=beta, indices_tuple=indices)
    expected = loop.margin(
        x,
        x,
        loop.given_pairs(indices),
        beta=beta,
        classes=classes,
        margin=0.2,
        nu=0.0,
        distance="euclidean",
        reduction="mean_nonzero",
    )
    torch.testing.assert_close(listed, expected)
    with pytest.raises(ValueError, match="labels must be given for a beta per class"):
        F.margin_loss(x, beta=beta, indices_tuple=indices)
    with pytest.raises(ValueError, match="labels must be one class per row"):
        F.margin_loss(x, flashmetric.labels.multi_hot(torch.ones(9, 2)), beta=beta)


def test_margin_learns_its_boundary() -> None:
    x, labels = make_rows(12, 4), make_labels(12, 3)
    for classes in (None, 3):
        loss = MarginLoss(learn_beta=True, num_classes=classes, nu=0.1).double()
        loss(x, labels).backward()
        assert loss.beta.grad is not None and loss.beta.grad.all()
        assert list(loss.state_dict()) == ["beta"]
    assert not MarginLoss(beta=0.9).state_dict() and MarginLoss().beta == 1.2
    # Every active negative pushes beta down, every active positive up, over their number.
    d = torch.cdist(*[torch.nn.functional.normalize(x)] * 2)
    equal = labels[:, None] == labels
    pos = ((d > 1.0) & equal & ~torch.eye(12, dtype=torch.bool)).sum()
    neg = ((d < 1.4) & ~equal).sum()
    beta = torch.tensor(1.2, requires_grad=True)
    F.margin_loss(x, labels, beta=beta).backward()
    torch.testing.assert_close(beta.grad, ((neg - pos) / (neg + pos)))


@pytest.mark.parametrize(
    ("name", "options", "error", "message"),
    [
        ("ExponentialContrastiveLoss", {"q": 0.0}, ValueError, "q must be above 0, got 0.0"),
        ("ExponentialContrastiveLoss", {"q": "a"}, TypeError, "q must be a number, got str"),
        ("LogisticDistanceLoss", {"beta": -1}, ValueError, "beta must be above 0, got -1"),
        ("LogisticDistanceLoss", {"tau": math.nan}, ValueError, "tau must be finite"),
        ("SigmoidVerificationLoss", {"distance": "euclidean"}, ValueError, "distance must be one"),
        ("SigmoidVerificationLoss", {"weight": None}, TypeError, "weight must be a number"),
        ("CosineTargetLoss", {"pos_target": None}, TypeError, "pos_target must be a number"),
        ("CosineEmbeddingLoss", {"reduction": "max"}, ValueError, "reduction must be one of"),
        ("CosineContrastiveLoss", {"margin": "a"}, TypeError, "margin must be a number"),
        ("BinomialDevianceLoss", {"cost": 0}, ValueError, "cost must be above 0, got 0"),
        ("BinomialDevianceLoss", {"reduction": "abe"}, ValueError, "reduction must be one of"),
        ("MarginLoss", {"beta": "a"}, TypeError, "beta must be a number, got str"),
        ("MarginLoss", {"learn_beta": 1}, TypeError, "learn_beta must be True or False"),
        ("MarginLoss", {"num_classes": 0}, ValueError, "num_classes must be at least 1, got 0"),
        ("MarginLoss", {"reduction": "mean_separate"}, ValueError, "reduction must be one of"),
        ("SNRContrastiveLoss", {"regularization": None}, TypeError, "regularization must be a"),
        ("VerificationLoss", {"features": 0}, ValueError, "features must be an integer from 1"),
        ("VerificationLoss", {"features": 3, "distance": "dot"}, ValueError, "distance must be"),
        ("PairHingeLoss", {"label_convention": "y"}, ValueError, "label_convention must be one"),
        ("SigLIPLoss", {"scale": 0.0}, ValueError, "scale must be above 0, got 0.0"),
        ("SigLIPLoss", {"reduction": "mean_nonzero"}, ValueError, "reduction must be one of"),
    ],
)
def test_option_errors(
    name: str, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        getattr(flashmetric, name)(**options)


def test_parameter_errors() -> None:
    x, labels = make_rows(4, 3), make_labels(4)
    with pytest.raises(ValueError, match=r"bias must be a number, got shape \(2,\)"):
        F.siglip_loss(x, labels, bias=torch.zeros(2))
    with pytest.raises(TypeError, match="bias must be a floating-point tensor, got int64"):
        F.siglip_loss(x, labels, bias=torch.tensor(1))
    with pytest.raises(ValueError, match="weight must have one entry per feature, 3; got 2"):
        F.verification_loss(x, labels, weight=torch.ones(2))
    with pytest.raises(TypeError, match="weight must be a tensor, got float"):
        F.verification_loss(x, labels, weight=1.0)
    with pytest.raises(ValueError, match=r"weight must have shape \[features\]"):
        F.verification_loss(x, labels, weight=torch.ones(1, 3))
    with pytest.raises(ValueError, match=r"beta must be a number, got shape \(1, 2\)"):
        F.margin_loss(x, labels, beta=torch.ones(1, 2))
