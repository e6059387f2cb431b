# SPDX-License-Identifier: Apache-2.0
"""NT-Xent, InfoNCE, SupCon, circle and image-text losses against loops over pairs."""

import math

import pytest
import torch

import flashmetric
from flashmetric import functional as F
from flashmetric.labels import ignoring, multi_hot, two_level
from helpers import make_indices, make_rows
from loop_softmax import (
    kinds_of_labels,
    loop_circle,
    loop_image_text,
    loop_ntxent,
    loop_sup_con,
    pairs_of_indices,
    pairs_of_kinds,
)


def ntxent(distance="cosine", reduction="mean"):
    options = {"temperature": 0.3, "distance": distance, "reduction": reduction}
    return F.ntxent_loss, loop_ntxent, options, {}


def info_nce(distance="cosine", reduction="mean"):
    options = {"temperature": 0.5, "distance": distance, "reduction": reduction}
    return F.info_nce_loss, loop_ntxent, options, {}


def sup_con_out(distance="cosine", reduction="mean"):
    options = {"temperature": 0.3, "distance": distance, "reduction": reduction}
    return F.sup_con_loss, loop_sup_con, options, {}


def sup_con_in(distance="cosine", reduction="mean"):
    function, loop, options, _ = sup_con_out(distance, reduction)
    return function, loop, {**options, "form": "in"}, {}


def circle(distance="cosine", reduction="mean"):
    return F.circle_loss, loop_circle, {"m": 0.3, "gamma": 16, "reduction": reduction}, {}


def image_text(distance="cosine", reduction="mean"):
    options = {"distance": distance, "reduction": reduction}
    scales = {"logit_scale": math.log(4.0)}, {"scale": 4.0}
    return F.image_text_loss, loop_image_text, options, scales


def image_text_in(distance="cosine", reduction="mean"):
    function, loop, options, scales = image_text(distance, reduction)
    return function, loop, {**options, "form": "in"}, scales


LOSSES = [ntxent, info_nce, sup_con_out, sup_con_in, circle, image_text, image_text_in]


def check(case, x, r, pairs, **call):
    """Value and gradients of a loss and of its loop."""
    function, loop, options, scales = case
    ours, theirs = scales if scales else ({}, {})
    leaves = [x] if r is None else [x, r]
    value = function(x, **options, **ours, **call)
    expected = loop(x, x if r is None else r, pairs, **options, **theirs)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)
    weight = torch.linspace(0.5, 1.5, max(value.numel(), 1), dtype=x.dtype)[: value.numel()]
    grads = torch.autograd.grad((value.flatten() * weight).sum(), leaves)
    truth = torch.autograd.grad((expected.flatten() * weight).sum(), leaves, allow_unused=True)
    for got, true, leaf in zip(grads, truth, leaves, strict=True):
        true = torch.zeros_like(leaf) if true is None else true
        torch.testing.assert_close(got, true, rtol=1e-8, atol=1e-10)


# A class of one and a class of its own, and classes of several rows.
LABELS = torch.tensor([2, 0, 0, 1, 2, 0, 5, 1, 2])
REF_LABELS = torch.tensor([0, 1, 2, 2, 9, 0, 1])


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("distance", ["cosine", "dot", "sqeuclidean", "euclidean"])
@pytest.mark.parametrize("refs", [False, True])
def test_value_and_gradient(make, distance, refs):
    if make is circle and distance != "cosine":
        pytest.skip("circle loss is one of cosines")
    x = make_rows(9, 4)
    r = make_rows(7, 4) if refs else None
    ref_labels = REF_LABELS if refs else None
    kinds = kinds_of_labels(LABELS.tolist(), REF_LABELS.tolist() if refs else None)
    call = {"labels": LABELS, "ref_emb": r, "ref_labels": ref_labels}
    check(make(distance), x, r, pairs_of_kinds(kinds), **call)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("refs", [False, True])
