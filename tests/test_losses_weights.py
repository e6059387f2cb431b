# SPDX-License-Identifier: Apache-2.0
"""Weights of positive pairs, margins of single triplets, scaled anchors in miners."""

import pytest
import torch
from torch import Tensor

import loop_pairwise as loop
from flashmetric import ContrastiveLoss, TripletMarginLoss, miners
from flashmetric import functional as F
from flashmetric.labels import Labels
from flashmetric.miners import TripletIndices
from flashmetric.reference import dense
from helpers import make_indices, make_labels, make_rows
from loop_pairwise import assert_same, value_and_grads


@pytest.mark.parametrize("reduction", ["mean", "mean_separate", "mean_nonzero", "sum", "none"])
@pytest.mark.parametrize("power", [1, 2])
@pytest.mark.parametrize("listed", [False, True])
def test_weights_of_positive_pairs(reduction: str, power: int, listed: bool) -> None:
    x, labels = make_rows(9, 4), make_labels(9, 3)
    weight = torch.linspace(0, 2, 9, dtype=torch.float64)
    indices = make_indices(4, (12, 9), 9, 9)
    pairs = loop.given_pairs(indices) if listed else loop.all_pairs(labels)
    batch = {"indices_tuple": indices} if listed else {"labels": labels}
    options = {"pos_margin": 0.2, "neg_margin": 2.0, "power": power, "reduction": reduction}

    def theirs(x: Tensor) -> Tensor:
        def of_pair(a: Tensor, b: Tensor, same: bool, anchor: int) -> Tensor:
            d = loop.euclidean(a, b)
            if same:
                return weight[anchor] * loop.positive_part(d - 0.2) ** power
            return loop.positive_part(2.0 - d) ** power

        return loop.add_up(x, pairs, loop.each(x, x, pairs, of_pair), reduction)

    def ours(x: Tensor) -> Tensor:
        return F.contrastive_loss(x, pos_weight=weight, **batch, **options)

    values = torch.ones(9, dtype=torch.float64) if reduction == "none" else torch.tensor(1.0)
    assert_same(
        value_and_grads(lambda x: (ours(x) * values).sum(), x),
        value_and_grads(lambda x: (theirs(x) * values).sum(), x),
    )
    assert ContrastiveLoss(**options)(x, pos_weight=weight, **batch).equal(ours(x))
    with dense():
        torch.testing.assert_close(
            ours(x), ContrastiveLoss(**options)(x, pos_weight=weight, **batch)
        )
    # A weight for all, of the positive pairs only.
    alike = F.contrastive_loss(x, pos_weight=torch.full((9,), 3.0), **batch, **options)
    torch.testing.assert_close(F.contrastive_loss(x, pos_weight=3, **batch, **options), alike)


def test_weight_messages() -> None:
    x, labels = make_rows(9, 4), make_labels(9, 3)
    for wrong, error, message in (
        (-1.0, ValueError, "pos_weight must be at least 0, got -1.0"),
        (-torch.ones(9), ValueError, "pos_weight must be at least 0, got -1.0"),
        (torch.ones(3), ValueError, r"pos_weight must be a number or have shape \[9\].*got \(3,\)"),
        (torch.ones(9).int(), TypeError, "pos_weight must be a floating-point tensor, got int32"),
        ("1", TypeError, "pos_weight must be a number, got str"),
    ):
        with pytest.raises(error, match=message):
            F.contrastive_loss(x, labels, pos_weight=wrong)


@pytest.mark.parametrize("reduction", ["mean", "mean_nonzero", "sum", "none"])
@pytest.mark.parametrize("smooth", [False, True])
def test_margins_of_single_triplets(reduction: str, smooth: bool) -> None:
    x = make_rows(9, 4)
    a, p, n, *_ = make_indices(3, (12, 9), 9, 9)
    margins = torch.linspace(-1, 2, len(a), dtype=torch.float64)

    def theirs(x: Tensor) -> Tensor:
        each = []
        for i, j, k, margin in zip(a.tolist(), p.tolist(), n.tolist(), margins, strict=True):
            v = loop.euclidean(x[i], x[j]) - loop.euclidean(x[i], x[k]) + margin
            each.append((1 + v.exp()).log() if smooth else v.clamp(min=0))
        each = torch.stack(each)
        if reduction == "none":
            return each
        return (
            each.sum() / {"mean": len(each), "mean_nonzero": (each > 0).sum(), "sum": 1}[reduction]
        )

    def ours(x: Tensor, indices: tuple[Tensor, ...] = (a, p, n)) -> Tensor:
        return F.triplet_margin_loss(
            x, margin=margins, smooth=smooth, reduction=reduction, indices_tuple=indices
        )

    assert_same(
        value_and_grads(lambda x: ours(x).sum(), x), value_and_grads(lambda x: theirs(x).sum(), x)
    )
    fixed = TripletIndices(a, p, n, torch.ones_like(a, dtype=torch.bool))
    torch.testing.assert_close(ours(x, fixed), ours(x))


def test_margin_messages() -> None:
    x, labels = make_rows(9, 4), make_labels(9, 3)
    a, p, n, *_ = make_indices(3, (12, 9), 9, 9)
    pairs = (a, p, a, n)
    for given, margin, error, message in (
        ({}, torch.ones(3), TypeError, "margin must be a number, got Tensor, which"),
        (
            {"indices_tuple": pairs},
            torch.ones(len(a)),
            TypeError,
            "margin must be a number",
        ),
        ({"indices_tuple": (a, p, n)}, torch.ones(3), ValueError, r"one per triplet; got \(3,\)"),
        ({"indices_tuple": (a, p, n)}, a, TypeError, "margin must be a floating-point tensor"),
    ):
        with pytest.raises(error, match=message):
            F.triplet_margin_loss(x, labels, margin=margin, **given)
    with pytest.raises(TypeError, match="margin must be a number, got Tensor"):
        TripletMarginLoss(torch.ones(3))


SCALED = [
    miners.BatchHardMiner,
    miners.SemiHardMiner,
    miners.BatchEasyHardMiner,
    miners.TripletMarginMiner,
    miners.TopRatioMiner,
    miners.FrackingMiner,
    miners.ClusterNegativeMiner,
    lambda **options: miners.MultiSimilarityMiner(distance="euclidean", **options),
]


@pytest.mark.parametrize("make", SCALED)
def test_scaled_anchors_in_miners(make: type[miners.Miner]) -> None:
    x, labels = make_rows(12, 4).detach(), make_labels(12, 3)
    ours = make(normalize=False, anchor_scale=2.0)(x, labels)
    plain = make(normalize=False)(x, labels)
    # With references no pair is excluded: each row is left out of its own.
    position = torch.arange(12)
    own = Labels(torch.stack((labels, position), 1), "group:da")
    theirs = make(normalize=False)(2 * x, own, x, own)
    for a, b in zip(ours, theirs, strict=True):
        assert a.equal(b)
    assert any(a.shape != b.shape or not a.equal(b) for a, b in zip(ours, plain, strict=True))
    random = miners.MarginViolationMiner(
        normalize=False, anchor_scale=2.0, generator=torch.Generator().manual_seed(0)
    )(x, labels)
    assert "anchor_scale=2.0" in repr(make(anchor_scale=2.0)) and len(random) == 3
