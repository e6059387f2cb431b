# SPDX-License-Identifier: Apache-2.0
"""Values and gradients of flashmetric.sentence_transformers against sentence-transformers 6.2.

Warnings are errors here, and a loss that is not fused warns: what agrees is the kernels' result.
"""

from functools import partial

import pytest
import torch

pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses",
    reason="the peer sentence-transformers (6 or later) is missing",
)

from sentence_transformers import util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as peer  # noqa: E402

from flashmetric.sentence_transformers import losses  # noqa: E402
from flashmetric.sentence_transformers.ranking import _logsumexp  # noqa: E402
from presets import BATCHES  # noqa: E402
from sentence_transformers_cases import (  # noqa: E402
    Encoder,
    assert_agree,
    build,
    outcome,
    sentences,
)

DISTANCES = losses.BatchHardTripletLossDistanceFunction
METRICS = losses.SiameseDistanceMetric
TRIPLETS = ("BatchHardTripletLoss", "BatchSemiHardTripletLoss", "BatchAllTripletLoss")
SOFT = "BatchHardSoftMarginTripletLoss"
dtypes = pytest.mark.parametrize("dtype", (torch.float32, torch.float64), ids=str)
batches = pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)


@dtypes
@batches
@pytest.mark.parametrize("name", [*TRIPLETS, SOFT])
def test_triplets(name, labels, dtype):
    ours, theirs = build(name, dtype)
    features, labels = sentences(len(labels)), torch.tensor(labels)
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


@batches
@pytest.mark.parametrize(
    "options",
    [
        {"margin": 0.3, "distance_metric": DISTANCES.cosine_distance},
        {"margin": 0.7, "distance_metric": DISTANCES.eucledian_distance},
        {"margin": 1, "distance_metric": partial(DISTANCES.euclidean_distance, squared=True)},
        {"margin": 1, "distance_metric": partial(DISTANCES.euclidean_distance, squared=False)},
    ],
    ids=["cosine", "eucledian", "squared", "not-squared"],
)
@pytest.mark.parametrize("name", TRIPLETS)
def test_triplets_of_other_distances(name, options, labels):
    ours, theirs = build(name, **options)
    features, labels = sentences(len(labels), seed=1), torch.tensor(labels)
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


@batches
def test_soft_margin_of_cosine_distances(labels):
    ours, theirs = build(SOFT, distance_metric=DISTANCES.cosine_distance)
    features, labels = sentences(len(labels)), torch.tensor(labels)
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


@pytest.mark.parametrize("name", [*TRIPLETS, SOFT])
@pytest.mark.parametrize(
    "labels",
    [
        torch.tensor([[0], [1], [0], [2], [1]]),
        torch.tensor([0.25, 0.5, 0.25, 7.0, 0.5]),
        torch.tensor([True, False, True, True, False]),
        torch.tensor([0, 255, 0, 3, 255], dtype=torch.uint8),
    ],
    ids=["column", "float", "bool", "uint8"],
)
def test_labels_of_any_kind(name, labels):
    ours, theirs = build(name)
    features = sentences(5)
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


PAIR_LABELS = {
    "both": [1, 0, 0, 1, 1, 0, 1],
    "alike": [1, 1, 1, 1],
    "different": [0, 0, 0, 0, 0],
    "one": [1],
}


@dtypes
@pytest.mark.parametrize("labels", PAIR_LABELS.values(), ids=PAIR_LABELS)
@pytest.mark.parametrize("metric", ["COSINE_DISTANCE", "EUCLIDEAN", "MANHATTAN"])
@pytest.mark.parametrize("name", ["ContrastiveLoss", "OnlineContrastiveLoss"])
def test_pairs(name, metric, labels, dtype):
    ours, theirs = build(name, dtype, distance_metric=getattr(METRICS, metric), margin=1.1)
    features, labels = sentences(len(labels), 2), torch.tensor(labels)
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


@pytest.mark.parametrize("metric", ["COSINE_DISTANCE", "EUCLIDEAN"])
def test_pairs_summed(metric):
    ours, theirs = build(
        "ContrastiveLoss", size_average=False, distance_metric=getattr(METRICS, metric)
    )
    features, labels = sentences(6, 2), torch.tensor([1, 0, 1, 1, 0, 0])
    assert_agree(outcome(ours, features, labels), outcome(theirs, features, labels))


