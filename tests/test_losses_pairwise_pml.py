# SPDX-License-Identifier: Apache-2.0
"""The margin and SNR losses against pytorch-metric-learning 2.9, and where they disagree."""

import pytest
import torch

import flashmetric
from flashmetric import MarginLoss, SNRContrastiveLoss
from flashmetric.distances import SNR
from presets import assert_same, labelled_rows, value_and_grads

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import losses, miners  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils  # noqa: E402

SIZES = (20, 40)
# The peer keeps it in float32 for float64 rows too: a number that both hold exactly.
BETA = 1.25


def all_triplets(labels):
    return loss_and_miner_utils.get_all_triplets_indices(labels)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_margin_over_triplets(n, dtype):
    x, labels = labelled_rows(n, 6, 4, dtype)
    triplets = all_triplets(labels)
    assert_same(
        value_and_grads(lambda x: MarginLoss(beta=BETA)(x, labels, indices_tuple=triplets), x),
        value_and_grads(lambda x: losses.MarginLoss(beta=BETA)(x, labels), x),
    )


def test_margin_over_mined_triplets():
    x, labels = labelled_rows(20, 6, 4)
    torch.manual_seed(0)
    triplets = miners.DistanceWeightedMiner()(x, labels)
    assert len(triplets[0])
    assert_same(
        value_and_grads(lambda x: MarginLoss(beta=BETA)(x, labels, indices_tuple=triplets), x),
        value_and_grads(lambda x: losses.MarginLoss(beta=BETA)(x, labels, triplets), x),
    )


def test_margin_with_learned_boundaries():
    x, labels = labelled_rows(20, 6, 4)
    triplets = all_triplets(labels)
    for classes in (None, 4):
        ours = MarginLoss(learn_beta=True, num_classes=classes).double()
        theirs = losses.MarginLoss(learn_beta=True, num_classes=classes).double()
        ours(x, labels, indices_tuple=triplets).backward()
        theirs(x, labels).backward()
        torch.testing.assert_close(ours.beta.grad.view(-1), theirs.beta.grad)


def test_regulariser_of_one_boundary():
    x, labels = labelled_rows(20, 6, 4)
    ours = MarginLoss(learn_beta=True, nu=0.3).double()
    theirs = losses.MarginLoss(learn_beta=True, nu=0.3).double()
    a = ours(x, labels, indices_tuple=all_triplets(labels))
    b = theirs(x, labels)
    torch.testing.assert_close(a.view(-1), b.view(-1))
    a.sum().backward(), b.sum().backward()
    torch.testing.assert_close(ours.beta.grad.view(-1), theirs.beta.grad)


def test_disagreement_margin_over_all_pairs():
    """All triplets count a positive pair once per negative: another mean."""
    x, labels = labelled_rows(20, 6, 4)
    ours, theirs = MarginLoss()(x, labels), losses.MarginLoss()(x, labels)
    assert abs(ours - theirs) > 0.01


def test_disagreement_regulariser_of_boundaries_per_class():
    """The peer divides the sum of beta over triplets by the number of active pairs."""
    x, labels = labelled_rows(20, 6, 4)
    plain = MarginLoss(learn_beta=True, num_classes=4).double()
    ours = MarginLoss(learn_beta=True, num_classes=4, nu=0.3).double()
    torch.testing.assert_close(ours(x, labels) - plain(x, labels), torch.tensor(0.36).double())
    plain, theirs = (
        losses.MarginLoss(learn_beta=True, num_classes=4, nu=nu).double() for nu in (0.0, 0.3)
    )
    assert abs(theirs(x, labels) - plain(x, labels) - 0.36) > 0.01


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("margins", [(0.0, 1.0), (0.3, 2.2)])
def test_snr(n, dtype, margins):
    x, labels = labelled_rows(n, 6, 4, dtype)
    ours = SNRContrastiveLoss.preset("pml", pos_margin=margins[0], neg_margin=margins[1])
    theirs = losses.SignalToNoiseRatioContrastiveLoss(pos_margin=margins[0], neg_margin=margins[1])
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(lambda x: theirs(x, labels), x),
    )


def test_snr_with_references():
    x, labels = labelled_rows(12, 6, 4)
    r, ref_labels = labelled_rows(20, 6, 4, seed=1)
    ours, theirs = SNRContrastiveLoss.preset("pml"), losses.SignalToNoiseRatioContrastiveLoss()
    assert_same(
        value_and_grads(lambda x, r: ours(x, labels, ref_emb=r, ref_labels=ref_labels), x, r),
        value_and_grads(lambda x, r: theirs(x, labels, ref_emb=r, ref_labels=ref_labels), x, r),
    )


def test_disagreement_snr_of_a_constant_row():
    x, labels = labelled_rows(12, 6, 4)
    x[3] = 0.7
    value, grad = value_and_grads(lambda x: SNRContrastiveLoss()(x, labels), x)
    assert value.isfinite() and grad.isfinite().all()
    value, grad = value_and_grads(
        lambda x: losses.SignalToNoiseRatioContrastiveLoss()(x, labels), x
    )
    assert not (value.isfinite() and grad.isfinite().all())


def test_disagreement_snr_regulariser():
    x, labels = labelled_rows(12, 6, 4)
    unit = torch.nn.functional.normalize(x)
    torch.testing.assert_close(
        SNRContrastiveLoss()(x, labels) - losses.SignalToNoiseRatioContrastiveLoss()(x, labels),
        0.005 * unit.sum(1).abs().mean(),
    )


@pytest.mark.parametrize("constant", [0.1, 0.3, 3.3])
@pytest.mark.parametrize("d", [7, 128, 1000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_snr_of_a_constant_row_is_zero(constant, d, dtype):
    """The mean of equal numbers is rounded: what that leaves is no variance."""
    x = torch.randn(8, d, dtype=dtype)
    x[0] = constant
    x.requires_grad_()
    for normalize in (False, True):
        x.grad = None
        loss = flashmetric.TripletMarginLoss(distance=SNR(normalize), reduction="none")
        values = loss(x, torch.arange(8) // 2)
        values.sum().backward()
        assert values.max() < 100 and x.grad.isfinite().all() and x.grad.abs().max() < 1e3
