# SPDX-License-Identifier: Apache-2.0
"""The programs that docs/migration.md replaces, against what it puts in their place."""

import torch
from torch import Tensor
from torch.nn import functional as F

import flashmetric

N, D = 24, 7


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True)


def assert_same(ours: Tensor, theirs: Tensor, *leaves: Tensor) -> None:
    torch.testing.assert_close(ours, theirs)
    for one, other in zip(
        torch.autograd.grad(ours, leaves), torch.autograd.grad(theirs, leaves), strict=True
    ):
        assert one.abs().sum() > 0
        torch.testing.assert_close(one, other)


def test_distance_matrix() -> None:
    x, labels = rows(N, D), torch.arange(N) // 4
    distances = torch.cdist(x, x)
    same = labels[:, None] == labels[None, :]
    positive = (distances * same).max(1).values
    negative = distances.masked_fill(same, torch.inf).min(1).values
    theirs = torch.relu(positive - negative + 0.2).mean()
    assert_same(flashmetric.TripletMarginLoss(0.2)(x, labels), theirs, x)


def test_given_triplets() -> None:
    a, p, n = (rows(N, D) for _ in range(3))
    theirs = torch.nn.TripletMarginLoss(1.0, eps=0.0)(a, p, n)
    i = torch.arange(N)
    ours = flashmetric.TripletMarginLoss(1.0)(
        torch.cat([a, p, n]), indices_tuple=(i, i + N, i + 2 * N)
    )
    assert_same(ours, theirs, a, p, n)


def test_two_views() -> None:
    one, two = rows(N, D), rows(N, D)
    x = F.normalize(torch.cat([one, two]))
    logits = (x @ x.T / 0.5).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    theirs = F.cross_entropy(logits, torch.arange(2 * N).roll(N))
    ours = flashmetric.NTXentLoss(temperature=0.5)(torch.cat([one, two]), torch.arange(N).repeat(2))
    assert_same(ours, theirs, one, two)


def test_features_of_views() -> None:
    features, labels = rows(N, 2, D), torch.arange(N) // 4
    x, y = torch.cat(F.normalize(features, dim=2).unbind(1)), labels.repeat(2)
    logits = (x @ x.T / 0.1).masked_fill(torch.eye(2 * N, dtype=torch.bool), -torch.inf)
    same = (y[:, None] == y[None, :]).fill_diagonal_(False)
    log_p = torch.log_softmax(logits, 1).masked_fill(~same, 0)
    theirs = -(log_p.sum(1) / same.sum(1)).mean()
    flat = features.transpose(0, 1).flatten(0, 1)
    assert_same(flashmetric.SupConLoss(temperature=0.1)(flat, y), theirs, features)


def test_two_towers() -> None:
    images, texts = rows(N, D), rows(N, D)
    targets = torch.arange(N)
    logits = F.normalize(images) @ F.normalize(texts).T
    assert_same(
        flashmetric.InfoNCELoss(0.05)(images, ref_emb=texts),
        F.cross_entropy(logits / 0.05, targets),
        images,
        texts,
    )
    logits = F.normalize(images) @ F.normalize(texts).T
    both = F.cross_entropy(logits / 0.07, targets) + F.cross_entropy(logits.T / 0.07, targets)
    clip = flashmetric.ContrastiveImageTextLoss(0.07).double()
    assert_same(clip(images, ref_emb=texts), both / 2, images, texts)