@pytest.mark.parametrize("name", ["ContrastiveLoss", "OnlineContrastiveLoss"])
def test_other_labels_than_0_and_1_warn_once(name):
    ours, theirs = build(name, margin=1.0)
    features, labels = sentences(6, 2), torch.tensor([1.0, 0.0, 0.25, 1.0, 0.5, 0.0])
    found = []
    for loss in (ours, theirs):
        with pytest.warns(UserWarning, match="0 or 1"):
            found.append(outcome(loss, features, labels))
    assert_agree(*found)
    assert_agree(outcome(ours, features, labels), found[1])


@pytest.mark.parametrize("metric", ["EUCLIDEAN", "MANHATTAN"])
def test_duplicates_are_as_far_as_the_parent_says(metric):
    # torch.nn.functional.pairwise_distance adds 1e-6 to every difference, so that even a pair of
    # duplicates has a direction to be pushed in.
    x, labels = torch.full((2, 4), 0.3, dtype=torch.float64), torch.tensor([0, 1])
    found = []
    for home in (losses, peer):
        loss = home.ContrastiveLoss(None, distance_metric=getattr(METRICS, metric), margin=1.0)
        first, second = x.clone().requires_grad_(), x.clone().requires_grad_()
        loss.compute_loss_from_embeddings([first, second], labels).backward()
        found.append([first.grad, second.grad])
    assert found[1][0][0].abs().min() > 0.01
    assert_agree(*found, tolerance=1e-9)


@pytest.mark.parametrize("spread", [1.0, 30.0])
@pytest.mark.parametrize("metric", ["EUCLIDEAN", "MANHATTAN"])
@pytest.mark.parametrize("apart", [0.0, 1e-5])
def test_near_pairs_of_long_rows_in_single_precision(apart, metric, spread):
    x = spread * torch.randn(4, 16)
    rows, labels = [x, x + apart], torch.tensor([0, 0, 1, 0])
    found = []
    for home, dtype in ((losses, torch.float32), (peer, torch.float64)):
        loss = home.ContrastiveLoss(None, distance_metric=getattr(METRICS, metric), margin=1.0)
        given = [row.to(dtype).requires_grad_() for row in rows]
        value = loss.compute_loss_from_embeddings(given, labels)
        found.append([value, *torch.autograd.grad(value, given)])
    assert_agree(*found)


@pytest.mark.parametrize("metric", ["euclidean_distance", "cosine_distance"])
@pytest.mark.parametrize("seed", range(4))
def test_one_text_under_two_labels_is_no_negative_farther_than_itself(metric, seed):
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(32) // 4
    centres = torch.randn(8, 384, generator=generator)
    x = torch.randn(32, 384, generator=generator) + 0.5 * centres[labels]
    x = torch.nn.functional.normalize(x)
    x[[5, 11, 30]] = x[[0, 20, 2]]
    found = []
    for home, dtype in ((losses, torch.float32), (peer, torch.float64)):
        options = {"distance_metric": getattr(DISTANCES, metric), "margin": 0.5}
        rows = x.to(dtype).requires_grad_()
        loss = home.BatchSemiHardTripletLoss(None, **options)
        value = loss.compute_loss_from_embeddings([rows], labels)
        found.append([value, *torch.autograd.grad(value, [rows])])
    assert_agree(*found)


