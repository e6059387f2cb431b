# SPDX-License-Identifier: Apache-2.0
"""The pointwise pair losses against loops over pairs, on all kinds of pairs and batches."""

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import loop_pairwise as loop
from flashmetric import functional as F
from flashmetric.labels import ignoring, multi_hot, two_level
from flashmetric.ops.distance import accumulate_dtype
from helpers import make_indices, make_labels, make_rows

REDUCTIONS = ("mean", "mean_separate", "mean_nonzero", "sum", "none")


class Case(NamedTuple):
    name: str
    function: Callable[..., Tensor]
    loop: Callable[..., Tensor]
    options: dict[str, Any]
    reductions: tuple[str, ...] = REDUCTIONS
    learned: tuple[str, ...] = ()
    map_rows: Callable[[Tensor], Tensor] = lambda rows: rows


def contrastive(x, r, pairs, *, pos_margin, neg_margin, distance, power, scale, reduction):
    return loop.contrastive(
        x,
        r,
        pairs,
        plus=lambda d: loop.positive_part(d - pos_margin) ** power,
        minus=lambda d: loop.positive_part(neg_margin - d) ** power,
        distance=distance,
        reduction=reduction,
        factor=scale,
    )


CASES = [
    Case(
        "contrastive_cityblock",
        F.contrastive_loss,
        contrastive,
        {"pos_margin": 0.5, "neg_margin": 4.0, "distance": "cityblock", "power": 2, "scale": 0.5},
    ),
    Case(
        "exponential_l1",
        F.exponential_contrastive_loss,
        loop.exponential,
        {"q": 3.0, "distance": "cityblock"},
    ),
    Case(
        "exponential_l2",
        F.exponential_contrastive_loss,
        loop.exponential,
        {"q": 1.7, "distance": "euclidean"},
    ),
    Case(
        "ddml",
        F.logistic_distance_loss,
        loop.logistic_distance,
        {"tau": 3.0, "beta": 2.0, "distance": "sqeuclidean"},
    ),
    Case(
        "sigmoid",
        F.sigmoid_verification_loss,
        loop.sigmoid_verification,
        {"weight": 3.0, "bias": -0.4, "distance": "cosine"},
        learned=("weight", "bias"),
    ),
    Case(
        "sigmoid_dot",
        F.sigmoid_verification_loss,
        loop.sigmoid_verification,
        {"weight": 0.7, "bias": 0.2, "distance": "dot"},
        learned=("weight", "bias"),
    ),
    Case(
        "cosine_target",
        F.cosine_target_loss,
        loop.cosine_target,
        {"pos_target": 0.9, "neg_target": -0.3},
    ),
    Case("cosine_embedding", F.cosine_embedding_loss, loop.cosine_embedding, {"margin": 0.1}),
    Case("cosine_contrastive", F.cosine_contrastive_loss, loop.cosine_contrastive, {"margin": 0.1}),
    Case(
        "deviance",
        F.binomial_deviance_loss,
        loop.binomial_deviance,
        {"alpha": 2.0, "beta": 0.3, "cost": 5.0, "distance": "cosine"},
        (*REDUCTIONS, "bier", "horde"),
    ),
    Case(
        "deviance_dot",
        F.binomial_deviance_loss,
        loop.binomial_deviance,
        {"alpha": 0.5, "beta": 0.3, "cost": 2.0, "distance": "dot"},
    ),
    Case(
        "margin",
        F.margin_loss,
        loop.margin,
        {"margin": 0.2, "beta": 1.2, "nu": 0.3, "distance": "euclidean"},
        ("mean", "mean_nonzero", "sum", "none"),
        learned=("beta",),
    ),
    Case(
        "snr",
        F.snr_contrastive_loss,
        loop.snr,
        {"pos_margin": 0.2, "neg_margin": 1.5, "regularization": 0.1},
    ),
    Case(
        "snr_alone",
        F.snr_contrastive_loss,
        loop.snr,
        {"pos_margin": 0.2, "neg_margin": 1.5, "regularization": 0.0},
    ),
    Case(
        "siglip",
        F.siglip_loss,
        loop.siglip,
        {"log_scale": 1.1, "bias": -2.0, "distance": "cosine"},
        ("mean", "sum", "none"),
        learned=("log_scale", "bias"),
    ),
    Case(
        "verification",
        F.verification_loss,
        loop.verification,
        {"weight": [0.3, 1.2, 0.6, 0.1], "bias": 1.5, "distance": "cityblock"},
        learned=("weight", "bias"),
    ),
    Case(
        "verification_chi2",
        F.verification_loss,
        loop.verification,
        {"weight": [0.3, 1.2, 0.6, 0.1], "bias": 0.5, "distance": "chi2"},
        learned=("weight", "bias"),
        map_rows=torch.abs,
    ),
]
cases = pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)


