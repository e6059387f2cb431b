# SPDX-License-Identifier: Apache-2.0
"""Losses on statistics of each anchor's pairs against pytorch-metric-learning 2.9."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

import flashmetric as fm
from helpers import make_labels, make_rows

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import losses, miners, reducers  # noqa: E402
from pytorch_metric_learning.distances import LpDistance  # noqa: E402

LABELS = torch.tensor([0, 0, 0, 1, 1, 2, 2, 2, 2, 3, 3, 1])


def value_and_grad(loss: Callable[[Tensor], Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.detach().requires_grad_()
    value = loss(x)
    return value, torch.autograd.grad(value, x)[0]


def assert_same(ours: Callable[..., Tensor], theirs: Callable[..., Tensor], x: Tensor) -> None:
    for got, expected in zip(value_and_grad(ours, x), value_and_grad(theirs, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-10)


AGREEING = [
    (fm.MultiSimilarityLoss.preset("pml"), losses.MultiSimilarityLoss()),
    (fm.MultiSimilarityLoss(3.0, beta=20.0, base=0.3), losses.MultiSimilarityLoss(3, 20, 0.3)),
    (fm.LiftedStructureLoss.preset("pml"), losses.LiftedStructureLoss()),
    (
        fm.LiftedStructureLoss.preset("pml", neg_margin=0.7, pos_margin=0.1),
        losses.LiftedStructureLoss(neg_margin=0.7, pos_margin=0.1),
    ),
    (fm.GeneralizedLiftedStructureLoss.preset("pml"), losses.GeneralizedLiftedStructureLoss()),
    (fm.NCALoss.preset("pml", softmax_scale=3.0), losses.NCALoss(softmax_scale=3)),
    (fm.FastAPLoss(), losses.FastAPLoss()),
    (fm.FastAPLoss(27), losses.FastAPLoss(27)),
]


@pytest.mark.parametrize(("ours", "theirs"), AGREEING, ids=lambda loss: type(loss).__name__)
def test_same_loss(ours, theirs) -> None:
    x = make_rows(12, 4)
    assert_same(lambda x: ours(x, LABELS), lambda x: theirs(x, LABELS), x)
    refs, ref_labels = make_rows(9, 4).detach(), make_labels(9)
    if isinstance(ours, (fm.FastAPLoss, fm.LiftedStructureLoss)):
        return  # they support no references, or get them wrong, see below
    ref_labels[:4] = torch.arange(4)  # every anchor has a positive
    batch = {"ref_emb": refs, "ref_labels": ref_labels}
    assert_same(lambda x: ours(x, LABELS, **batch), lambda x: theirs(x, LABELS, **batch), x)


def test_same_mined_multi_similarity() -> None:
    x = make_rows(12, 4)
    for epsilon in (0.1, -0.3):
        ours = fm.MultiSimilarityLoss(mining=True, epsilon=epsilon)
        miner, theirs = miners.MultiSimilarityMiner(epsilon), losses.MultiSimilarityLoss()
        assert_same(
            lambda x, ours=ours: ours(x, LABELS),
            lambda x, miner=miner, theirs=theirs: theirs(x, LABELS, miner(x, LABELS)),
            x,
        )


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [pair for pair in AGREEING if "FastAP" not in str(pair[1]) and "NCA" not in str(pair[1])],
    ids=lambda loss: type(loss).__name__,
)
def test_same_on_pairs_of_their_miners(ours, theirs) -> None:
    x = make_rows(12, 4)
    indices = miners.PairMarginMiner(pos_margin=0.5, neg_margin=1.5)(x.detach(), LABELS)
    if "Generalized" in type(ours).__name__:
        indices = miners.PairMarginMiner(pos_margin=-1, neg_margin=3)(x.detach(), LABELS)
    ours_given, theirs_given = (
        lambda x, loss=loss: loss(x, LABELS, indices_tuple=indices) for loss in (ours, theirs)
    )
    assert_same(ours_given, theirs_given, x)


def test_same_ranked_list_but_for_their_offsets() -> None:
    x = make_rows(12, 4)
    options = {"margin": 0.4, "imbalance": 0.4, "alpha": 1.2}
    ours = fm.RankedListLoss(neg_temperature=3.0, pos_temperature=1.0, **options)
    theirs = losses.RankedListLoss(Tn=3, Tp=1, **options)
    values = [loss(x, LABELS) for loss in (ours, theirs)]
    # 1e-5 per row of the batch in each divisor, kept pairs or not.
    torch.testing.assert_close(*values, rtol=1e-3, atol=0)
    assert values[1] < values[0]
    # Their weights are part of the gradient; ours are constants, as in the authors' formula.
    grads = [torch.autograd.grad(value, x)[0] for value in values]
    assert not torch.allclose(*grads, rtol=1e-2)


def test_ranked_list_gradients_agree_without_temperature() -> None:
    x = make_rows(12, 4)
    ours = fm.RankedListLoss(neg_temperature=0.0)
    theirs = losses.RankedListLoss(margin=0.4, Tn=0)
    grads = [torch.autograd.grad(loss(x, LABELS), x)[0] for loss in (ours, theirs)]
    torch.testing.assert_close(*grads, rtol=1e-3, atol=1e-6)


def test_ranked_list_coinciding_negatives_count_here() -> None:
    # Their test of which negatives are inside the margin is whether a distance is above 0.
    x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0], [0.0, 1.0]], dtype=torch.float64)
    labels = torch.tensor([0, 1, 1, 0])
    ours = fm.RankedListLoss(imbalance=1.0, neg_temperature=1.0)(x, labels)
    theirs = losses.RankedListLoss(margin=0.4, Tn=1, imbalance=1.0)(x, labels)
    torch.testing.assert_close(ours.item(), 1.2)
    assert theirs == 0


def test_anchors_without_a_kind_of_pairs() -> None:
    x = make_rows(6, 4)
    unique, single = torch.arange(6), torch.zeros(6, dtype=torch.int64)
    # They take a log-sum-exp of nothing for 0, a loss that moves nothing to where it should be.
    theirs = losses.GeneralizedLiftedStructureLoss()
    for labels in (unique, single):
        assert theirs(x, labels) > 0
        assert fm.GeneralizedLiftedStructureLoss.preset("pml")(x, labels) == 0
    # Multi-similarity: the other half of the loss stays, in both.
    for labels in (unique, single):
        torch.testing.assert_close(
            fm.MultiSimilarityLoss()(x, labels), losses.MultiSimilarityLoss()(x, labels)
        )
    # Ranked list: they keep the other half, and divide by all anchors.
    assert losses.RankedListLoss(margin=0.4, Tn=1)(x, single) > 0
    assert fm.RankedListLoss(neg_temperature=1.0)(x, single) == 0


def test_lifted_structure_with_references() -> None:
    # They compare numbers of anchors with numbers of references: a reference has the negatives of
    # the anchor that happens to have its number. Here it has none.
    x, refs = make_rows(4, 3).detach(), make_rows(4, 3).detach()
    labels, ref_labels = torch.tensor([0, 0, 1, 1]), torch.tensor([1, 0, 0, 1])
    ours, theirs = fm.LiftedStructureLoss.preset("pml"), losses.LiftedStructureLoss()
    order = torch.tensor([3, 0, 1, 2])
    values = [
        [loss(x, labels, ref_emb=refs[at], ref_labels=ref_labels[at]) for at in (order, order * 0)]
        for loss in (ours, theirs)
    ]
    shuffled = [
        loss(x, labels, ref_emb=refs[torch.arange(4).flip(0)], ref_labels=ref_labels.flip(0))
        for loss in (ours, theirs)
    ]
    plain = [loss(x, labels, ref_emb=refs, ref_labels=ref_labels) for loss in (ours, theirs)]
    torch.testing.assert_close(plain[0], shuffled[0])
    assert not torch.allclose(plain[1], shuffled[1])
    assert values[0][0].isfinite()


def test_their_nca_drops_anchors_that_underflow() -> None:
    x = torch.tensor([[0.0], [40.0], [1.0], [41.0]])
    labels = torch.tensor([0, 0, 1, 1])
    theirs = losses.NCALoss(distance=LpDistance(normalize_embeddings=False, power=2))
    assert theirs(x, labels).isnan()  # the mean of none
    torch.testing.assert_close(fm.NCALoss()(x, labels).item(), 1599.5, rtol=1e-2, atol=0)


def test_reductions() -> None:
    x = make_rows(12, 4)
    for reduction, reducer in (
        ("sum", reducers.SumReducer()),
        ("mean_nonzero", reducers.AvgNonZeroReducer()),
    ):
        ours = fm.GeneralizedLiftedStructureLoss.preset("pml", reduction=reduction, neg_margin=-2.0)
        theirs = losses.GeneralizedLiftedStructureLoss(neg_margin=-2, reducer=reducer)
        torch.testing.assert_close(ours(x, LABELS), theirs(x, LABELS))
