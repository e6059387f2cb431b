# SPDX-License-Identifier: Apache-2.0
"""Where the Gram form of a distance loses digits: far from the origin, and in collapsed batches."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flashmetric import functional, reference
from flashmetric.ops.hardest import hardest_fallback
from flashmetric.ops.pair_distance import pair_distance_fallback
from helpers import DISTANCES, assert_grad_close, assert_no_worse_than_eager, make_rows

OPS = torch.ops.flashmetric


def plain_distances(x: Tensor) -> Tensor:
    """What fused code replaces: distances from one matrix product, under autograd."""
    diagonal = torch.eye(len(x), dtype=x.dtype, device=x.device)
    norms = x.square().sum(1)
    return (norms[:, None] + norms - 2 * (x @ x.T) + diagonal).clamp(min=0).sqrt() - diagonal


def eager_sums(
    x: Tensor, labels: Tensor, margin: float, distances: Callable[[Tensor], Tensor]
) -> list[Tensor]:
    """Sums per row over positives and negatives, and the gradients of both totals."""
    x = x.detach().requires_grad_()
    d = distances(x)
    same = labels[:, None] == labels
    sums = torch.stack(((d * same).sum(1), ((margin - d).relu() * ~same).sum(1)))
    grads = [torch.autograd.grad(part.sum(), x, retain_graph=True)[0] for part in sums]
    return [sums.detach(), torch.stack(grads)]


@pytest.mark.parametrize("classes", [3, 48])
@pytest.mark.parametrize("d", [512, 2048])
def test_row_sum_of_offset_rows(d: int, classes: int, device: torch.device) -> None:
    x = 1 + 0.2 * torch.rand(96, d, device=device)
    labels = torch.arange(96, device=device) % classes
    # Above every distance: a pair at the margin is active or not by a rounding error.
    margin = 1.01 * reference.pairwise_distance(x, x).max().item()
    truth = eager_sums(x.double(), labels, margin, lambda x: reference.pairwise_distance(x, x))
    eager = eager_sums(x, labels, margin, plain_distances)
    pairs = (x, labels, None, None, "equal", "euclidean")
    scale, offset = x.new_tensor([[1], [-1]]), x.new_tensor([[0], [margin]])
    sums, _, _, grad, _ = OPS.row_sum(*pairs, "hinge", "hinge", scale, offset, None, True)
    for ours, theirs, exact in zip((sums, grad), eager, truth, strict=True):
        for kind in range(2):
            error = (ours[kind] - exact[kind]).norm()
            assert error <= 4 * (theirs[kind] - exact[kind]).norm()


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize("loss", ["triplet_margin_loss", "contrastive_loss"])
def test_large_classes(loss: str, distance: str, with_ref: bool, device: torch.device) -> None:
    # 150 rows of a class: positives are no longer few, and take the path of the negatives.
    x = make_rows(300, 16, torch.float32, device=device)
    labels = torch.arange(300, device=device) % 2
    r = make_rows(210, 16, torch.float32, device=device)
    ref_labels = torch.arange(210, device=device) % 2
    results = []
    for home, dtype in (
        (reference, torch.float64),
        (reference, torch.float32),
        (functional, torch.float32),
    ):
        leaves = [rows.detach().to(dtype).requires_grad_() for rows in (x, r)][: 1 + with_ref]
        ref = {"ref_emb": leaves[1], "ref_labels": ref_labels} if with_ref else {}
        value = getattr(home, loss)(leaves[0], labels, distance=distance, reduction="mean", **ref)
        results.append((value.detach(), torch.autograd.grad(value, leaves)))
    (truth, truth_grads), (eager, _), (ours, grads) = results
    assert_no_worse_than_eager(truth, eager, ours, torch.float32)
    for expected, got in zip(truth_grads, grads, strict=True):
        assert_grad_close(expected, got, torch.float32)


@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
@pytest.mark.parametrize("classes", [2, 64])
@pytest.mark.parametrize("spread", [1e-2, 1e-3, 1e-4])
def test_hardest_of_a_collapsed_batch(
    spread: float, classes: int, distance: str, with_ref: bool, device: torch.device
) -> None:
    x = 1 + spread * torch.randn(256, 64, device=device)
    if distance == "cosine":
        x = functional.normalize_rows(x)
    labels = torch.arange(256, device=device) % classes
    other = ~torch.eye(256, dtype=torch.bool, device=device)
    r, ref_labels = None, None
    if with_ref:
        x, r, ref_labels = x[:100], x[100:], labels[100:]
        labels, other = labels[:100], other[:100, 100:]
    index, values = OPS.hardest(x, labels, r, ref_labels, distance)

    refs, classes_of_refs = (x, labels) if r is None else (r, ref_labels)
    d = reference.pairwise_distance(x.double(), refs.double())
    d = {"euclidean": d, "sqeuclidean": d**2, "cosine": d**2 / 2}[distance]
    same = labels[:, None] == classes_of_refs
    farthest = torch.where(same & other, d, -torch.inf).amax(1)
    nearest = torch.where(same, torch.inf, d).amin(1)
    for kind, expected in enumerate((farthest, nearest)):
        found = index[kind] >= 0
        assert found.equal(expected.isfinite())
        chosen = d[torch.arange(len(x), device=device), index[kind]][found]
        torch.testing.assert_close(chosen, expected[found], rtol=1e-3, atol=0)
        torch.testing.assert_close(values[kind][found].double(), chosen, rtol=1e-4, atol=0)


def test_ties_of_a_collapsed_batch_take_the_lowest_index(device: torch.device) -> None:
    x = (10 + 1e-3 * torch.randn(6, 33, device=device)).repeat(4, 1)
    labels = torch.arange(24, device=device) // 12
    index, values = OPS.hardest(x, labels, None, None, "euclidean")
    assert not values[1].any()
    assert index[1].tolist() == [12, 13, 14, 15, 16, 17] * 2 + [0, 1, 2, 3, 4, 5] * 2
    assert ((index[0] % 12) < 6).all()


def rows_around_a_far_point(d: int, distance: str, device: torch.device) -> Tensor:
    """Rows at nearly equal distances from each other, which is above the bound of near pairs."""
    steps = torch.cat((torch.eye(d, device=device), -torch.eye(d, device=device)))
    steps = steps[torch.randperm(2 * d, device=device)[:300]]
    rows = 32 / d**0.5 + 3 * steps * (1 + 1e-5 * torch.randn(len(steps), 1, device=device))
    return functional.normalize_rows(rows) if distance == "cosine" else rows


def brute_force(
    measure: Callable[..., Tensor],
    x: Tensor,
    labels: Tensor,
    r: Tensor | None,
    ref_labels: Tensor | None,
    distance: str,
) -> Tensor:
    """Index of the hardest pairs by argmax and argmin over all measured distances."""
    m = len(x if r is None else r)
    every = torch.arange(m, device=x.device)[:, None].expand(m, len(x))
    d = measure(x, r, None, every, distance).T
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    positives = same.clone()
    if r is None:
        positives.fill_diagonal_(False)
    farthest = d.masked_fill(~positives, -torch.inf).argmax(1)
    nearest = d.masked_fill(same, torch.inf).argmin(1)
    farthest[~positives.any(1)] = nearest[same.all(1)] = -1
    return torch.stack((farthest, nearest))


@pytest.mark.parametrize("d", [64, 515])
@pytest.mark.parametrize("classes", [2, 40])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("distance", DISTANCES)
def test_exact_mining_equals_brute_force(
    distance: str, with_ref: bool, classes: int, d: int, device: torch.device
) -> None:
    x = rows_around_a_far_point(d, distance, device)
    labels = torch.arange(len(x), device=device) % classes
    r, ref_labels = None, None
    if with_ref:
        x, r, labels, ref_labels = x[:90], x[90:], labels[:90], labels[90:] + 1
    batch = (x, labels, r, ref_labels, distance)
    for mine, measure in (
        (OPS.hardest, OPS.pair_distance),
        (hardest_fallback, pair_distance_fallback),
    ):
        expected = brute_force(measure, *batch)
        index, values = mine(*batch, True)
        assert index.equal(expected)
        assert values.equal(measure(x, r, None, index, distance))
        keyed, _ = mine(*batch)
        assert (keyed[1] != expected[1]).any(), "keys did as well, so the batch tests nothing"


@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_exact_loss_is_that_of_the_hardest_triplets(reduction: str, device: torch.device) -> None:
    x = rows_around_a_far_point(48, "euclidean", device).requires_grad_()
    labels = torch.arange(96, device=device) % 6
    p, n = brute_force(OPS.pair_distance, x.detach(), labels, None, None, "euclidean")
    results = []
    for options in (
        {"labels": labels, "exact": True},
        {"indices_tuple": (torch.arange(96, device=device), p, n)},
    ):
        loss = functional.triplet_margin_loss(x, reduction=reduction, **options)
        results.append((loss.detach(), *torch.autograd.grad(loss.sum(), x)))
    for ours, expected in zip(*results, strict=True):
        torch.testing.assert_close(ours, expected)


def test_distances_with_one_root_are_a_tie(device: torch.device) -> None:
    # The squares of both distances are neighbouring numbers, their roots round to one.
    x = torch.zeros(1, 2, device=device)
    r = torch.tensor([[1.0, 2**-11.5], [1.0, 0.0], [1.0, 2**-11.5]], device=device)
    labels, ref_labels = (torch.tensor(c, device=device) for c in ([0], [1, 0, 0]))
    every = torch.arange(3, device=device)[:, None]
    for mine, measure in (
        (OPS.hardest, OPS.pair_distance),
        (hardest_fallback, pair_distance_fallback),
    ):
        squares = measure(x, r, None, every, "sqeuclidean").flatten()
        assert squares[1] < squares[2] and (measure(x, r, None, every, "euclidean") == 1).all()
        for distance, farthest in (("euclidean", 1), ("sqeuclidean", 2)):
            index, _ = mine(x, labels, r, ref_labels, distance, True)
            assert index.flatten().tolist() == [farthest, 0]


@pytest.mark.parametrize("d", [3, 64, 700])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("with_ref", [False, True])
@pytest.mark.parametrize("distance", ["euclidean", "sqeuclidean", "cosine"])
def test_negatives_of_near_rows_are_those_of_exact_differences(
    distance: str, with_ref: bool, dtype: torch.dtype, d: int, device: torch.device
) -> None:
    # Around some points, so close that the order of keys means nothing, with copies among them.
    spread = 3e-4 if dtype == torch.float32 else 1e-8
    points = torch.randn(3, d, dtype=dtype, device=device)
    x = points[torch.arange(900, device=device) % 3]
    x = x + spread * torch.randn(900, d, dtype=dtype, device=device)
    x[500:600] = x[:100]
    if distance == "cosine":
        x = functional.normalize_rows(x)
    labels = torch.arange(900, device=device) // 7
    r, ref_labels = None, None
    if with_ref:
        x, r, labels, ref_labels = x[:400], x[400:], labels[:400], labels[400:] + 1
    index, values = OPS.hardest(x, labels, r, ref_labels, distance)
    expected, distances = OPS.hardest(x, labels, r, ref_labels, distance, True)
    assert index[1].equal(expected[1])
    assert values[1].equal(distances[1])
    # Not what the lowest keys are.
    refs = x if r is None else r
    keys = refs.square().sum(1) - 2 * (x @ refs.T)
    same = labels[:, None] == (labels if ref_labels is None else ref_labels)
    assert (keys.masked_fill(same, torch.inf).argmin(1) != expected[1]).sum() > 50