def run(
    case: Case,
    x: Tensor,
    labels: Any,
    pairs: list[tuple[int, int, bool]],
    reduction: str,
    *,
    r: Tensor | None = None,
    tolerance: float = 1e-10,
    **where: Any,
) -> None:
    """Value and all gradients of a loss equal those of its loop."""
    results = []
    for function in (case.function, case.loop):
        leaves = [t.detach().clone().requires_grad_() for t in (x, r) if t is not None]
        rows = [case.map_rows(leaf) for leaf in leaves]
        options = dict(case.options)
        for name in case.learned:
            options[name] = torch.tensor(options[name], dtype=torch.float64, requires_grad=True)
            leaves.append(options[name])
        if function is case.function:
            refs = {} if r is None else {"ref_emb": rows[1]}
            value = function(rows[0], labels, **options, **refs, **where, reduction=reduction)
            assert value.dtype == accumulate_dtype(x.dtype)
        else:
            value = function(
                rows[0].double(), rows[-1].double(), pairs, **options, reduction=reduction
            )
        weight = torch.linspace(0.5, 1.5, value.numel(), dtype=torch.float64).view(value.shape)
        (value * weight).sum().backward()
        results.append([value.detach().double(), *(leaf.grad for leaf in leaves)])
    for ours, truth in zip(*results, strict=True):
        ours = torch.zeros_like(truth) if ours is None else ours
        truth = torch.zeros_like(ours) if truth is None else truth
        torch.testing.assert_close(ours, truth, rtol=tolerance, atol=tolerance)


@cases
def test_labels(case: Case) -> None:
    x, labels = make_rows(9, 4), make_labels(9, 3)
    for reduction in case.reductions:
        run(case, x, labels, loop.all_pairs(labels), reduction)


@cases
def test_references(case: Case) -> None:
    x, labels, r, refs = make_rows(6, 4), make_labels(6, 3), make_rows(7, 4), make_labels(7, 3)
    pairs = loop.all_pairs(labels, refs)
    for reduction in case.reductions:
        if reduction != "bier":  # of one set of rows only: see its own test
            run(case, x, labels, pairs, reduction, r=r, ref_labels=refs)


@cases
@pytest.mark.parametrize("length", [3, 4])
def test_indices(case: Case, length: int) -> None:
    x, r = make_rows(6, 4), make_rows(8, 4)
    for reduction in case.reductions:
        indices = make_indices(length, (7, 5), 6, 6)
        run(case, x, None, loop.given_pairs(indices), reduction, indices_tuple=indices)
        indices = make_indices(length, (7, 5), 6, 8)
        if reduction != "bier":
            pairs = loop.given_pairs(indices)
            run(case, x, None, pairs, reduction, r=r, indices_tuple=indices)


