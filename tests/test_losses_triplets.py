# SPDX-License-Identifier: Apache-2.0
"""Triplet losses against loops over single triplets: values, gradients, labels, awkward batches."""

import math

import pytest
import torch
from torch import Tensor

from flashmetric.distances import SNR, LearnedMahalanobis
from flashmetric.functional import (
    lmnn_loss,
    triplet_margin_loss,
    triplet_quotient_loss,
    triplet_ratio_loss,
)
from flashmetric.functional.lmnn import target_neighbors
from flashmetric.labels import ignoring, multi_hot, two_level
from flashmetric.losses import LMNNLoss, TripletMarginLoss, TripletQuotientLoss, TripletRatioLoss
from loop_triplets import (
    FORMS,
    MINING,
    TYPES,
    batch,
    loop_all_triplets,
    loop_distances,
    loop_kinds,
    loop_lmnn,
    loop_mined,
    loop_quotient,
    loop_ratio,
    loop_triplet_margin,
)

DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot", "sqrt_cosine", "cityblock"]
REDUCTIONS = ["mean", "mean_nonzero", "sum", "none"]


def value_and_grads(loss, *rows, **options):
    leaves = [x.detach().clone().requires_grad_() for x in rows]
    value = loss(*leaves, **options)
    weight = torch.linspace(0.5, 1.5, value.numel(), dtype=value.dtype).view(value.shape)
    (value * weight).sum().backward()
    return [value.detach(), *(leaf.grad for leaf in leaves)]