def test_reductions(make, reduction, refs):
    if reduction == "none" and make in (image_text, image_text_in):
        pytest.skip("two directions have no common anchors")
    x, r = make_rows(9, 4), make_rows(7, 4) if refs else None
    kinds = kinds_of_labels(LABELS.tolist(), REF_LABELS.tolist() if refs else None)
    call = {"labels": LABELS, "ref_emb": r, "ref_labels": REF_LABELS if refs else None}
    check(make(reduction=reduction), x, r, pairs_of_kinds(kinds), **call)


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("length", [3, 4])
@pytest.mark.parametrize("refs", [False, True])
def test_listed_pairs(make, length, refs):
    x, r = make_rows(8, 4), make_rows(6, 4) if refs else None
    indices = make_indices(length, (11, 13), 8, 6 if refs else 8)
    check(make(), x, r, pairs_of_indices(indices, 8), ref_emb=r, indices_tuple=indices)


def labels_multi_hot():
    tags = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 1, 0], [0, 0, 0], [0, 1, 1], [0, 0, 1]])
    kinds = [
        [None if i == j else bool((a * b).any()) for j, b in enumerate(tags)]
        for i, a in enumerate(tags)
    ]
    return multi_hot(tags), kinds


def labels_ignoring():
    labels = [4, 4, -1, 3, -1, 3]
    kinds = [
        [None if i == j or -1 in (a, b) else a == b for j, b in enumerate(labels)]
        for i, a in enumerate(labels)
    ]
    return ignoring(torch.tensor(labels)), kinds


def labels_two_level():
    classes, groups = [0, 0, 0, 1, 1, 2], [0, 1, 0, 1, 0, 0]
    kinds = [[None] * 6 for _ in range(6)]
    for i in range(6):
        for j in range(6):
            if i == j:
                continue
            if classes[i] == classes[j]:
                kinds[i][j] = True if groups[i] != groups[j] else None
            else:
                kinds[i][j] = False if groups[i] == groups[j] else None
    rule = {"positives": "different", "negatives": "same"}
    return two_level(torch.tensor(classes), torch.tensor(groups), **rule), kinds


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("rule", [labels_multi_hot, labels_ignoring, labels_two_level])
def test_rules_of_labels(make, rule):
    labels, kinds = rule()
    check(make(), make_rows(6, 4), None, pairs_of_kinds(kinds), labels=labels)


DEGENERATE = [
    torch.zeros(0, dtype=torch.int64),
    torch.tensor([3]),
    torch.tensor([3, 3]),
    torch.tensor([3, 4]),
    torch.zeros(6, dtype=torch.int64),
    torch.arange(6),
    torch.tensor([0, 0, 1]),
]


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("labels", DEGENERATE, ids=lambda labels: str(labels.tolist()))
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_degenerate_labels(make, labels, reduction):
    if reduction == "none" and (make in (image_text, image_text_in) or len(labels) == 0):
        pytest.skip("nothing to compare")
    x = make_rows(len(labels), 4)
    if len(labels) == 0:
        function, _, options, scales = make()
        value = function(x, labels, **options, **(scales[0] if scales else {}))
        assert value.item() == 0
        value.backward()
        return
    check(
        make(reduction=reduction),
        x,
        None,
        pairs_of_kinds(kinds_of_labels(labels.tolist())),
        labels=labels,
    )


@pytest.mark.parametrize("make", LOSSES)
@pytest.mark.parametrize("fill", [0.0, 0.7])
def test_rows_that_coincide(make, fill):
    x = torch.full((6, 3), fill, dtype=torch.float64, requires_grad=True)
    labels = torch.arange(6) // 2
    check(make(), x, None, pairs_of_kinds(kinds_of_labels(labels.tolist())), labels=labels)


