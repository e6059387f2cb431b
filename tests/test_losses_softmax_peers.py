# SPDX-License-Identifier: Apache-2.0
"""The softmax losses against pytorch-metric-learning 2.9, and every known disagreement."""

import pytest
import torch

import flashmetric
from flashmetric import functional as F
from presets import assert_same, labelled_rows, value_and_grads

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import distances, losses, miners  # noqa: E402


def peer_circle(**options):
    """The peer's loss without the threshold that makes its softplus approximate."""
    loss = losses.CircleLoss(**options)
    loss.soft_plus = torch.nn.Softplus(threshold=700)
    return loss


SAME = [
    (flashmetric.NTXentLoss(0.2), losses.NTXentLoss(temperature=0.2)),
    (flashmetric.NTXentLoss(), losses.NTXentLoss()),
    (flashmetric.InfoNCELoss(), losses.NTXentLoss()),
    (
        flashmetric.NTXentLoss(0.5, distance="euclidean", normalize=True),
        losses.NTXentLoss(temperature=0.5, distance=distances.LpDistance()),
    ),
    (flashmetric.SupConLoss(), losses.SupConLoss()),
    (
        flashmetric.SupConLoss(2.0, distance="dot"),
        losses.SupConLoss(
            temperature=2.0, distance=distances.DotProductSimilarity(normalize_embeddings=False)
        ),
    ),
    (flashmetric.CircleLoss(), peer_circle()),
    (flashmetric.CircleLoss(0.25, 32), peer_circle(m=0.25, gamma=32)),
]


@pytest.mark.parametrize(("ours", "theirs"), SAME, ids=lambda loss: type(loss).__name__)
@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("lone", [False, True])
def test_same(ours, theirs, refs, lone):
    x, labels = labelled_rows(20, 6, 4)
    if lone:
        labels[0] = 77  # an anchor without a positive
    if not refs:
        assert_same(
            value_and_grads(lambda x: ours(x, labels), x),
            value_and_grads(lambda x: theirs(x, labels), x),
        )
        return
    r, ref_labels = labelled_rows(15, 6, 5, seed=1)
    assert_same(
        value_and_grads(lambda x, r: ours(x, labels, ref_emb=r, ref_labels=ref_labels), x, r),
        value_and_grads(lambda x, r: theirs(x, labels, ref_emb=r, ref_labels=ref_labels), x, r),
    )


@pytest.mark.parametrize(("ours", "theirs"), SAME, ids=lambda loss: type(loss).__name__)
def test_same_with_a_miner(ours, theirs):
    x, labels = labelled_rows(20, 6, 4)
    mined = miners.MultiSimilarityMiner(epsilon=0.0)(x, labels)
    # Some anchors have mined positives only.
    mined = (*mined[:2], mined[2][3:], mined[3][3:])
    assert_same(
        value_and_grads(lambda x: ours(x, indices_tuple=mined), x),
        value_and_grads(lambda x: theirs(x, labels, mined), x),
    )


def test_n_pairs():
    x, labels = labelled_rows(20, 6, 4)
    labels[0] = 77
    distance = distances.DotProductSimilarity(normalize_embeddings=False)
    theirs = losses.NPairsLoss(distance=distance)
    ours = flashmetric.NPairsLoss()
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(lambda x: theirs(x, labels), x),
    )
    # The peer's default normalises rows, in spite of the paper.
    preset = flashmetric.NPairsLoss.preset("pml")
    assert_same(
        value_and_grads(lambda x: preset(x, labels), x),
        value_and_grads(lambda x: losses.NPairsLoss()(x, labels), x),
    )
    mined = miners.MultiSimilarityMiner()(x, labels)
    assert_same(
        value_and_grads(lambda x: ours(x, labels, indices_tuple=mined), x),
        value_and_grads(lambda x: theirs(x, labels, mined), x),
    )


@pytest.mark.parametrize("refs", [False, True])
def test_angular_of_unit_rows(refs):
    x, labels = labelled_rows(20, 6, 4)
    x = torch.nn.functional.normalize(x)
    r, ref_labels = labelled_rows(15, 6, 5, seed=1)
    r = torch.nn.functional.normalize(r)
    where = {"ref_emb": r, "ref_labels": ref_labels} if refs else {}
    ours = flashmetric.AngularLoss.preset("pml")(x, labels, **where)
    torch.testing.assert_close(ours, losses.AngularLoss()(x, labels, **where))
    mined = miners.MultiSimilarityMiner()(x, labels)
    ours = flashmetric.AngularLoss.preset("pml")(x, labels, indices_tuple=mined)
    torch.testing.assert_close(ours, losses.AngularLoss()(x, labels, mined))


def test_angular_of_other_rows_disagrees():
    """The peer normalises anchors and positives, but not the negatives."""
    x, labels = labelled_rows(20, 6, 4)
    ours = flashmetric.AngularLoss.preset("pml")
    torch.testing.assert_close(ours(10 * x, labels), ours(x, labels))
    peer = losses.AngularLoss()
    assert peer(10 * x, labels) > 3 * peer(x, labels) > 3 * ours(x, labels)


def test_sup_con_of_one_class_disagrees():
    """The peer is 0 where no row has a negative, the paper's formula is not."""
    x = labelled_rows(6, 4, 1)[0]
    labels = torch.zeros(6).long()
    assert losses.SupConLoss()(x, labels) == 0
    s = torch.nn.functional.normalize(x) @ torch.nn.functional.normalize(x).T / 0.1
    s.fill_diagonal_(-torch.inf)
    share = s.log_softmax(1).fill_diagonal_(0).sum(1) / 5
    torch.testing.assert_close(flashmetric.SupConLoss()(x, labels), -share.mean())


def test_ntxent_of_hopeless_pairs_disagrees():
    """The peer adds the smallest number inside the logarithm, which bounds loss and gradient."""
    x = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [1.0, 0.0]]).double().requires_grad_()
    labels = torch.tensor([0, 0, 1])
    ours = F.ntxent_loss(x, labels, temperature=1e-3)
    torch.testing.assert_close(ours, ours.new_tensor((2000 + 0.0) / 2), rtol=1e-3, atol=1)
    assert losses.NTXentLoss(temperature=1e-3)(x, labels) < 800


@pytest.mark.parametrize("per_class", [1, 3])
def test_soft_triple(per_class):
    x, labels = labelled_rows(20, 6, 4)
    theirs = losses.SoftTripleLoss(4, 6, centers_per_class=per_class).double()
    ours = flashmetric.SoftTripletLoss(4, 6, centers_per_class=per_class, tau=0.0).double()
    with torch.no_grad():
        ours.centers.copy_(theirs.fc.T.view(4, per_class, 6))
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(lambda x: theirs(x, labels), x),
    )
    assert_same(ours.centers.grad, theirs.fc.grad.T.reshape(4, per_class, 6))