DIRECTIONS = {
    "forward": {},
    "symmetric": {
        "directions": ("query_to_doc", "doc_to_query"),
        "partition_mode": "per_direction",
    },
    "forward-alone": {"partition_mode": "per_direction"},
    "symmetric-joint": {"directions": ["doc_to_query", "query_to_doc", "doc_to_query"]},
    "queries": {"directions": ("query_to_doc", "query_to_query")},
    "docs": {"directions": ("query_to_doc", "doc_to_doc")},
    "gte": {"directions": ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")},
}
HARDNESS = {
    "plain": {},
    "in-batch": {"hardness_mode": "in_batch_negatives", "hardness_strength": 9.0},
    "hard": {"hardness_mode": "hard_negatives", "hardness_strength": 5.0},
    "all": {"hardness_mode": "all_negatives", "hardness_strength": 3.0},
}


@pytest.mark.parametrize("columns", [2, 3, 5])
@pytest.mark.parametrize("hardness", HARDNESS.values(), ids=HARDNESS)
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_ranking(directions, hardness, columns):
    ours, theirs = build("MultipleNegativesRankingLoss", **directions, **hardness)
    features = sentences(11, columns)
    assert_agree(outcome(ours, features), outcome(theirs, features))


@pytest.mark.parametrize("columns", [2, 4])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_ranking_in_single_precision(directions, columns):
    options = {"hardness_mode": "all_negatives", "hardness_strength": 2.0, **directions}
    ours, theirs = build("MultipleNegativesRankingLoss", torch.float32, **options)
    features = sentences(40, columns)
    assert_agree(outcome(ours, features), outcome(theirs, features))


@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
@pytest.mark.parametrize(
    "options",
    [
        {"similarity_fct": util.dot_score, "scale": 1.5},
        {"similarity_fct": util.euclidean_sim, "scale": 3},
        {"similarity_fct": util.manhattan_sim, "scale": 0.7},
        {"similarity_fct": util.pytorch_cos_sim, "scale": 50.0},
    ],
    ids=["dot", "euclidean", "manhattan", "cosine"],
)
def test_ranking_by_other_similarities(options, directions):
    ours, theirs = build("MultipleNegativesRankingLoss", **options, **directions, **HARDNESS["all"])
    features = sentences(9, 3)
    assert_agree(outcome(ours, features), outcome(theirs, features))


@pytest.mark.parametrize("columns", [2, 3])
@pytest.mark.parametrize("directions", DIRECTIONS.values(), ids=DIRECTIONS)
def test_ranking_of_one_row(directions, columns):
    # Without a negative the loss is 0; its gradient must not be NaN.
    ours, theirs = build("MultipleNegativesRankingLoss", **directions)
    features = sentences(1, columns)
    assert_agree(outcome(ours, features), outcome(theirs, features))


def test_softmax_of_nothing_has_gradient_0():
    logits = torch.full((2, 3), -torch.inf, requires_grad=True)
    _logsumexp([logits]).sum().backward()
    assert logits.grad is not None and not logits.grad.any()


def test_options_are_read_when_the_loss_is_called():
    ours, theirs = build("MultipleNegativesRankingLoss")
    features = sentences(8, 3)
    for loss in (ours, theirs):
        loss.scale = 3.0
        loss.directions = ("query_to_doc", "doc_to_doc")
    assert_agree(outcome(ours, features), outcome(theirs, features))


@pytest.mark.parametrize("form", ["rows", "autocast"])
@pytest.mark.parametrize(
    ("name", "columns", "options"),
    [
        ("BatchHardTripletLoss", 1, {"distance_metric": DISTANCES.cosine_distance}),
        ("BatchHardTripletLoss", 1, {}),
        ("BatchSemiHardTripletLoss", 1, {}),
        ("BatchAllTripletLoss", 1, {}),
        (SOFT, 1, {}),
        ("ContrastiveLoss", 2, {"distance_metric": METRICS.EUCLIDEAN}),
        ("OnlineContrastiveLoss", 2, {}),
        ("MultipleNegativesRankingLoss", 3, DIRECTIONS["gte"] | HARDNESS["all"]),
        ("CachedMultipleNegativesRankingLoss", 3, DIRECTIONS["symmetric"]),
    ],
)
def test_half_precision_is_that_of_the_rows_alone(name, columns, options, form):
    ours, _ = build(name, torch.float32, **options)
    if form == "rows":
        ours.bfloat16()
    features, labels = sentences(12, columns), torch.arange(12) % 2
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=form == "autocast")
    with autocast:
        value = ours(features, labels)
    value.backward()
    assert value.dtype == torch.float32
    assert all(p.grad is not None and p.grad.isfinite().all() for p in ours.parameters())
    # The parent's, in float64, of the very rows that the model gave.
    with torch.no_grad(), autocast:
        model = ours.model if hasattr(ours, "model") else ours.sentence_embedder
        rows = [model(x)["sentence_embedding"].double() for x in features]
    theirs = getattr(peer, name.removeprefix("Cached"))(Encoder(), **options)
    truth = theirs.compute_loss_from_embeddings(rows, labels)
    assert value.item() == pytest.approx(truth.item(), rel=1e-5)


def test_half_precision_rows_with_a_column_of_hard_negatives_under_autocast():
    rows = [torch.randn(5, 6).half().requires_grad_() for _ in range(3)]
    loss = losses.MultipleNegativesRankingLoss(None)
    with torch.autocast("cpu", torch.bfloat16):
        value = loss.compute_loss_from_embeddings(rows, None)
    truth = peer.MultipleNegativesRankingLoss(None)
    expected = truth.compute_loss_from_embeddings([row.double() for row in rows], None)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