@pytest.mark.parametrize(
    "make", [ntxent, info_nce, sup_con_out, sup_con_in, image_text, image_text_in]
)
def test_gradcheck(make):
    function, _, options, scales = make()
    ours = scales[0] if scales else {}
    x, r = make_rows(5, 3), make_rows(6, 3)
    labels, ref_labels = torch.tensor([0, 1, 1, 2, 0]), torch.tensor([0, 1, 2, 2, 0, 7])

    def loss(x, r):
        return function(x, labels, ref_emb=r, ref_labels=ref_labels, **options, **ours)

    assert torch.autograd.gradcheck(loss, (x, r))
    assert torch.autograd.gradcheck(lambda x: function(x, labels, **options, **ours), (x,))


@pytest.mark.parametrize("function", [F.ntxent_loss, F.info_nce_loss, F.sup_con_loss])
@pytest.mark.parametrize("options", [{}, {"form": "in"}])
@pytest.mark.parametrize("towers", [False, True])
@pytest.mark.parametrize("listed", [False, True])
def test_gradient_of_temperature(function, options, towers, listed):
    if options and function is not F.sup_con_loss:
        pytest.skip("only SupCon has two forms")
    if towers and (function is not F.info_nce_loss or listed):
        pytest.skip("only InfoNCE takes towers without labels")
    x, r = make_rows(5, 3).detach(), make_rows(6, 3).detach()
    t = torch.tensor(0.4, dtype=torch.float64, requires_grad=True)
    call = {"labels": torch.tensor([0, 1, 1, 2, 0])}
    if towers:
        call = {"ref_emb": r}
    if listed:
        call = {"indices_tuple": make_indices(4, (9, 11), 5, 5)}
    assert torch.autograd.gradcheck(lambda t: function(x, temperature=t, **options, **call), (t,))


@pytest.mark.parametrize("extra", [0, 3])
@pytest.mark.parametrize("distance", ["cosine", "dot", "sqeuclidean"])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_info_nce_of_towers_is_cross_entropy(extra, distance, reduction):
    x, r = make_rows(6, 4), make_rows(6 + extra, 4)
    kinds = [[i == j for j in range(6 + extra)] for i in range(6)]
    check(info_nce(distance, reduction), x, r, pairs_of_kinds(kinds), ref_emb=r)
    if distance == "dot":
        ours = F.info_nce_loss(x, ref_emb=r, distance="dot", reduction=reduction, temperature=0.5)
        logits, target = x @ r.T / 0.5, torch.arange(6)
        torch.testing.assert_close(
            ours, torch.nn.functional.cross_entropy(logits, target, reduction=reduction)
        )


def test_ntxent_of_two_views_is_simclr():
    a, b = make_rows(5, 4), make_rows(5, 4)
    x = torch.nn.functional.normalize(torch.cat((a, b)))
    logits = (x @ x.T / 0.2).fill_diagonal_(-torch.inf)
    theirs = torch.nn.functional.cross_entropy(logits, (torch.arange(10) + 5) % 10)
    labels = torch.arange(5).repeat(2)
    ours = F.ntxent_loss(torch.cat((a, b)), labels, temperature=0.2)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("form", ["out", "in"])
@pytest.mark.parametrize("extra", [0, 2])
def test_image_text_of_towers_is_cross_entropy_both_ways(form, extra):
    x, r = make_rows(6, 4), make_rows(6 + extra, 4)
    scale = torch.tensor(1.3, dtype=torch.float64, requires_grad=True)

    def clip(x, r, scale):
        logits = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(r).T
        logits, target = logits * scale.exp(), torch.arange(6)
        there = torch.nn.functional.cross_entropy(logits, target)
        return (there + torch.nn.functional.cross_entropy(logits.T[:6], target)) / 2

    ours = F.image_text_loss(x, ref_emb=r, logit_scale=scale, form=form)
    theirs = clip(x, r, scale)
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(
        torch.autograd.grad(ours, (x, r, scale)), torch.autograd.grad(theirs, (x, r, scale))
    )


