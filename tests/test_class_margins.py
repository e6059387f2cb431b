# SPDX-License-Identifier: Apache-2.0
"""Triplets of a whole batch whose margins depend on the classes of anchor and negative."""

import pytest
import torch
from torch import Tensor

from flashmetric import TripletMarginLoss, reference
from flashmetric.functional import triplet_margin_loss
from flashmetric.labels import ignoring

CLASSES = 5


def loop(
    x: Tensor, labels: Tensor, r: Tensor, refs: Tensor, margins: Tensor, form: str, alone: bool
) -> tuple[Tensor, int, int]:
    """Sum, number of triplets and of those above 0, from the formula."""
    total, triplets, active = x.new_zeros(()), 0, 0
    d = (x.unsqueeze(1) - r.unsqueeze(0)).square().sum(2)
    for a in range(len(x)):
        for p in range(len(r)):
            if refs[p] != labels[a] or (alone and p == a):
                continue
            for n in range(len(r)):
                if refs[n] == labels[a]:
                    continue
                v = d[a, p] - d[a, n] + margins[labels[a], refs[n]]
                if form == "softplus":
                    v = torch.nn.functional.softplus(v)
                elif form == "hinge":
                    v = v.relu()
                total = total + v
                triplets += 1
                active += int(v > 0)
    return total, triplets, active


@pytest.mark.parametrize("alone", [True, False])
@pytest.mark.parametrize("form", ["hinge", "softplus", "linear"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_against_a_loop(form: str, reduction: str, alone: bool) -> None:
    x = torch.randn(17, 4, dtype=torch.float64, requires_grad=True)
    r = x if alone else torch.randn(13, 4, dtype=torch.float64, requires_grad=True)
    labels = torch.randint(CLASSES, (17,))
    refs = labels if alone else torch.randint(CLASSES, (13,))
    margins = (3 * torch.randn(CLASSES, CLASSES, dtype=torch.float64)).requires_grad_()
    inputs = (x, margins) if alone else (x, r, margins)
    total, triplets, _ = loop(x, labels, r, refs, margins, form, alone)
    expected = total / triplets if reduction == "mean" else total
    loss = triplet_margin_loss(
        x,
        labels,
        margin=margins,
        distance="sqeuclidean",
        mining="batch_all",
        smooth=form == "softplus",
        hinge=form != "linear",
        reduction=reduction,
        ref_emb=None if alone else r,
        ref_labels=None if alone else refs,
    )
    torch.testing.assert_close(loss, expected)
    for mine, theirs in zip(
        torch.autograd.grad(loss, inputs), torch.autograd.grad(expected, inputs), strict=True
    ):
        torch.testing.assert_close(mine, theirs)


def test_mean_over_the_triplets_with_a_loss() -> None:
    x, labels = torch.randn(20, 3, dtype=torch.float64), torch.randint(CLASSES, (20,))
    margins = torch.randn(CLASSES, CLASSES, dtype=torch.float64)
    total, _, active = loop(x, labels, x, labels, margins, "hinge", True)
    module = TripletMarginLoss(
        margins, distance="sqeuclidean", mining="batch_all", reduction="mean_nonzero"
    )
    torch.testing.assert_close(module(x, labels), total / active)
    assert "margin" in module.state_dict()
    with reference.dense():
        torch.testing.assert_close(module(x, labels), total / active)


def test_equal_margins_are_a_margin() -> None:
    x, labels = torch.randn(300, 8), torch.randint(9, (300,))
    options = {"mining": "batch_all", "normalize": True, "reduction": "mean_nonzero"}
    margins = torch.full((9, 9), 0.3)
    expected = triplet_margin_loss(x, labels, margin=0.3, **options)
    torch.testing.assert_close(triplet_margin_loss(x, labels, margin=margins, **options), expected)


def test_ignored_rows_and_absent_classes() -> None:
    x, labels = torch.randn(12, 3), torch.tensor([0, 0, 0, 2, 2, 2, 2, 2, 0, 0, 2, 0])
    margins = torch.rand(4, 4)
    out = torch.zeros(12, dtype=torch.bool)
    out[2:5] = True
    options = {"mining": "batch_all", "reduction": "sum"}
    torch.testing.assert_close(
        triplet_margin_loss(x, ignoring(labels, rows=out), margin=margins, **options),
        triplet_margin_loss(x[~out], labels[~out], margin=margins, **options),
    )
    alone = x[:1].requires_grad_()
    loss = triplet_margin_loss(alone, labels[:1], margin=margins, **options)
    loss.backward()
    assert loss == 0 and alone.grad is not None and not alone.grad.any()


def test_margins_of_absent_classes_get_zeros() -> None:
    margins = torch.rand(2, 2, requires_grad=True)
    nowhere = ignoring(torch.full((4,), -1))
    triplet_margin_loss(torch.randn(4, 3), nowhere, margin=margins, mining="batch_all").backward()
    assert margins.grad is not None and not margins.grad.any()


def test_a_learned_margin_moves_with_the_module() -> None:
    module = TripletMarginLoss(torch.nn.Parameter(torch.zeros(3, 3)), mining="batch_all")
    x, labels = torch.randn(9, 2), torch.arange(9) % 3
    module(x, labels).backward()
    margin = module.margin
    assert margin.grad is not None and not margin.grad.diagonal().any() and margin.grad.any()
    assert module.double().margin.dtype == torch.float64


@pytest.mark.parametrize(
    "margin, labels, options, message",
    [
        (torch.zeros(3, 2), [0, 1], {}, r"shape is \(3, 2\)"),
        (torch.zeros(2, 2, dtype=torch.int64), [0, 1], {}, "floating-point"),
        (torch.zeros(2, 2), [0, 2], {}, r"0 \.\.\. 1.*got 2"),
        (torch.zeros(2, 2), [-1, 1], {}, "got -1"),
        (torch.zeros(2, 2), [0, 1], {"mining": "batch_hard"}, "'batch_hard'"),
        (torch.zeros(2, 2), [0, 1], {"type_of_triplets": "hard"}, "'hard'"),
    ],
)
def test_errors(margin: Tensor, labels: list[int], options: dict[str, str], message: str) -> None:
    options = {"mining": "batch_all", **options}
    with pytest.raises((TypeError, ValueError), match=message):
        triplet_margin_loss(torch.randn(2, 2), torch.tensor(labels), margin=margin, **options)