@cases
def test_label_rules(case: Case) -> None:
    x = make_rows(8, 4)
    classes, groups = make_labels(8, 2), make_labels(8, 2)
    known = classes.masked_fill(torch.arange(8) % 4 == 1, -1)
    tags = torch.randint(2, (8, 3))
    codes = tags.tolist()

    def pairs_of(kind: Callable[[int, int], bool | None]) -> list[tuple[int, int, bool]]:
        found = [(i, j, kind(i, j)) for i in range(8) for j in range(8) if i != j]
        return [(i, j, same) for i, j, same in found if same is not None]

    rules = [
        (
            ignoring(known),
            lambda i, j: None if min(known[i], known[j]) < 0 else bool(known[i] == known[j]),
        ),
        (
            multi_hot(tags),
            lambda i, j: any(a and b for a, b in zip(codes[i], codes[j], strict=True)),
        ),
        (
            two_level(classes, groups, positives="different", negatives="same"),
            lambda i, j: (
                bool(classes[i] == classes[j])
                if (classes[i] == classes[j]) != (groups[i] == groups[j])
                else None
            ),
        ),
    ]
    for labels, kind in rules:
        for reduction in case.reductions:
            run(case, x, labels, pairs_of(kind), reduction)


@cases
@pytest.mark.parametrize("n", [0, 1, 2])
@pytest.mark.parametrize("unique", [False, True])
def test_small_batches(case: Case, n: int, unique: bool) -> None:
    x = make_rows(n, 4)
    labels = torch.arange(n) if unique else torch.zeros(n, dtype=torch.int64)
    for reduction in case.reductions:
        run(case, x, labels, loop.all_pairs(labels), reduction)


@cases
@pytest.mark.parametrize("unique", [False, True])
def test_one_kind_of_pairs(case: Case, unique: bool) -> None:
    x = make_rows(6, 4)
    labels = torch.arange(6) if unique else torch.zeros(6, dtype=torch.int64)
    for reduction in case.reductions:
        run(case, x, labels, loop.all_pairs(labels), reduction)


@cases
def test_duplicates_and_zero_rows(case: Case) -> None:
    x = make_rows(8, 4).detach()
    x[3:6] = x[0]
    x[6:] = 0
    labels = torch.tensor([0, 0, 1, 0, 0, 1, 1, 0])
    for reduction in case.reductions:
        with_grad = case.function(
            x.clone().abs().requires_grad_(), labels, **as_tensors(case), reduction=reduction
        )
        assert with_grad.isfinite().all()
    x = torch.full((5, 4), 0.5, dtype=torch.float64, requires_grad=True)
    for reduction in case.reductions:
        value = case.function(x, labels[:5], **as_tensors(case), reduction=reduction)
        (grad,) = torch.autograd.grad(value.sum(), x)
        assert value.isfinite().all() and grad.isfinite().all()
    zeros = torch.zeros(5, 4, dtype=torch.float64, requires_grad=True)
    value = case.function(zeros, labels[:5], **as_tensors(case), reduction="sum")
    (grad,) = torch.autograd.grad(value, zeros)
    assert value.isfinite() and not grad.any()


def as_tensors(case: Case) -> dict[str, Any]:
    return {
        name: torch.tensor(value, dtype=torch.float64) if name in case.learned else value
        for name, value in case.options.items()
    }


@cases
def test_gradcheck(case: Case) -> None:
    x, labels, r, refs = make_rows(6, 4), make_labels(6, 3), make_rows(5, 4), make_labels(5, 3)
    learned = [
        torch.tensor(case.options[name], dtype=torch.float64, requires_grad=True)
        for name in case.learned
    ]

    def loss(x: Tensor, r: Tensor | None, *values: Tensor) -> Tensor:
        options = {**case.options, **dict(zip(case.learned, values, strict=True))}
        where = {} if r is None else {"ref_emb": case.map_rows(r), "ref_labels": refs}
        return case.function(case.map_rows(x), labels, **options, **where)

    assert torch.autograd.gradcheck(loss, (x, None, *learned))
    assert torch.autograd.gradcheck(loss, (x, r, *learned))


@cases
def test_half_precision_parameters_stay_wide(case: Case) -> None:
    x, labels = make_rows(8, 4, torch.float16).detach(), make_labels(8, 3)
    x = case.map_rows(x)
    options = {
        name: torch.tensor(value) if name in case.learned else value
        for name, value in case.options.items()
    }
    ours = case.function(x, labels, **options)
    wide = case.function(x.double(), labels, **as_tensors(case))
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), wide, rtol=1e-5, atol=1e-5)
