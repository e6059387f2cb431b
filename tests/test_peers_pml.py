# SPDX-License-Identifier: Apache-2.0
"""The "pml" presets against pytorch-metric-learning 2.9, and every known disagreement."""

import pytest
import torch

from presets import SUBJECTS, assert_same, contrastive, labelled_rows, triplet, value_and_grads

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import distances, losses, miners  # noqa: E402
from pytorch_metric_learning.utils import loss_and_miner_utils  # noqa: E402

DTYPES = (torch.float32, torch.float64)
# torch.cdist, on which the peer stands, changes its formula above 25 rows.
SIZES = (20, 40)


def mined(loss, miner, labels, **options):
    """The peer's loss over what its miner selects."""
    return lambda x: loss(x, labels, miner(x, labels), **options)


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return request.param


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("smooth", [False, True])
@pytest.mark.parametrize("margin", [0.05, 0.2])
def test_batch_hard_triplet(subject, margin, smooth, dtype, n):
    x, labels = labelled_rows(n, 6, 4, dtype)
    labels[0] = 77  # an anchor without a positive
    changed = {"margin": margin, "smooth": smooth} if margin != 0.05 or smooth else {}
    ours = triplet(subject, "pml_batch_hard", **changed)
    theirs = losses.TripletMarginLoss(margin=margin, smooth_loss=smooth)
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(mined(theirs, miners.BatchHardMiner(), labels), x),
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contrastive(subject, dtype, n):
    x, labels = labelled_rows(n, 6, 4, dtype)
    assert_same(
        value_and_grads(lambda x: contrastive(subject, "pml")(x, labels), x),
        value_and_grads(lambda x: losses.ContrastiveLoss()(x, labels), x),
    )


