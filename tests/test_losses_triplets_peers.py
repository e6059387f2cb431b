# SPDX-License-Identifier: Apache-2.0
"""Triplet losses other than batch-hard against the peers' definitions."""

import numpy as np
import pytest
import torch
from torch import Tensor

from flashmetric.losses import TripletMarginLoss
from presets import BATCHES, assert_same, labelled_rows, value_and_grads

batches = pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)


def batch(labels: list[int], dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    x, _ = labelled_rows(len(labels), 6, 3, dtype)
    return x, torch.tensor(labels)


def tensorflow_addons_semi_hard(x: np.ndarray, labels: np.ndarray, margin: float = 1.0) -> float:
    """The documented formula of TripletSemiHardLoss, without the division by no pairs.

    For each positive pair (i, j): the smallest d_ik > d_ij of negatives k, else the largest d_ik,
    written as max_k (d_ik - min_k d_ik) [k negative] + min_k d_ik.
    """
    d = np.sqrt(((x[:, None, :] - x[None, :, :]) ** 2).sum(-1))
    negative = labels[:, None] != labels[None, :]
    total, pairs = 0.0, 0
    for i, j in zip(*np.nonzero(~negative & ~np.eye(len(x), dtype=bool)), strict=True):
        outside = d[i, negative[i] & (d[i] > d[i, j])]
        inside = ((d[i] - d[i].min()) * negative[i]).max() + d[i].min()
        total += max(d[i, j] - (outside.min() if len(outside) else inside) + margin, 0.0)
        pairs += 1
    return total / max(pairs, 1)


@batches
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_tensorflow_addons_semi_hard(labels: list[int], dtype: torch.dtype) -> None:
    x, labels = batch(labels, dtype)
    loss = TripletMarginLoss.preset("tensorflow_addons", mining="semi_hard")
    value, grad = value_and_grads(lambda x: loss(x, labels), x)
    truth, step = x.double().numpy(), 1e-6
    tight = dtype == torch.float64
    expected = tensorflow_addons_semi_hard(truth, labels.numpy())
    assert value.item() == pytest.approx(expected, rel=1e-12 if tight else 1e-5)
    numeric = np.zeros_like(truth)
    for index in np.ndindex(truth.shape):
        shift = np.zeros_like(truth)
        shift[index] = step
        numeric[index] = (
            tensorflow_addons_semi_hard(truth + shift, labels.numpy())
            - tensorflow_addons_semi_hard(truth - shift, labels.numpy())
        ) / (2 * step)
    np.testing.assert_allclose(grad.double().numpy(), numeric, rtol=0, atol=1e-7 if tight else 1e-5)


def sentence_transformers(name: str, **options):
    losses = pytest.importorskip(
        "sentence_transformers.sentence_transformer.losses",
        reason="the peer sentence-transformers (6 or later) is missing",
    )
    loss = getattr(losses, name)(None, **options)
    return lambda labels: lambda x: loss.compute_loss_from_embeddings([x], labels)


@batches
@pytest.mark.parametrize("margin", [5.0, 0.5])
def test_sentence_transformers_semi_hard(labels: list[int], margin: float) -> None:
    peer = sentence_transformers("BatchSemiHardTripletLoss", margin=margin)
    x, labels = batch(labels)
    loss = TripletMarginLoss.preset("sentence_transformers", margin=margin, mining="semi_hard")
    assert_same(value_and_grads(lambda x: loss(x, labels), x), value_and_grads(peer(labels), x))


@batches
@pytest.mark.parametrize("margin", [5.0, 0.5])
def test_sentence_transformers_batch_all(labels: list[int], margin: float) -> None:
    peer = sentence_transformers("BatchAllTripletLoss", margin=margin)
    x, labels = batch(labels)
    loss = TripletMarginLoss.preset(
        "sentence_transformers", margin=margin, mining="batch_all", reduction="mean_nonzero"
    )
    assert_same(value_and_grads(lambda x: loss(x, labels), x), value_and_grads(peer(labels), x))


def test_sentence_transformers_cosine() -> None:
    losses = pytest.importorskip("sentence_transformers.sentence_transformer.losses")
    cosine = losses.BatchHardTripletLossDistanceFunction.cosine_distance
    x, labels = batch(BATCHES["regular"])
    for mining, name in (
        ("semi_hard", "BatchSemiHardTripletLoss"),
        ("batch_all", "BatchAllTripletLoss"),
    ):
        peer = sentence_transformers(name, distance_metric=cosine, margin=0.3)
        loss = TripletMarginLoss.preset(
            "sentence_transformers",
            distance="cosine",
            margin=0.3,
            mining=mining,
            reduction="mean" if mining == "semi_hard" else "mean_nonzero",
        )
        assert_same(
            value_and_grads(lambda x, loss=loss: loss(x, labels), x),
            value_and_grads(peer(labels), x),
        )


@pytest.mark.parametrize("n", [20, 40])
@pytest.mark.parametrize("smooth", [False, True])
def test_pml_all_triplets(smooth: bool, n: int) -> None:
    losses = pytest.importorskip("pytorch_metric_learning.losses")
    x, labels = labelled_rows(n, 6, 4)
    labels[0] = 77
    ours = TripletMarginLoss.preset("pml", smooth=smooth)
    theirs = losses.TripletMarginLoss(smooth_loss=smooth)
    assert_same(
        value_and_grads(lambda x: ours(x, labels), x),
        value_and_grads(lambda x: theirs(x, labels), x),
    )
    r, ref_labels = labelled_rows(n + 3, 6, 5, seed=1)
    where = {"ref_labels": ref_labels}
    assert_same(
        value_and_grads(lambda x, r: ours(x, labels, ref_emb=r, **where), x, r),
        value_and_grads(lambda x, r: theirs(x, labels, ref_emb=r, **where), x, r),
    )


@pytest.mark.parametrize("type_of_triplets", ["all", "hard", "semihard", "easy"])
def test_pml_types_of_triplets(type_of_triplets: str) -> None:
    pytest.importorskip("pytorch_metric_learning")
    from pytorch_metric_learning import losses, miners, reducers

    x, labels = labelled_rows(24, 6, 4)
    miner = miners.TripletMarginMiner(0.2, type_of_triplets)
    for reduction, reducer in (
        ("mean_nonzero", reducers.AvgNonZeroReducer()),
        ("sum", reducers.SumReducer()),
    ):
        ours = TripletMarginLoss.preset(
            "pml",
            margin=0.2,
            type_of_triplets=type_of_triplets,
            reduction=reduction,
        )
        theirs = losses.TripletMarginLoss(0.2, reducer=reducer)
        assert_same(
            value_and_grads(lambda x, ours=ours: ours(x, labels), x),
            value_and_grads(lambda x, theirs=theirs: theirs(x, labels, miner(x, labels)), x),
        )


class TestDisagreements:
    """Where this library is meant to differ. If a peer changes, these fail and say so."""

    def test_pml_swap_reads_distances_to_the_wrong_rows(self) -> None:
        losses = pytest.importorskip("pytorch_metric_learning.losses")
        (x, _), (r, _) = labelled_rows(4, 6, 2), labelled_rows(9, 6, 2, seed=1)
        given = (torch.tensor([0]), torch.tensor([7]), torch.tensor([8]))
        labels, ref_labels = torch.zeros(4).long(), torch.zeros(9).long()
        with pytest.raises(IndexError):
            losses.TripletMarginLoss(swap=True)(x, labels, given, ref_emb=r, ref_labels=ref_labels)
        ours = TripletMarginLoss.preset("pml", swap=True)
        assert ours(x, indices_tuple=given, ref_emb=r).isfinite()

    def test_pml_means_all_triplets_that_its_miner_returns(self) -> None:
        pytest.importorskip("pytorch_metric_learning")
        from pytorch_metric_learning import losses, miners, reducers

        # "all" is all violating triplets for the miner, and all there are for this loss: a mean
        # over them differs, a mean over those with a loss does not.
        x, labels = labelled_rows(24, 6, 4)
        options = {"margin": 0.2, "reduction": "mean"}
        ours = TripletMarginLoss.preset("pml", **options)(x, labels)
        mined = miners.TripletMarginMiner(0.2)(x, labels)
        theirs = losses.TripletMarginLoss(0.2, reducer=reducers.MeanReducer())
        assert ours < 0.9 * theirs(x, labels, mined)
        torch.testing.assert_close(ours, theirs(x, labels))

    def test_sentence_transformers_counts_losses_above_a_threshold(self) -> None:
        # Triplets with a loss of at most 1e-16 do not count there.
        peer = sentence_transformers("BatchAllTripletLoss", margin=0.0)
        x = torch.tensor([[0.0], [1e-17], [0.0]], dtype=torch.float64)
        labels = torch.tensor([0, 0, 1])
        loss = TripletMarginLoss.preset(
            "sentence_transformers", margin=0.0, mining="batch_all", reduction="mean_nonzero"
        )
        assert loss(x, labels).item() == pytest.approx(1e-17, rel=1e-6)
        assert peer(labels)(x).item() != pytest.approx(1e-17, rel=1e-6)