@pytest.mark.parametrize("form", ["out", "in"])
def test_image_text_of_several_captions(form):
    images, texts = make_rows(4, 5), make_rows(9, 5)
    numbers = torch.tensor([0, 0, 1, 2, 2, 2, 3, 1, 8])
    kinds = [[i == j for j in numbers.tolist()] for i in range(4)]
    make = image_text_in if form == "in" else image_text
    call = {"labels": torch.arange(4), "ref_emb": texts, "ref_labels": numbers}
    check(make(), images, texts, pairs_of_kinds(kinds), **call)
    scale = torch.tensor(0.8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(
        lambda s: F.image_text_loss(images.detach(), logit_scale=s, form=form, **call), (scale,)
    )


def test_image_text_scale_has_a_limit():
    x, r = make_rows(4, 5), make_rows(4, 5)
    loss = flashmetric.ContrastiveImageTextLoss(temperature=0.001, max_scale=50).double()
    expected = F.image_text_loss(x, ref_emb=r, logit_scale=math.log(50))
    torch.testing.assert_close(loss(x, ref_emb=r), expected)
    loss(x, ref_emb=r).backward()
    # An optimiser that overshot the limit must find its way back.
    assert loss.logit_scale.grad != 0
    loss.clamp_()
    assert loss.logit_scale.item() == math.log(50)
    loss(x, ref_emb=r).backward()
    assert loss.logit_scale.grad != 0
    fixed = flashmetric.ContrastiveImageTextLoss(0.05, learn_temperature=False)
    assert not list(fixed.parameters())
    torch.testing.assert_close(
        fixed(x, ref_emb=r), F.image_text_loss(x, ref_emb=r, logit_scale=math.log(20))
    )


def test_learned_temperature_of_a_module():
    loss = flashmetric.InfoNCELoss(torch.nn.Parameter(torch.tensor(0.1)))
    x = make_rows(4, 3, torch.float32)
    loss(x, ref_emb=x.detach()).backward()
    assert [name for name, _ in loss.named_parameters()] == ["temperature"]
    assert loss.temperature.grad.isfinite() and loss.temperature.grad != 0


@pytest.mark.parametrize("function", [F.info_nce_loss, F.image_text_loss, F.n_pairs_loss])
def test_towers_that_do_not_fit(function):
    with pytest.raises(ValueError, match="ref_emb must have a row for each"):
        function(make_rows(4, 3), ref_emb=make_rows(3, 3))
    with pytest.raises(ValueError, match="ref_emb, .*must be given unless labels"):
        function(make_rows(4, 3))


@pytest.mark.parametrize("temperature", [0, -1.0, math.nan, "warm", torch.ones(2)])
@pytest.mark.parametrize("function", [F.ntxent_loss, F.info_nce_loss, F.sup_con_loss])
def test_wrong_temperature(function, temperature):
    with pytest.raises((TypeError, ValueError), match="temperature must be"):
        function(make_rows(4, 3), torch.zeros(4).long(), temperature=temperature)


def test_wrong_options():
    x, labels = make_rows(4, 3), torch.zeros(4).long()
    with pytest.raises(ValueError, match="form must be one of 'out', 'in'"):
        F.sup_con_loss(x, labels, form="both")
    with pytest.raises(ValueError, match="gamma must be above 0"):
        F.circle_loss(x, labels, gamma=0)
    with pytest.raises(ValueError, match="reduction must be one of"):
        F.image_text_loss(x, labels, reduction="none")
    with pytest.raises(ValueError, match="symmetric"):
        F.image_text_loss(x, ref_emb=x, distance=flashmetric.distances.SNR())


def test_extreme_temperature_in_float32():
    x = make_rows(40, 8, torch.float32)
    labels = torch.arange(40) // 2
    for function in (F.ntxent_loss, F.sup_con_loss, F.info_nce_loss):
        loss = function(x, labels, temperature=1e-3)
        wide = function(x.double(), labels, temperature=1e-3)
        torch.testing.assert_close(loss.double(), wide, rtol=1e-4, atol=1e-3)
        assert torch.autograd.grad(loss, x)[0].isfinite().all()
    loss = F.circle_loss(x, labels, gamma=2048)
    assert loss.isfinite() and torch.autograd.grad(loss, x)[0].isfinite().all()