@pytest.mark.parametrize(("pos_margin", "neg_margin"), [(0.0, 1.0), (0.3, 0.7), (1.2, 1.9)])
def test_contrastive_margins(subject, pos_margin, neg_margin):
    x, labels = labelled_rows(20, 6, 4)
    options = {"pos_margin": pos_margin, "neg_margin": neg_margin}
    assert_same(
        value_and_grads(lambda x: contrastive(subject, "pml", **options)(x, labels), x),
        value_and_grads(lambda x: losses.ContrastiveLoss(**options)(x, labels), x),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_references(subject, dtype):
    x, labels = labelled_rows(15, 6, 4, dtype)
    ref_emb, ref_labels = labelled_rows(33, 6, 5, dtype, seed=1)
    where = {"ref_labels": ref_labels}
    miner, theirs = miners.BatchHardMiner(), losses.TripletMarginLoss()

    def peer(x, ref_emb):
        indices = miner(x, labels, ref_emb, ref_labels)
        return theirs(x, labels, indices, ref_emb=ref_emb, ref_labels=ref_labels)

    ours = triplet(subject, "pml_batch_hard")
    assert_same(
        value_and_grads(lambda x, r: ours(x, labels, ref_emb=r, **where), x, ref_emb),
        value_and_grads(peer, x, ref_emb),
    )
    ours, theirs = contrastive(subject, "pml"), losses.ContrastiveLoss()
    assert_same(
        value_and_grads(lambda x, r: ours(x, labels, ref_emb=r, **where), x, ref_emb),
        value_and_grads(lambda x, r: theirs(x, labels, None, r, ref_labels), x, ref_emb),
    )


MINERS = {
    "batch-hard": lambda: miners.BatchHardMiner(),
    "triplet-margin": lambda: miners.TripletMarginMiner(margin=0.2, type_of_triplets="semihard"),
    "hard-semihard": lambda: miners.BatchEasyHardMiner("hard", "semihard"),
    "easy-all": lambda: miners.BatchEasyHardMiner("easy", "all"),
    "multi-similarity": lambda: miners.MultiSimilarityMiner(),
    "pair-margin": lambda: miners.PairMarginMiner(),
}


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("miner", MINERS)
def test_indices_of_its_miners(subject, miner, with_ref):
    x, labels = labelled_rows(16, 5, 4)
    ref_emb, ref_labels = labelled_rows(11, 5, 4, seed=1) if with_ref else (None, None)
    indices = MINERS[miner]()(x, labels, ref_emb, ref_labels)
    assert len(indices) in (3, 4) and all(len(i) > 1 for i in indices)
    rows = (x, ref_emb) if with_ref else (x,)

    for ours, theirs in (
        (triplet(subject, "pml_batch_hard"), losses.TripletMarginLoss()),
        (
            triplet(subject, "pml_batch_hard", margin=0.2, smooth=True),
            losses.TripletMarginLoss(0.2, False, True),
        ),
        (contrastive(subject, "pml"), losses.ContrastiveLoss()),
    ):

        def our_loss(x, r=None, loss=ours):
            return loss(x, ref_emb=r, indices_tuple=indices)

        def peer(x, r=None, loss=theirs):
            return loss(x, labels, indices, r, ref_labels)

        assert_same(value_and_grads(our_loss, *rows), value_and_grads(peer, *rows))


def test_all_triplets_of_the_peer(subject):
    x, labels = labelled_rows(12, 5, 4)
    indices = loss_and_miner_utils.get_all_triplets_indices(labels)
    assert_same(
        value_and_grads(lambda x: triplet(subject, "pml_batch_hard")(x, indices_tuple=indices), x),
        value_and_grads(lambda x: losses.TripletMarginLoss()(x, labels), x),
    )


@pytest.mark.parametrize("smooth", [False, True])
def test_swap_with_given_triplets(subject, smooth):
    x, labels = labelled_rows(12, 5, 4)
    indices = loss_and_miner_utils.get_all_triplets_indices(labels)
    ours = triplet(subject, "pml_batch_hard", swap=True, smooth=smooth)
    theirs = losses.TripletMarginLoss(swap=True, smooth_loss=smooth)
    assert_same(
        value_and_grads(lambda x: ours(x, indices_tuple=indices), x),
        value_and_grads(lambda x: theirs(x, labels, indices), x),
    )


@pytest.mark.parametrize(
    "labels", [[1] * 5, [1, 2, 3, 4, 5], [4]], ids=["one-class", "all-distinct", "N=1"]
)
def test_degenerate_batches(subject, labels):
    labels = torch.tensor(labels)
    x, _ = labelled_rows(len(labels), 4, 1)
    theirs = mined(losses.TripletMarginLoss(), miners.BatchHardMiner(), labels)
    ours = value_and_grads(lambda x: triplet(subject, "pml_batch_hard")(x, labels), x)
    assert not any(part.any() for part in ours)
    assert_same(ours, value_and_grads(theirs, x))
    assert_same(
        value_and_grads(lambda x: contrastive(subject, "pml")(x, labels), x),
        value_and_grads(lambda x: losses.ContrastiveLoss()(x, labels), x),
    )


def test_collapsed_batch(subject):
    x, labels = torch.ones(8, 4, dtype=torch.float64), torch.arange(8) % 2
    theirs = mined(losses.TripletMarginLoss(), miners.BatchHardMiner(), labels)
    assert_same(
        value_and_grads(lambda x: triplet(subject, "pml_batch_hard")(x, labels), x),
        value_and_grads(theirs, x),
    )


class TestDisagreements:
    """Where this library is meant to differ. If the peer changes, these fail and say so."""

    def test_one_pair_of_each_kind(self, subject):
        x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
        indices = tuple(torch.tensor([i]) for i in (0, 1, 0, 2))
        ours = contrastive(subject, "pml")(x, indices_tuple=indices)
        theirs = losses.ContrastiveLoss()(x, None, indices)
        near = (2 - 2**0.5) ** 0.5  # distance of the unit rows at 45 degrees
        assert ours.item() == pytest.approx(2**0.5 + 1 - near)
        assert theirs.item() == 0.0  # the peer takes one pair of each kind for none

    def test_nan_row(self, subject):
        x, labels = labelled_rows(12, 4, 3)
        x[5] = torch.nan
        # The peer averages over losses above 0, and NaN is not: the value hides what the gradient
        # then carries into the weights.
        for peer in (losses.TripletMarginLoss(), losses.ContrastiveLoss()):
            value, grad = value_and_grads(lambda x, peer=peer: peer(x, labels), x)
            assert value.isfinite() and grad.isnan().any()
        assert triplet(subject, "pml_batch_hard")(x, labels).isnan()
        assert contrastive(subject, "pml")(x, labels).isnan()

    def test_swap_with_references(self, subject):
        x, _ = labelled_rows(3, 4, 3)
        ref_emb, _ = labelled_rows(8, 4, 4, seed=1)
        indices = tuple(torch.tensor(i) for i in ([0, 1, 2], [4, 5, 6], [7, 6, 5]))
        theirs = losses.TripletMarginLoss(swap=True, margin=1.0)
        with pytest.raises(IndexError):
            theirs(x, None, indices, ref_emb, torch.arange(8))
        everything = torch.cat([x, ref_emb])
        a, p, n = indices
        ours = triplet(subject, "pml_batch_hard", swap=True, margin=1.0)
        value = ours(x, ref_emb=ref_emb, indices_tuple=indices)
        torch.testing.assert_close(value, theirs(everything, None, (a, p + 3, n + 3)))

    def test_swap_at_a_tie(self, subject):
        x = torch.tensor([[0.0], [2.0], [1.0]], dtype=torch.float64)
        indices = tuple(torch.tensor([i]) for i in range(3))
        ours = triplet(subject, "pml_batch_hard", swap=True, normalize=False)
        raw = distances.LpDistance(normalize_embeddings=False)
        theirs = losses.TripletMarginLoss(swap=True, distance=raw)
        value, grad = value_and_grads(lambda x: ours(x, indices_tuple=indices), x)
        peer_value, peer_grad = value_and_grads(lambda x: theirs(x, None, indices), x)
        torch.testing.assert_close(value, peer_value)
        # The anchor keeps the whole gradient; the peer's minimum gives half of it to each side.
        assert grad.flatten().tolist() == [0.0, 1.0, -1.0]
        assert peer_grad.flatten().tolist() == [-0.5, 0.5, 0.0]

    def test_empty_batch(self, subject):
        x, labels = torch.zeros(0, 4, requires_grad=True), torch.zeros(0, dtype=torch.int64)
        with pytest.raises(IndexError):
            miners.BatchHardMiner()(x, labels)
        assert triplet(subject, "pml_batch_hard")(x, labels).item() == 0.0

    def test_self_pairs_of_references(self, subject):
        x, labels = labelled_rows(10, 4, 3)
        ours, theirs = contrastive(subject, "pml"), losses.ContrastiveLoss()
        value = ours(x, labels, ref_emb=x, ref_labels=labels)
        # The peer leaves out the diagonal if both label arguments are one object, we never do.
        torch.testing.assert_close(value, theirs(x, labels, None, x, labels.clone()))
        torch.testing.assert_close(theirs(x, labels, None, x, labels), theirs(x, labels))

    def test_duplicates_in_a_large_batch(self, subject):
        x, _ = labelled_rows(30, 64, 3, torch.float32)
        x = torch.cat([x, x])
        indices = tuple(torch.stack([torch.arange(30), torch.arange(30) + 30]))
        indices = (*indices, *(torch.empty(0, dtype=torch.int64),) * 2)
        assert contrastive(subject, "pml")(x, indices_tuple=indices).item() == 0.0
        # Above 25 rows the peer subtracts two large numbers to find these distances of 0.
        assert losses.ContrastiveLoss()(x, None, indices).item() > 1e-5

    def test_small_bfloat16_batch(self, subject):
        x, labels = labelled_rows(12, 4, 3, torch.bfloat16)
        with pytest.raises(NotImplementedError):
            losses.ContrastiveLoss()(x, labels)
        value, grad = value_and_grads(lambda x: contrastive(subject, "pml")(x, labels), x)
        assert value.dtype == torch.float32 and value.isfinite() and grad.dtype == torch.bfloat16
