# SPDX-License-Identifier: Apache-2.0
"""Losses on statistics of each anchor's pairs against loops: values, gradients, edge cases."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

import flashmetric
import loop_statistics as loops
from flashmetric import functional as F
from flashmetric.labels import ignoring, multi_hot, two_level
from helpers import make_indices, make_labels, make_rows
from loop_statistics import Loop


def level_of_cosine(d: Tensor, base: float) -> Tensor:
    return base - (1 - d)


def level_of_dot(d: Tensor, base: float) -> Tensor:
    return base + d


def level_of_distance(d: Tensor, base: float) -> Tensor:
    return d - base


COSINE = {"distance": "cosine"}
EUCLIDEAN = {"distance": "euclidean"}
SQUARED = {"distance": "sqeuclidean"}
UNIT_SQUARED = {"distance": "sqeuclidean", "normalize": True}
MS = partial(loops.multi_similarity, level=level_of_cosine)
# Function, loop, how the loop measures, options of both.
CASES: list[tuple[Callable[..., Tensor], Callable[..., Tensor], dict[str, Any], dict[str, Any]]] = [
    (F.multi_similarity_loss, MS, COSINE, {"beta": 40.0}),
    (F.multi_similarity_loss, MS, COSINE, {"mining": True, "alpha": 1.5, "base": 0.7}),
    (F.multi_similarity_loss, MS, COSINE, {"mining": True, "epsilon": -0.2}),
    (
        F.multi_similarity_loss,
        partial(loops.multi_similarity, level=level_of_dot),
        {"distance": "dot"},
        {"beta": 3.0},
    ),
    (
        F.multi_similarity_loss,
        partial(loops.multi_similarity, level=level_of_distance),
        EUCLIDEAN,
        {"beta": 3.0, "base": 1.0},
    ),
    (F.lifted_structure_loss, loops.lifted_structure, EUCLIDEAN, {"l2": 0.3}),
    (
        F.lifted_structure_loss,
        loops.lifted_structure,
        EUCLIDEAN | {"normalize": True},
        {"l2": 0.05, "l2_power": 1},
    ),
    (F.lifted_structure_loss, loops.lifted_structure, EUCLIDEAN, {"pos_margin": 0.25}),
    (F.lifted_structure_loss, loops.lifted_structure, EUCLIDEAN, {"max_positives": 2}),
    (F.lifted_structure_loss, loops.lifted_structure, COSINE, {"neg_margin": 0.5}),
    (
        F.generalized_lifted_structure_loss,
        loops.generalized_lifted_structure,
        EUCLIDEAN,
        {"neg_margin": -0.5, "pos_margin": 0.25},
    ),
    (
        F.adaptive_weighted_triplet_loss,
        loops.adaptive_weighted_triplet,
        EUCLIDEAN,
        {"margin": 0.3},
    ),
    (
        F.adaptive_weighted_triplet_loss,
        loops.adaptive_weighted_triplet,
        SQUARED,
        {"smooth": True},
    ),
    (F.ranked_list_loss, loops.ranked_list, {**EUCLIDEAN, "normalize": True}, {}),
    (
        F.ranked_list_loss,
        loops.ranked_list,
        {**EUCLIDEAN, "normalize": True},
        {"neg_temperature": 0.0, "margin": 0.2, "imbalance": 0.3},
    ),
    (
        F.ranked_list_loss,
        loops.ranked_list,
        EUCLIDEAN | {"normalize": False},
        {"pos_temperature": 2.0, "neg_temperature": 3.0, "alpha": 2.0, "margin": 0.5},
    ),
    (F.nca_loss, loops.nca, SQUARED, {"softmax_scale": 0.7}),
    (F.nca_loss, loops.nca, EUCLIDEAN, {"form": "probability"}),
    (F.fast_ap_loss, loops.fast_ap, UNIT_SQUARED, {}),
    (F.fast_ap_loss, loops.fast_ap, UNIT_SQUARED, {"bins": 3}),
    (F.fast_ap_loss, loops.fast_ap, UNIT_SQUARED, {"bins": 40}),
    (F.quadruplet_loss, loops.quadruplet, SQUARED, {"margin": 0.5, "pair_margin": 4.0}),
    (F.quadruplet_loss, loops.quadruplet, {**EUCLIDEAN, "normalize": True}, {"pair_margin": 1.0}),
]
IDS = [f"{case[0].__name__}-{at}" for at, case in enumerate(CASES)]
# One of each loss.
ONCE = [case for at, case in enumerate(CASES) if case[0] not in [other[0] for other in CASES[:at]]]
ONCE_IDS = [case[0].__name__ for case in ONCE]


def assert_agrees(
    case: tuple[Any, ...], x: Tensor, labels: Any, reductions: tuple[str, ...], **batch: Any
) -> None:
    """Value and gradients are those of the loop."""
    function, loop, measure, options = case
    leaves = [x, *([batch["ref_emb"]] if "ref_emb" in batch else [])]
    ours_measure = {} if function is F.fast_ap_loss else measure
    for reduction in reductions:
        if function is F.fast_ap_loss and reduction == "mean_nonzero":
            continue
        ours = function(x, labels, reduction=reduction, **ours_measure, **options, **batch)
        truth = loop(Loop(x, labels, **measure, **batch), reduction=reduction, **options)
        torch.testing.assert_close(ours, truth, rtol=1e-9, atol=1e-10)
        weight = torch.linspace(0.5, 1.5, ours.numel(), dtype=ours.dtype).view(ours.shape)
        grads = [torch.autograd.grad((weight * loss).sum(), leaves) for loss in (ours, truth)]
        for got, expected in zip(*grads, strict=True):
            torch.testing.assert_close(got, expected, rtol=1e-8, atol=1e-9)


REDUCTIONS = ("mean", "mean_nonzero", "sum", "none")


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_value_and_gradient(case) -> None:
    x, labels = make_rows(11, 3), make_labels(11)
    labels[3] = 77  # an anchor without a positive
    assert_agrees(case, x, labels, REDUCTIONS)


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_references(case) -> None:
    x, labels, refs = make_rows(7, 3), make_labels(7), make_rows(9, 3)
    ref_labels = make_labels(9)
    labels[2] = 50
    assert_agrees(case, x, labels, ("mean", "none"), ref_emb=refs, ref_labels=ref_labels)


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("m", [None, 8])
def test_given_pairs(case, length: int, m: int | None) -> None:
    x, labels = make_rows(9, 3), make_labels(9)
    refs = {} if m is None else {"ref_emb": make_rows(m, 3), "ref_labels": make_labels(m)}
    indices = make_indices(length, (15, 21), 9, m or 9)
    assert_agrees(case, x, labels, ("none",), indices_tuple=indices, **refs)
    refs.pop("ref_labels", None)
    assert_agrees(case, x, None, ("mean",), indices_tuple=indices, **refs)


LABELS = {
    "ignoring": lambda: ignoring(torch.randint(-1, 3, (12,))),
    "all classes": lambda: multi_hot(torch.rand(12, 2) < 0.5, match="all"),
    "any class": lambda: multi_hot(torch.rand(12, 70) < 0.01),
    "other groups": lambda: two_level(
        torch.randint(3, (12,)), torch.randint(2, (12,)), positives="different"
    ),
    "same groups": lambda: two_level(
        torch.randint(3, (12,)), torch.randint(2, (12,)), negatives="same"
    ),
}


@pytest.mark.parametrize("case", ONCE, ids=ONCE_IDS)
@pytest.mark.parametrize("kind", LABELS)
def test_label_rules(case, kind: str) -> None:
    labels = LABELS[kind]()
    if case[0] is F.quadruplet_loss and kind == "any class":
        with pytest.raises(ValueError, match="labels must give each row one class"):
            F.quadruplet_loss(make_rows(12, 3), labels)
        return
    assert_agrees(case, make_rows(12, 3), labels, ("mean", "none"))


@pytest.mark.parametrize("case", CASES, ids=IDS)
@pytest.mark.parametrize(
    "batch",
    ["no rows", "one row", "two rows", "a pair", "one class", "all unique", "all equal", "zeros"],
)
def test_degenerate_batches(case, batch: str) -> None:
    function, loop, measure, options = case
    n = {"no rows": 0, "one row": 1, "two rows": 2, "a pair": 2}.get(batch, 8)
    x, labels = make_rows(n, 3).detach(), torch.arange(n) % 3
    if batch in ("one class", "a pair"):
        labels = torch.zeros(n, dtype=torch.int64)
    elif batch == "all unique":
        labels = torch.arange(n)
    elif batch == "all equal":
        x = x[:1].repeat(n, 1)
    elif batch == "zeros":
        x = torch.zeros_like(x)
    x.requires_grad_()
    measured = {} if function is F.fast_ap_loss else measure
    for reduction in ("mean", "sum", "none"):
        loss = function(x, labels, reduction=reduction, **measured, **options)
        if n:
            truth = loop(Loop(x, labels, **measure), reduction=reduction, **options)
            torch.testing.assert_close(loss, truth, rtol=1e-9, atol=1e-9)
        (grad,) = torch.autograd.grad(loss.sum(), x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("case", CASES, ids=IDS)
def test_nothing_to_pair_is_zero(case) -> None:
    function, _, measure, options = case
    measured = {} if function is F.fast_ap_loss else measure
    x = make_rows(5, 3)
    labels = ignoring(torch.full((5,), -1))
    for batch in ({}, {"ref_emb": x.detach()[:0], "ref_labels": ignoring(torch.zeros(0).long())}):
        loss = function(x, labels, **measured, **options, **batch)
        assert loss.item() == 0
        assert not torch.autograd.grad(loss, x)[0].any()
    none = torch.zeros(0, dtype=torch.int64)
    loss = function(x, None, indices_tuple=(none,) * 4, **measured, **options)
    assert loss.item() == 0 and not torch.autograd.grad(loss, x)[0].any()


# Losses with constant weights in their gradient are not what finite differences see.
DETACHED = (F.adaptive_weighted_triplet_loss, F.ranked_list_loss)


@pytest.mark.parametrize("case", [c for c in CASES if c[0] not in DETACHED])
def test_gradcheck(case) -> None:
    function, _, measure, options = case
    measured = {} if function is F.fast_ap_loss else measure
    x, labels = make_rows(9, 3), torch.tensor([0, 0, 0, 1, 1, 1, 2, 2, 3])
    refs, ref_labels = make_rows(7, 3), make_labels(7)
    assert torch.autograd.gradcheck(lambda x: function(x, labels, **measured, **options), x)
    assert torch.autograd.gradcheck(
        lambda x, r: function(x, labels, ref_emb=r, ref_labels=ref_labels, **measured, **options),
        (x, refs),
    )


@pytest.mark.parametrize("case", ONCE, ids=ONCE_IDS)
def test_one_row_that_is_not_finite_shows(case) -> None:
    function, _, measure, options = case
    measured = {} if function is F.fast_ap_loss else measure
    x = make_rows(9, 3).detach()
    x[4, 1] = torch.nan
    labels = torch.arange(9) % 3
    assert function(x, labels, **measured, **options).isnan()


def test_mining_changes_the_loss() -> None:
    x, labels = make_rows(20, 3), torch.arange(20) % 4
    everything = F.multi_similarity_loss(x, labels)
    mined = F.multi_similarity_loss(x, labels, mining=True, epsilon=0.0)
    assert mined < everything
    # With enough slack nothing is left out.
    assert F.multi_similarity_loss(x, labels, mining=True, epsilon=3.0).equal(everything)


def test_gradient_of_generalized_lifted_is_that_of_adaptive_weights() -> None:
    x, labels = make_rows(12, 3), torch.arange(12) % 3
    losses = (
        F.generalized_lifted_structure_loss(x, labels, neg_margin=100.0),
        F.adaptive_weighted_triplet_loss(x, labels, margin=100.0),
    )
    first, second = (torch.autograd.grad(loss, x)[0] for loss in losses)
    torch.testing.assert_close(first, second)
    assert losses[0] != losses[1]


def test_quadruplet_finds_the_pair_that_most_classes_touch() -> None:
    # The nearest negative of every row is of class 0, so that class 0 needs second ones.
    x = torch.tensor([[0.0], [0.5], [1.0], [-1.0], [1.5], [-2.0], [3.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 2, 1, 2, 3])
    for refs in ({}, {"ref_emb": x.clone(), "ref_labels": labels}):
        for size in (None, 2, 5):
            x.requires_grad_()
            assert_agrees(
                (F.quadruplet_loss, loops.quadruplet, EUCLIDEAN, {"class_size": size}),
                x,
                labels,
                ("none", "mean"),
                **{k: v.detach().requires_grad_(k == "ref_emb") for k, v in refs.items()},
            )


@pytest.mark.parametrize("seed", range(8))
def test_quadruplet_in_random_batches(seed: int) -> None:
    torch.manual_seed(seed)
    x, labels = make_rows(16, 2), make_labels(16, 2 + seed)
    options = {"pair_margin": 3.0}
    assert_agrees((F.quadruplet_loss, loops.quadruplet, SQUARED, options), x, labels, ("none",))


def test_far_neighbours_do_not_underflow() -> None:
    x = torch.tensor([[0.0], [40.0], [1.0]], requires_grad=True)
    loss = F.nca_loss(x, torch.tensor([0, 0, 1]))
    # (1600 - 1 + 1600 - 1521) / 2, of which exp(-x) is 0 in float32.
    torch.testing.assert_close(loss.item(), 839.0)
    loss.backward()
    assert x.grad.isfinite().all() and x.grad.any()


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("MultiSimilarityLoss", {"alpha": 0.0}),
        ("MultiSimilarityLoss", {"beta": -1.0}),
        ("MultiSimilarityLoss", {"reduction": "median"}),
        ("LiftedStructureLoss", {"max_positives": 0}),
        ("GeneralizedLiftedStructureLoss", {"neg_margin": float("nan")}),
        ("AdaptiveWeightedTripletLoss", {"distance": "manhattan"}),
        ("RankedListLoss", {"imbalance": 1.5}),
        ("RankedListLoss", {"neg_temperature": -1.0}),
        ("NCALoss", {"form": "exp"}),
        ("NCALoss", {"softmax_scale": 0.0}),
        ("FastAPLoss", {"bins": 0}),
        ("FastAPLoss", {"reduction": "mean_nonzero"}),
        ("QuadrupletLoss", {"class_size": 0}),
    ],
)
def test_wrong_options(name: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(options))):
        getattr(flashmetric, name)(**options)
    with pytest.raises((TypeError, ValueError), match=next(iter(options))):
        getattr(flashmetric, name)(**{next(iter(options)): [None]})


def test_modules_are_their_functions() -> None:
    x, labels = make_rows(10, 3), make_labels(10)
    for module, function in (
        (flashmetric.MultiSimilarityLoss(beta=30.0), F.multi_similarity_loss),
        (flashmetric.LiftedStructureLoss(), F.lifted_structure_loss),
        (flashmetric.GeneralizedLiftedStructureLoss(), F.generalized_lifted_structure_loss),
        (flashmetric.AdaptiveWeightedTripletLoss(), F.adaptive_weighted_triplet_loss),
        (flashmetric.RankedListLoss(), F.ranked_list_loss),
        (flashmetric.NCALoss(), F.nca_loss),
        (flashmetric.FastAPLoss(), F.fast_ap_loss),
        (flashmetric.QuadrupletLoss(), F.quadruplet_loss),
    ):
        options = {"beta": 30.0} if function is F.multi_similarity_loss else {}
        assert module(x, labels).equal(function(x, labels, **options))
    assert flashmetric.MultiSimilarityLoss.preset("official").mining
    with pytest.raises(ValueError, match="name must be one of"):
        flashmetric.NCALoss.preset("official")