def check(ours, loop, *rows: Tensor) -> None:
    """Both are functions of the rows."""
    for a, b in zip(value_and_grads(ours, *rows), value_and_grads(loop, *rows), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


def check_margin(x: Tensor, labels, ref_emb: Tensor | None = None, **options) -> None:
    rows = (x,) if ref_emb is None else (x, ref_emb)

    def given(function):
        def call(x, r=None):
            return function(x, labels, **options, **({} if r is None else {"ref_emb": r}))

        return call

    check(given(triplet_margin_loss), given(loop_triplet_margin), *rows)


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", MINING)
def test_mining(mining: str, distance: str, reduction: str) -> None:
    x, labels = batch()
    labels[4] = 9  # without positives
    check_margin(x, labels, mining=mining, distance=distance, reduction=reduction, margin=0.3)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("mining", MINING)
def test_forms_and_scale(mining: str, form: dict) -> None:
    x, labels = batch()
    for reduction in ("mean", "sum", "none"):
        check_margin(x, labels, mining=mining, **form, reduction=reduction, scale=0.5, margin=0.4)
    if form.get("smooth"):
        check_margin(x, labels, mining=mining, **form, reduction="mean_nonzero")


@pytest.mark.parametrize("margin", [0.5, 0.0, -0.3])
@pytest.mark.parametrize("type_of_triplets", TYPES)
def test_types_of_triplets(type_of_triplets: str, margin: float) -> None:
    x, labels = batch()
    if margin <= 0 and type_of_triplets in ("hard", "semihard"):
        # The loop's type asks for v <= 0 alone: of a margin below 0 only violating ones count.
        return
    for hinge in (True, False):
        for reduction in ("mean", "sum", "none") + (("mean_nonzero",) if hinge else ()):
            check_margin(
                x,
                labels,
                mining="batch_all",
                type_of_triplets=type_of_triplets,
                margin=margin,
                hinge=hinge,
                reduction=reduction,
            )


def test_types_partition_the_triplets_at_ties() -> None:
    # All distances are whole numbers: a negative as far as the positive, or exactly at the margin.
    x = torch.tensor([[0.0], [2.0], [2.0], [3.0], [-2.0], [-5.0]], dtype=torch.float64)
    labels = torch.tensor([0, 0, 1, 1, 2, 2])
    for type_of_triplets in TYPES:
        check_margin(
            x,
            labels,
            mining="batch_all",
            type_of_triplets=type_of_triplets,
            margin=1.0,
            reduction="mean",
        )
    collapsed = torch.ones(6, 2, dtype=torch.float64)
    check_margin(collapsed, labels, mining="batch_all", type_of_triplets="hard")


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("mining", MINING)
def test_references(mining: str, distance: str) -> None:
    (x, labels), (r, ref_labels) = batch(7), batch(10, classes=4, seed=1)
    check_margin(x, labels, r, ref_labels=ref_labels, mining=mining, distance=distance, margin=0.5)


@pytest.mark.parametrize("mining", [m for m in MINING if m != "batch_all"])
def test_swap(mining: str) -> None:
    x, labels = batch()
    (r, ref_labels) = batch(10, classes=4, seed=1)
    check_margin(x, labels, mining=mining, swap=True, margin=1.0)
    check_margin(x, labels, r, ref_labels=ref_labels, mining=mining, swap=True, margin=1.0)
    check_margin(x, ignoring(labels, 0), mining=mining, swap=True, margin=1.0)


@pytest.mark.parametrize("mining", ["batch_hard", "semi_hard", "semi_hard_anchor"])
@pytest.mark.parametrize("classes", [1, 4, 9])
def test_keep(mining: str, classes: int) -> None:
    x, labels = batch(9, classes=classes)
    for reduction in REDUCTIONS:
        check_margin(x, labels, mining=mining, empty="keep", margin=1.0, reduction=reduction)
        two = two_level(labels, torch.zeros_like(labels))  # not on the fused path
        check_margin(x, two, mining=mining, empty="keep", margin=1.0, reduction=reduction)


@pytest.mark.parametrize("mining", MINING)
@pytest.mark.parametrize("rule", ["ignoring", "any", "all", "sd", "da", "as"])
def test_label_rules(rule: str, mining: str) -> None:
    x, labels = batch(12)
    tags = torch.rand(12, 5) > 0.7
    groups = torch.randint(2, (12,))
    words = {"s": "same", "d": "different", "a": "any"}
    if rule == "ignoring":
        given = ignoring(labels, 2)
    elif rule in ("any", "all"):
        given = multi_hot(tags[:, :2] if rule == "all" else tags, rule)
    else:
        given = two_level(labels, groups, positives=words[rule[0]], negatives=words[rule[1]])
    for reduction in ("mean", "none"):
        check_margin(x, given, mining=mining, margin=0.7, reduction=reduction)


@pytest.mark.parametrize("mining", MINING)
def test_scaled_anchor(mining: str) -> None:
    (x, labels), (r, ref_labels) = batch(), batch(10, classes=4, seed=1)
    options = {"distance": "sqeuclidean", "margin": 1.0, "scale": 0.5, "anchor_scale": 2.0}
    check_margin(x, labels, mining=mining, **options)
    check_margin(x, labels, mining=mining, **options, normalize=True)
    check_margin(x, ignoring(labels, 1), mining=mining, **options)
    check_margin(x, labels, r, ref_labels=ref_labels, mining=mining, **options)


def test_scaled_anchor_by_hand() -> None:
    # Anchor a = p = n: the gradient does not vanish, it is what keeps rows from collapsing.
    x = torch.ones(3, 1, dtype=torch.float64, requires_grad=True)
    options = {"distance": "sqeuclidean", "margin": 1.0, "anchor_scale": 2.0}
    index = tuple(torch.tensor([k]) for k in range(3))
    loss = triplet_margin_loss(x, indices_tuple=index, **options)
    loss.backward()
    assert loss.item() == 1.0 and x.grad is not None
    # m + (2a - p)^2 - (2a - n)^2: 4 (n - p) = 0 in a, -2 (2a - p) in p, 2 (2a - n) in n.
    assert x.grad.flatten().tolist() == [0.0, -2.0, 2.0]
    with pytest.raises(ValueError, match="anchor_scale must be 1 with 'cosine'"):
        triplet_margin_loss(x, torch.tensor([0, 0, 1]), distance="cosine", anchor_scale=2.0)
    with pytest.raises(ValueError, match="labels must be one class per row with anchor_scale"):
        triplet_margin_loss(x, multi_hot(torch.eye(3)), anchor_scale=2.0)


@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_given_triplets(length: int, form: dict) -> None:
    x, labels = batch()
    kinds = loop_kinds(labels)
    triplets = torch.tensor(loop_all_triplets(kinds)).T
    given = tuple(triplets)
    if length == 4:
        masks = (torch.tensor([[j == kind for j in row] for row in kinds]) for kind in (0, 1))
        given = tuple(index for mask in masks for index in mask.nonzero().T)
    for reduction in ("mean", "sum"):
        options = {**form, "reduction": reduction, "margin": 0.4}
        check(
            lambda x, o=options: triplet_margin_loss(x, indices_tuple=given, **o),
            lambda x, o=options: loop_triplet_margin(x, labels, mining="batch_all", **o),
            x,
        )
    loss = triplet_margin_loss(x, indices_tuple=given, reduction="none")
    assert loss.shape == (triplets.shape[1],)


@pytest.mark.parametrize("mining", ["batch_all", "semi_hard"])
def test_max_positives(mining: str) -> None:
    x, labels = batch()
    enough = triplet_margin_loss(x, labels, mining=mining, max_positives=12)
    torch.testing.assert_close(enough, triplet_margin_loss(x, labels, mining=mining))
    # One positive, the farthest.
    one = triplet_margin_loss(x, labels, mining=mining, max_positives=1, reduction="none")
    d, kinds = loop_distances(x), loop_kinds(labels)
    hardest = {a: p for a, p, _ in loop_mined(d, kinds, "batch_hard")}
    found = loop_all_triplets(kinds) if mining == "batch_all" else loop_mined(d, kinds, mining)
    for a in range(len(x)):
        terms = [d[a][p] - d[a][n] + 0.2 for b, p, n in found if b == a and p == hardest[a]]
        torch.testing.assert_close(one[a], sum(term.relu() for term in terms))


def test_snr_triplets() -> None:
    x, labels = batch()
    centred = x - x.mean(1, keepdim=True)
    d = torch.cdist(centred, centred).square() / centred.square().sum(1, keepdim=True)
    d = d.tolist()
    for mining in ("batch_hard", "batch_all", "semi_hard", "easy_positive_semi_hard"):
        kinds = loop_kinds(labels)
        found = loop_all_triplets(kinds) if mining == "batch_all" else loop_mined(d, kinds, mining)
        found = [t for t in found if None not in t]
        expected = sum(max(d[a][p] - d[a][n] + 0.2, 0.0) for a, p, n in found) / len(found)
        loss = TripletMarginLoss.preset("snr", distance=SNR(normalize=False), mining=mining)
        assert loss(x, labels).item() == pytest.approx(expected, rel=1e-9)
    with pytest.raises(ValueError, match="swap must be False with a distance that is not symm"):
        TripletMarginLoss.preset("snr", swap=True)(x, labels)


def test_learned_distance_gets_gradients() -> None:
    x, labels = batch()
    metric = LearnedMahalanobis(4).double()
    for loss in (
        TripletMarginLoss(distance=metric, mining="batch_all", margin=1.0),
        TripletMarginLoss(distance=metric, margin=1.0),
        TripletRatioLoss(distance=metric),
        TripletQuotientLoss(distance=metric),
        LMNNLoss(distance=metric),
    ):
        metric.zero_grad()
        loss(x, labels).backward()
        assert metric.factor.grad is not None and metric.factor.grad.any()
        assert list(loss.parameters()) == [metric.factor]


PRESETS = {
    "tubui": lambda x, a, p, n: 0.5 * (1 + dd(x, a, p) - dd(x, a, n)).relu(),
    "tubui_scaled_anchor": lambda x, a, p, n: (
        0.5 * (1 + (2 * x[a] - x[p]).square().sum() - (2 * x[a] - x[n]).square().sum()).relu()
    ),
    "facenet": lambda x, a, p, n: (dd(un(x), a, p) - dd(un(x), a, n) + 0.2).relu(),
    "deep_ranking": lambda x, a, p, n: (1 + dd(x, a, p) - dd(x, a, n)).relu(),
    "sqrt_cosine": lambda x, a, p, n: (
        0.5 * (1 + co(x, a, p).sqrt().square() - co(x, a, n).sqrt().square()).relu()
    ),
    "wang_gupta": lambda x, a, p, n: (co(x, a, p) - co(x, a, n) + 0.5).relu(),
    "in_defense": lambda x, a, p, n: (eu(x, a, p) - eu(x, a, n) + 0.2).relu(),
    "in_defense_soft": lambda x, a, p, n: (eu(x, a, p) - eu(x, a, n)).exp().log1p(),
    "in_defense_none": lambda x, a, p, n: eu(x, a, p) - eu(x, a, n),
    "cosine_softplus": lambda x, a, p, n: (co(x, a, p) - co(x, a, n)).exp().log1p(),
    "l1": lambda x, a, p, n: (x[a] - x[p]).abs().sum() - (x[a] - x[n]).abs().sum() + 0.2,
}


def dd(x, i, j):
    return (x[i] - x[j]).square().sum()


def eu(x, i, j):
    return dd(x, i, j).sqrt()


def un(x):
    return x / x.norm(dim=1, keepdim=True)


def co(x, i, j):
    return 1 - torch.nn.functional.cosine_similarity(x[i], x[j], dim=0)


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    x, _ = batch()
    a, p, n = (torch.tensor([k]) for k in (0, 3, 8))
    check(
        lambda x: TripletMarginLoss.preset(name)(x, indices_tuple=(a, p, n)),
        lambda x: PRESETS[name](x, 0, 3, 8).relu() if name == "l1" else PRESETS[name](x, 0, 3, 8),
        x,
    )


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
@pytest.mark.parametrize("const", [1.0, 2.0])
def test_ratio(const: float, reduction: str) -> None:
    (x, labels), (r, ref_labels) = batch(), batch(10, classes=4, seed=1)
    options = {"const": const, "reduction": reduction}
    check(
        lambda x: triplet_ratio_loss(x, labels, **options),
        lambda x: loop_ratio(x, labels, **options),
        x,
    )
    options["ref_labels"] = ref_labels
    check(
        lambda x, r: triplet_ratio_loss(x, labels, ref_emb=r, **options),
        lambda x, r: loop_ratio(x, labels, ref_emb=r, **options),
        x,
        r,
    )


def test_ratio_of_given_triplets() -> None:
    x, labels = batch()
    triplets = tuple(torch.tensor(loop_all_triplets(loop_kinds(labels))).T)
    check(
        lambda x: triplet_ratio_loss(x, indices_tuple=triplets),
        lambda x: loop_ratio(x, labels),
        x,
    )
    # Far apart, nothing overflows; all equal, the loss is a quarter and its gradient 0.
    far = torch.tensor([[0.0], [1000.0], [1.0]], requires_grad=True)
    rows = triplet_ratio_loss(far, torch.tensor([0, 0, 1]), reduction="none")
    assert rows.tolist() == pytest.approx([1.0, (1 / (1 + math.exp(-1))) ** 2, 0.0])
    same = torch.ones(4, 2, requires_grad=True)
    loss = triplet_ratio_loss(same, torch.tensor([0, 0, 1, 1]))
    loss.backward()
    assert loss.item() == 0.25 and same.grad is not None and not same.grad.any()


@pytest.mark.parametrize("mining", [m for m in MINING if m != "batch_all"])
def test_quotient(mining: str) -> None:
    x, labels = batch()
    for reduction in ("mean", "sum", "none"):
        options = {"mining": mining, "reduction": reduction, "margin": 0.7}
        check(
            lambda x, o=options: triplet_quotient_loss(x, labels, **o),
            lambda x, o=options: loop_quotient(x, labels, **o),
            x,
        )


@pytest.mark.parametrize("k", [1, 2, 3, 9])
def test_lmnn(k: int) -> None:
    (x, labels), (r, ref_labels) = batch(classes=4), batch(10, classes=4, seed=1)
    targets = target_neighbors(x, labels, k)
    assert targets.shape == (13, k)
    for a, row in enumerate(targets.tolist()):
        near = sorted(
            (j for j in range(13) if j != a and labels[j] == labels[a]),
            key=lambda j, a=a: (dd(x, a, j).item(), j),
        )[:k]
        assert row == near + [-1] * (k - len(near))
    check(
        lambda x: lmnn_loss(x, labels, n_neighbors=k),
        lambda x: loop_lmnn(x, labels, targets.tolist()),
        x,
    )
    moved = torch.randn_like(x)
    check(
        lambda x: LMNNLoss(k, pull_weight=1.0, push_weight=0.3, margin=2.0)(
            x, labels, target_neighbors=targets
        ),
        lambda x: loop_lmnn(x, labels, targets.tolist(), weights=(1.0, 0.3), margin=2.0),
        moved,
    )
    found = target_neighbors(x, labels, k, ref_emb=r, ref_labels=ref_labels)
    check(
        lambda x, r: lmnn_loss(x, labels, n_neighbors=k, ref_emb=r, ref_labels=ref_labels),
        lambda x, r: loop_lmnn(x, labels, found.tolist(), ref_emb=r, ref_labels=ref_labels),
        x,
        r,
    )


def test_lmnn_of_given_pairs() -> None:
    x, labels = batch()
    kinds = torch.tensor([[-1 if k is None else k for k in row] for row in loop_kinds(labels)])
    pairs = tuple(index for k in (0, 1) for index in (kinds == k).nonzero().T)
    every = [[j for j, k in enumerate(row) if k == 0] for row in kinds.tolist()]
    check(lambda x: lmnn_loss(x, indices_tuple=pairs), lambda x: loop_lmnn(x, labels, every), x)
    rows = lmnn_loss(x, labels, reduction="none")
    torch.testing.assert_close(rows.sum(), lmnn_loss(x, labels))
    torch.testing.assert_close(rows.mean(), lmnn_loss(x, labels, reduction="mean"))
