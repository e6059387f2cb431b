# SPDX-License-Identifier: Apache-2.0
"""The oracle at its edges: zero distances, ties, empty batches, rows that are not finite, types."""

import itertools

import pytest
import torch
from torch import Tensor

from flashmetric import reference

DISTANCES = ("euclidean", "sqeuclidean", "cosine", "dot")
LOSSES = (reference.triplet_margin_loss, reference.contrastive_loss)


def batch(n: int = 7, d: int = 3, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random float64 rows of three classes, the last row alone in its own."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 3, (n,), generator=generator)
    labels[-1] = 9
    return x, labels


def test_coinciding_rows_have_zero_gradient():
    x = torch.tensor([[1.0, 2.0], [1.0, 2.0], [4.0, 6.0]], dtype=torch.float64, requires_grad=True)
    d = reference.pairwise_distance(x, x)
    assert d.tolist() == [[0, 0, 5], [0, 0, 5], [5, 5, 0]]
    d[:2, :2].sum().backward()
    assert x.grad.tolist() == [[0, 0]] * 3

    x.grad = None
    loss = reference.triplet_margin_loss(x, torch.tensor([0, 0, 1]), margin=6.0)
    loss.backward()
    assert loss.item() == 1.0  # the two anchors: 0 - 5 + 6
    torch.testing.assert_close(x.grad[0], torch.tensor([0.3, 0.4], dtype=torch.float64))


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("loss", LOSSES)
def test_collapsed_batch_has_finite_gradient(loss, distance):
    for fill in (0.0, 1.5):
        x = torch.full((6, 4), fill, dtype=torch.float64, requires_grad=True)
        value = loss(x, torch.tensor([0, 0, 0, 1, 1, 1]), distance=distance)
        value.backward()
        assert value.isfinite() and x.grad.isfinite().all()
        if distance != "dot":
            assert not x.grad.any()


def test_zero_row_stays_zero_when_normalized():
    x = torch.tensor([[0.0, 0.0], [3.0, 4.0], [0.0, 2.0]], dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([0, 0, 1])
    d = reference.pairwise_distance(x, x, "cosine")
    assert d[0].tolist() == [1.0, 1.0, 1.0] and d[:, 0].tolist() == [1.0, 1.0, 1.0]
    for options in ({"distance": "cosine"}, {"normalize": True}):
        x.grad = None
        reference.contrastive_loss(x, labels, **options, neg_margin=3.0, reduction="sum").backward()
        assert x.grad[0].tolist() == [0.0, 0.0] and x.grad[1:].any()


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_normalized_rows_of_any_length(scale):
    x, labels = batch()
    for loss in LOSSES:
        plain = loss(x, labels, normalize=True)
        torch.testing.assert_close(loss(x * scale, labels, normalize=True), plain)


def test_ties_go_to_the_lowest_index():
    x = torch.tensor([[0.0], [1.0], [-1.0], [2.0], [-2.0]], requires_grad=True)
    labels = torch.tensor([0, 0, 0, 1, 1])
    loss = reference.triplet_margin_loss(x, labels, margin=9.0, reduction="none")[0]
    loss.backward()
    assert loss.item() == 8.0
    assert x.grad.flatten().tolist() == [0.0, 1.0, 0.0, -1.0, 0.0]


def test_swap_keeps_the_anchor_at_a_tie():
    x = torch.tensor([[0.0], [2.0], [1.0]], requires_grad=True)
    triplet = tuple(torch.tensor([i]) for i in range(3))
    reference.triplet_margin_loss(x, swap=True, indices_tuple=triplet).backward()
    assert x.grad.flatten().tolist() == [0.0, 1.0, -1.0]


@pytest.mark.parametrize(
    ("n", "m", "labels"),
    [(0, None, []), (1, None, [3]), (4, None, [3] * 4), (4, None, [1, 2, 3, 4]), (3, 0, [0, 0, 1])],
    ids=["N=0", "N=1", "one-class", "all-distinct", "M=0"],
)
@pytest.mark.parametrize("distance", DISTANCES)
def test_triplet_without_valid_anchor_is_zero(n, m, labels, distance):
    for reduction in ("mean", "mean_nonzero", "sum", "none"):
        x = torch.randn(n, 3, requires_grad=True)
        ref = {} if m is None else {"ref_emb": torch.randn(m, 3, requires_grad=True)}
        ref_labels = {} if m is None else {"ref_labels": torch.zeros(m, dtype=torch.int64)}
        loss = reference.triplet_margin_loss(
            x,
            torch.tensor(labels, dtype=torch.int64),
            distance=distance,
            reduction=reduction,
            **ref,
            **ref_labels,
        )
        loss.sum().backward()
        assert loss.tolist() == ([0.0] * n if reduction == "none" else 0.0)
        for rows in (x, *ref.values()):
            assert rows.grad is not None and not rows.grad.any()


@pytest.mark.parametrize("n", [0, 1])
@pytest.mark.parametrize("reduction", ["mean", "mean_separate", "mean_nonzero", "sum", "none"])
def test_contrastive_without_pair_is_zero(n, reduction):
    x = torch.randn(n, 3, requires_grad=True)
    loss = reference.contrastive_loss(x, torch.zeros(n), reduction=reduction)
    loss.sum().backward()
    assert not loss.any() and x.grad is not None and not x.grad.any()


@pytest.mark.parametrize("loss", LOSSES)
def test_empty_indices_are_zero(loss):
    x = torch.randn(4, 3, requires_grad=True)
    nothing = torch.empty(0, dtype=torch.int64)
    value = loss(x, indices_tuple=(nothing, nothing, nothing))
    value.backward()
    assert value.item() == 0.0 and not x.grad.any()


def test_keep_without_negative_is_the_margin_without_gradient():
    x = torch.randn(4, 3, requires_grad=True)
    loss = reference.triplet_margin_loss(x, torch.zeros(4), margin=5.0, empty="keep")
    loss.backward()
    assert loss.item() == 5.0 and not x.grad.any()


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("loss", LOSSES)
def test_non_finite_row_shows(loss, bad):
    x, labels = batch()
    x = x.float()
    x[2, 1] = bad
    for distance, reduction in itertools.product(DISTANCES, ("mean", "mean_nonzero", "sum")):
        value = loss(x, labels, distance=distance, reduction=reduction)
        overflow_is_harmless = bad == 1e30 and distance == "cosine"
        assert value.isfinite() if overflow_is_harmless else value.isnan()


def test_non_finite_row_without_any_pair_is_zero():
    x = torch.tensor([[torch.nan]], requires_grad=True)
    loss = reference.triplet_margin_loss(x, torch.tensor([0]))
    loss.backward()
    assert loss.item() == 0.0 and not x.grad.any()


def test_non_finite_row_shows_though_no_anchor_counts():
    x = torch.tensor([[torch.nan], [1.0]], requires_grad=True)
    for labels in ([0, 1], [0, 0]):
        assert reference.triplet_margin_loss(x, torch.tensor(labels)).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("loss", LOSSES)
def test_dtypes(loss, dtype):
    x, labels = batch()
    x = x.to(dtype).requires_grad_()
    value = loss(x, labels)
    value.backward()
    assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert x.grad.dtype == dtype
    torch.testing.assert_close(value.double(), loss(x.double(), labels))
    for kind in (torch.int32, torch.int64):
        assert loss(x, labels.to(kind)).equal(value)
    assert loss(x, labels > 0).equal(loss(x, (labels > 0).long()))


def test_label_values_do_not_matter():
    x, labels = batch()
    names = torch.tensor([2**62, -5, 17, 0, 0, 0, 0, 0, 0, -(2**63)])
    for loss in LOSSES:
        assert loss(x, names[labels]).equal(loss(x, labels))


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"distance": "manhattan"}, "distance"),
        ({"reduction": "median"}, "reduction"),
        ({"ref_emb": torch.zeros(2, 3)}, "ref_labels"),
        ({"ref_labels": torch.zeros(2)}, "ref_emb"),
        ({"labels": None}, "labels"),
        ({"indices_tuple": (torch.zeros(1, dtype=torch.int64),) * 2}, "indices_tuple"),
        ({"embeddings": torch.zeros(7)}, "embeddings"),
    ],
)
@pytest.mark.parametrize("loss", LOSSES)
def test_bad_arguments_are_named(loss, options, named):
    x, labels = batch()
    with pytest.raises(ValueError, match=named):
        loss(**{"embeddings": x, "labels": labels, **options})


def test_bad_options_of_one_loss_are_named():
    x, labels = batch()
    for option in ({"mining": "semihard"}, {"empty": "zero"}, {"reduction": "mean_separate"}):
        with pytest.raises(ValueError, match=next(iter(option))):
            reference.triplet_margin_loss(x, labels, **option)
    with pytest.raises(ValueError, match="power"):
        reference.contrastive_loss(x, labels, power=3)
