# SPDX-License-Identifier: Apache-2.0
"""The "sentence_transformers" presets against sentence-transformers 6.2, and where they differ."""

import pytest
import torch

from presets import (
    BATCHES,
    SUBJECTS,
    assert_same,
    contrastive,
    labelled_rows,
    triplet,
    value_and_grads,
)

pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses",
    reason="the peer sentence-transformers (6 or later) is missing",
)

from sentence_transformers.sentence_transformer import losses  # noqa: E402

DTYPES = (torch.float32, torch.float64)
batches = pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
dtypes = pytest.mark.parametrize("dtype", DTYPES, ids=str)


def batch(labels, dtype=torch.float64):
    x, _ = labelled_rows(len(labels), 6, 3, dtype)
    return x, torch.tensor(labels)


def batch_hard(labels, make=losses.BatchHardTripletLoss, **options):
    """The peer's loss of embeddings alone: the model in front of them is not needed."""
    loss = make(None, **options)
    return lambda x: loss.compute_loss_from_embeddings([x], labels)


def given_pairs(i, j, same, **options):
    """The peer's pair loss over pairs (i, j) of the rows of one batch."""
    loss = losses.ContrastiveLoss(None, **options)
    return lambda x: loss.compute_loss_from_embeddings([x[i], x[j]], same.long())


def all_pairs(labels, **options):
    i, j = (~torch.eye(len(labels), dtype=torch.bool)).nonzero(as_tuple=True)
    return given_pairs(i, j, labels[i] == labels[j], **options)


@pytest.fixture(params=SUBJECTS)
def subject(request):
    return request.param


@dtypes
@batches
def test_batch_hard(subject, labels, dtype):
    x, labels = batch(labels, dtype)
    assert_same(
        value_and_grads(lambda x: triplet(subject, "sentence_transformers")(x, labels), x),
        value_and_grads(batch_hard(labels), x),
    )


@batches
@pytest.mark.parametrize("margin", [0.1, 1.0])
def test_batch_hard_margin(subject, margin, labels):
    x, labels = batch(labels)
    ours = triplet(subject, "sentence_transformers", margin=margin)
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(batch_hard(labels, margin=margin), x),
    )


@batches
def test_batch_hard_soft_margin(subject, labels):
    x, labels = batch(labels)
    ours = triplet(subject, "sentence_transformers", smooth=True, margin=0.0)
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(batch_hard(labels, losses.BatchHardSoftMarginTripletLoss), x),
    )


@batches
def test_batch_hard_cosine(subject, labels):
    x, labels = batch(labels)
    ours = triplet(subject, "sentence_transformers", distance="cosine", margin=0.3)
    cosine = losses.BatchHardTripletLossDistanceFunction.cosine_distance
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(batch_hard(labels, distance_metric=cosine, margin=0.3), x),
    )


def test_batch_hard_of_a_collapsed_batch(subject):
    x, labels = torch.ones(6, 4, dtype=torch.float64), torch.arange(6) % 2
    assert_same(
        value_and_grads(lambda x: triplet(subject, "sentence_transformers")(x, labels), x),
        value_and_grads(batch_hard(labels), x),
    )


@dtypes
@pytest.mark.parametrize("labels", [b for b in BATCHES.values() if len(b) > 1])
def test_contrastive(subject, labels, dtype):
    x, labels = batch(labels, dtype)
    assert_same(
        value_and_grads(lambda x: contrastive(subject, "sentence_transformers")(x, labels), x),
        value_and_grads(all_pairs(labels), x),
    )


@pytest.mark.parametrize("size_average", [False, True])
def test_contrastive_given_pairs(subject, size_average):
    x, _ = batch([0] * 9)
    i, j = torch.tensor([0, 1, 2, 5, 5, 7]), torch.tensor([3, 4, 8, 6, 6, 8])
    same = torch.tensor([True, False, False, True, False, False])
    options = {"neg_margin": 1.3, "reduction": "mean" if size_average else "sum"}
    ours = contrastive(subject, "sentence_transformers", **options)
    indices = (i[same], j[same], i[~same], j[~same])
    assert_same(
        value_and_grads(lambda x: ours(x, indices_tuple=indices), x),
        value_and_grads(given_pairs(i, j, same, margin=1.3, size_average=size_average), x),
    )


class TestDisagreements:
    """Where this library is meant to differ. If the peer changes, these fail and say so."""

    def test_hinge_at_exactly_zero(self, subject):
        x, labels = torch.tensor([[0.0], [1.0], [7.0]]), torch.tensor([0, 0, 1])
        ours = triplet(subject, "sentence_transformers", margin=6.0)
        value, grad = value_and_grads(lambda x: ours(x, labels), x)
        peer_value, peer_grad = value_and_grads(batch_hard(labels, margin=6.0), x)
        # Losses are 1 - 7 + 6 = 0, 1 - 6 + 6 = 1 and 0 - 6 + 6 = 0. At the corner our gradient is
        # 0, as for torch.relu; the peer's is that of the active side.
        assert value.item() == peer_value.item() == pytest.approx(1 / 3)
        assert grad.flatten().tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
        assert peer_grad.flatten().tolist() == pytest.approx([-1 / 3, 4 / 3, -1])

    def test_near_duplicates_far_from_the_origin(self, subject):
        x = torch.tensor([[100.0, 0.0], [100.0, 0.001], [0.0, 0.0], [0.0, 3.0]])
        distance = losses.BatchHardTripletLossDistanceFunction.euclidean_distance(x)
        assert distance[0, 1] == 0.0  # the float32 Gram form loses the distance of 0.001
        ours = triplet(subject, "sentence_transformers", margin=100.0, reduction="none")
        a, p, n = (torch.tensor([k]) for k in (0, 1, 2))
        loss = ours(x, indices_tuple=(a, p, n))
        assert loss.item() == pytest.approx(0.001, rel=0.01)

    def test_cosine_gradient_of_a_zero_row(self, subject):
        x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]], dtype=torch.float64)
        labels = torch.tensor([0, 0, 1])
        ours = contrastive(subject, "sentence_transformers")
        value, grad = value_and_grads(lambda x: ours(x, labels), x)
        peer_value, peer_grad = value_and_grads(all_pairs(labels), x)
        torch.testing.assert_close(value, peer_value)
        assert not grad[0].any()
        assert peer_grad[0].norm() > 1e6  # the peer divides by its guard of 1e-8

    def test_euclidean_distance_of_duplicates(self, subject):
        x, same = torch.ones(2, 4, dtype=torch.float64), torch.tensor([True])
        i, j = torch.tensor([0]), torch.tensor([1])
        ours = contrastive(subject, "sentence_transformers", distance="euclidean")
        nothing = torch.empty(0, dtype=torch.int64)
        value, grad = value_and_grads(lambda x: ours(x, indices_tuple=(i, j, nothing, nothing)), x)
        assert value.item() == 0.0 and not grad.any()
        euclidean = losses.SiameseDistanceMetric.EUCLIDEAN
        peer_value, peer_grad = value_and_grads(
            given_pairs(i, j, same, distance_metric=euclidean), x
        )
        assert peer_value > 0 and peer_grad.any()  # it adds 1e-6 to every difference

    def test_empty_batch(self, subject):
        x, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        with pytest.raises(IndexError):
            batch_hard(labels)(x)
        assert triplet(subject, "sentence_transformers")(x, labels).item() == 0.0
