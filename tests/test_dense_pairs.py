# SPDX-License-Identifier: Apache-2.0
"""Pairs on an explicit matrix agree with the kernels, and show the weight of every pair."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

import flashmetric
from flashmetric import functional as F
from flashmetric.distances import SNR, Metric
from flashmetric.functional import Logit, Term
from flashmetric.functional.dense_pairs import DenseListedPairs, DensePairs
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.labels import ignoring, multi_hot, two_level
from flashmetric.reference import dense
from helpers import make_indices, make_labels, make_rows
from row_batches import FORMULAS, ROW_DISTANCES, THRESHOLD_FORMULAS

N, M, D = 9, 7, 3


def both_ways(labels: Any, **options: Any):
    """Pairs by the kernels and on the matrix, of the same rows."""
    fused = prepare_pairs(*labels, **options)
    with dense() as matrices:
        explicit = prepare_pairs(*labels, **options)
    assert isinstance(explicit, (DensePairs, DenseListedPairs))
    assert matrices[0] is explicit.matrix
    return fused, explicit


def assert_same(leaves: list[Tensor], *results: tuple[Any, ...]) -> None:
    """Results, and gradients of what has some, of the two are the same."""
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
        if not got.is_floating_point() or not expected.requires_grad:
            continue
        finite = expected.isfinite()
        weight = torch.linspace(0.5, 1.5, got.numel(), dtype=got.dtype).view(got.shape)
        grads = []
        for value in (got, expected):
            total = (value.masked_fill(~finite, 0) * weight).sum() + sum(
                leaf.sum() for leaf in leaves
            ) * 0
            grads.append(torch.autograd.grad(total, leaves, retain_graph=True, allow_unused=True))
        for first, second in zip(*grads, strict=True):
            first = torch.zeros_like(leaves[0]) if first is None else first
            second = torch.zeros_like(leaves[0]) if second is None else second
            torch.testing.assert_close(first, second, rtol=1e-8, atol=1e-8)


def ask_everything(pairs: Any, leaves: list[Tensor]) -> list[tuple[str, tuple[Any, ...]]]:
    """Every question there is, with its answer."""
    slope = torch.linspace(-1, 1, N, dtype=torch.float64)
    bounds = torch.full((N,), 0.4, dtype=torch.float64), torch.linspace(0.2, 3, N).double()
    answers = []
    for at, formula in enumerate(FORMULAS):
        if formula == "none":
            continue
        terms = Term(formula, 0.5, -0.25), Term(FORMULAS[at - 1], slope, 0.3)
        terms = (terms[0], None if FORMULAS[at - 1] == "none" else terms[1])
        answers.append((f"sum of {formula}", pairs.sum(*terms)))
        answers.append((f"bounded sum of {formula}", pairs.sum(*terms, bounds=bounds)))
        answers.append((f"total of {formula}", pairs.total(*terms)))
    logits = Logit(2.0, slope), Logit(-3.0, 1.0)
    answers.append(("lse", pairs.logsumexp(*logits)))
    answers.append(("positive lse", pairs.logsumexp(logits[0])))
    answers.append(("bounded lse", pairs.logsumexp(*logits, bounds=bounds)))
    circle = Logit(1.5, 0.2, "circle", 0.25), Logit(-1.5, 0.2, "circle", 0.25)
    if pairs.anchor_scale is None:
        answers.append(("circle", pairs.logsumexp(*circle)))
    limits = torch.tensor([[-math.inf, 0.3, 0.9]], dtype=torch.float64).repeat(N, 1)
    for kind in ("positive", "negative"):
        answers.append((f"nearest {kind}", pairs.nearest(kind)))
        answers.append((f"farthest {kind}", pairs.farthest(kind)))
        answers.append((f"{kind} beyond", pairs.nearest(kind, limits)))
        answers.append((f"{kind} below", pairs.farthest(kind, limits.flip(1))))
        answers.append((f"top {kind}", pairs.top(kind, 3)))
        answers.append((f"far {kind}", pairs.top(kind, 20, farthest=True)))
        for formula in THRESHOLD_FORMULAS:
            if formula != "hinge" and pairs.anchor_scale is not None:
                continue
            answers.append((f"{kind} {formula}", pairs.threshold_sum(kind, formula, limits)))
        one = torch.tensor([[0.5]], dtype=torch.float64)
        answers.append((f"{kind} threshold", pairs.threshold_sum(kind, "hinge", one)))
    answers.append(("counts", pairs.counts()))
    answers.append(("positives", pairs.positives()))
    return answers


def check(labels: Tensor | Any, refs: bool, **options: Any) -> None:
    x, r = make_rows(N, D), make_rows(M, D)
    if options["distance"] == "chi2":
        x, r = (rows.detach().abs().requires_grad_() for rows in (x, r))
    leaves = [x]
    if refs:
        options["ref_emb"] = r
        leaves.append(r)
    fused, explicit = both_ways((x, labels), **options)
    answers = zip(ask_everything(explicit, leaves), ask_everything(fused, leaves), strict=True)
    for (question, got), (_, expected) in answers:
        try:
            assert_same(leaves, got, expected)
        except AssertionError as error:
            raise AssertionError(question) from error


@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("distance", [*ROW_DISTANCES, SNR()], ids=str)
def test_every_distance(distance: str | Metric, refs: bool) -> None:
    labels = {"ref_labels": make_labels(M)} if refs else {}
    check(make_labels(N), refs, distance=distance, **labels)


@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("kind", ["ignoring", "tags", "groups"])
def test_label_rules(kind: str, refs: bool) -> None:
    make = {
        "ignoring": lambda n: ignoring(torch.randint(-1, 2, (n,))),
        "tags": lambda n: multi_hot(torch.rand(n, 4) < 0.3),
        "groups": lambda n: two_level(
            torch.randint(2, (n,)), torch.randint(2, (n,)), positives="different", negatives="same"
        ),
    }[kind]
    labels = {"ref_labels": make(M)} if refs else {}
    check(make(N), refs, distance="euclidean", normalize=True, **labels)


@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("length", [3, 4])
def test_given_pairs(length: int, refs: bool) -> None:
    indices = make_indices(length, (14, 17), N, M if refs else N)
    check(None, refs, distance="sqeuclidean", indices_tuple=indices)


@pytest.mark.parametrize("distance", ["euclidean", "cosine", "sqrt_cosine", "rbf", "chi2"])
def test_coinciding_opposite_and_zero_rows(distance: str) -> None:
    x = torch.tensor([[1.0, 0], [1, 0], [-1, 0], [0, 0], [0, 0], [0, 2]], dtype=torch.float64)
    x = (x.abs() if distance == "chi2" else x).requires_grad_()
    labels = torch.tensor([0, 0, 0, 1, 1, 0])
    fused, explicit = both_ways((x, labels), distance=distance)
    terms = Term("linear", 1.0, 0.0), Term("square", 1.0, 0.0)
    assert_same([x], explicit.sum(*terms), fused.sum(*terms))


def test_angles_of_coinciding_opposite_and_zero_rows() -> None:
    x = torch.tensor([[1.0, 0], [2, 0], [-1, 0], [0, 0], [0, 3]], dtype=torch.float64)
    x.requires_grad_()
    with dense() as matrices:
        prepare_pairs(x, torch.arange(5), distance="angular")
    half = math.pi / 2
    expected = torch.tensor(
        [
            [0, 0, math.pi, half, half],
            [0, 0, math.pi, half, half],
            [math.pi, math.pi, 0, half, half],
            [half] * 5,
            [half, half, half, half, 0],
        ],
        dtype=torch.float64,
    )
    torch.testing.assert_close(matrices[0], expected)
    (grad,) = torch.autograd.grad(matrices[0].sum(), x)
    # Coinciding and opposite rows have no direction to turn to; the others turn together.
    assert grad.isfinite().all() and not grad[3].any()


def test_both_ways_in_one() -> None:
    x, r = make_rows(N, D), make_rows(M, D)
    fused, explicit = both_ways(
        (x, make_labels(N)), distance="cosine", ref_emb=r, ref_labels=make_labels(M)
    )
    logits = Logit(-4.0, 1.0), Logit(-4.0, 1.0)
    for got, expected in zip(
        explicit.logsumexp_both_ways(*logits), fused.logsumexp_both_ways(*logits), strict=True
    ):
        assert_same([x, r], got, expected)


@pytest.mark.parametrize("batch", [{}, {"ref_emb": 0}, {"ref_emb": M}])
def test_without_rows(batch: dict[str, int]) -> None:
    refs = {}
    if batch:
        m = batch["ref_emb"]
        refs = {"ref_emb": make_rows(m, D), "ref_labels": make_labels(m)}
    for n in (0, 2):
        x = make_rows(n, D)
        fused, explicit = both_ways((x, make_labels(n)), distance="euclidean", **refs)
        for question in (
            lambda pairs: pairs.sum(Term("exp"), Term("exp")),
            lambda pairs: pairs.logsumexp(Logit(), Logit()),
            lambda pairs: pairs.nearest("negative"),
            lambda pairs: pairs.top("positive", 4),
            lambda pairs: pairs.counts(),
        ):
            for got, expected in zip(question(explicit), question(fused), strict=True):
                torch.testing.assert_close(got, expected)


def test_a_row_that_is_not_finite() -> None:
    x = make_rows(6, D).detach()
    x[2, 0] = torch.inf
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    fused, explicit = both_ways((x, labels), distance="euclidean")
    for pairs in (fused, explicit):
        assert pairs.sum(Term("hinge"), Term("hinge")).positive.isnan().all()
        assert pairs.logsumexp(Logit(), Logit()).negative.isnan().all()
    assert explicit.nearest("negative").other.equal(fused.nearest("negative").other)


def test_the_context_ends() -> None:
    x, labels = make_rows(4, D), torch.tensor([0, 0, 1, 1])
    with pytest.raises(RuntimeError, match="stop"), dense():
        raise RuntimeError("stop")
    with dense() as outer, dense() as inner:
        F.nca_loss(x, labels)
    assert len(inner) == 1 and not outer
    assert not isinstance(prepare_pairs(x, labels, distance="dot"), DensePairs)


LOSSES = [
    flashmetric.ContrastiveLoss(neg_margin=2.0),
    flashmetric.MultiSimilarityLoss(mining=True),
    flashmetric.LiftedStructureLoss(),
    flashmetric.GeneralizedLiftedStructureLoss(),
    flashmetric.AdaptiveWeightedTripletLoss(),
    flashmetric.RankedListLoss(),
    flashmetric.NCALoss(),
    flashmetric.FastAPLoss(),
    flashmetric.QuadrupletLoss(pair_margin=3.0),
    flashmetric.TripletMarginLoss(1.0),
    flashmetric.TripletMarginLoss(1.0, reduction="none"),
]


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("given", ["labels", "references", "pairs"])
def test_losses_are_the_same(loss: Any, given: str) -> None:
    x, labels, batch = make_rows(N, D), torch.arange(N) % 3, {}
    if given == "references":
        batch = {"ref_emb": make_rows(M, D), "ref_labels": torch.arange(M) % 3}
    elif given == "pairs":
        batch = {"indices_tuple": make_indices(3, (12, 12), N, N)}
    with dense():
        explicit = loss(x, labels, **batch)
    assert_same([x], (explicit,), (loss(x, labels, **batch),))


@pytest.mark.parametrize("loss", LOSSES, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("given", ["labels", "references", "pairs"])
def test_weights_of_pairs_make_up_the_gradient(loss: Any, given: str) -> None:
    x, labels, batch = make_rows(N, D), torch.arange(N) % 3, {}
    if given == "references":
        batch = {"ref_emb": make_rows(M, D), "ref_labels": torch.arange(M) % 3}
    elif given == "pairs":
        batch = {"indices_tuple": make_indices(3, (12, 12), N, N)}
    signed = flashmetric.pair_weights(loss, x, labels, signed=True, **batch)
    assert not signed.requires_grad and x.grad is None
    assert signed.any() and flashmetric.pair_weights(loss, x, labels, **batch).equal(signed.abs())
    if type(loss) is flashmetric.FastAPLoss:
        distance, normalize = "sqeuclidean", True
    else:
        distance, normalize = loss.distance, loss.normalize
    # A loss with constant weights per pair has the gradient that these weights describe.
    with dense() as matrices:
        prepare_pairs(
            x, labels, distance=distance, normalize=normalize, **{**batch, "indices_tuple": None}
        )
    by_weights = torch.autograd.grad((signed * matrices[0]).sum(), x)[0]
    expected = torch.autograd.grad(loss(x, labels, **batch).sum(), x)[0]
    torch.testing.assert_close(by_weights, expected, rtol=1e-8, atol=1e-9)


def test_weights_of_a_loss_that_is_not_on_one_set_of_pairs() -> None:
    x, labels = make_rows(4, D), torch.tensor([0, 0, 1, 1])
    with pytest.raises(ValueError, match="got one that compares 0"):
        flashmetric.pair_weights(lambda x, labels: x.sum(), x, labels)
    with pytest.raises(ValueError, match="got one that compares 2"):
        flashmetric.pair_weights(
            lambda x, labels: F.nca_loss(x, labels) + F.nca_loss(x, labels), x, labels
        )


def test_weights_of_multi_similarity_are_those_of_the_paper() -> None:
    x, labels = make_rows(6, D), torch.tensor([0, 0, 0, 1, 1, 2])
    weights = flashmetric.pair_weights(flashmetric.MultiSimilarityLoss(beta=40.0), x, labels)
    unit = torch.nn.functional.normalize(x.detach())
    s = unit @ unit.T
    same = labels[:, None] == labels
    mask = same & ~torch.eye(6, dtype=torch.bool)
    pos = torch.where(mask, (-2 * (s - 0.5)).exp(), 0)
    neg = torch.where(same, 0, (40 * (s - 0.5)).exp())
    expected = (pos / (1 + pos.sum(1, True)) + neg / (1 + neg.sum(1, True))) / 6
    torch.testing.assert_close(weights, expected)


def test_half_precision_rows_without_gradients() -> None:
    x, labels = make_rows(6, D, torch.float16).detach(), torch.tensor([0, 0, 0, 1, 1, 2])
    with torch.no_grad():
        weights = flashmetric.pair_weights(flashmetric.NCALoss(), x, labels)
    assert weights.dtype == torch.float32 and weights.any() and not weights.diag().any()
