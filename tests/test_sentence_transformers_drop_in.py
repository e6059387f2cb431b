# SPDX-License-Identifier: Apache-2.0
"""flashmetric.sentence_transformers in the place of its parent: names, fallback, differences."""

import contextlib
import copy
import importlib
import inspect
import pickle
import sys
import warnings
import weakref
from functools import partial

import pytest
import torch

pytest.importorskip(
    "sentence_transformers.sentence_transformer.losses",
    reason="the peer sentence-transformers (6 or later) is missing",
)

from sentence_transformers import SentenceTransformer, util  # noqa: E402
from sentence_transformers.sentence_transformer import losses as peer  # noqa: E402

import flashmetric.sentence_transformers as package  # noqa: E402
from flashmetric.sentence_transformers import NotFusedWarning, losses  # noqa: E402
from sentence_transformers_cases import (  # noqa: E402
    Encoder,
    assert_agree,
    build,
    outcome,
    sentences,
)

DISTANCES = losses.BatchHardTripletLossDistanceFunction
OURS = [name for name in losses.__all__ if getattr(losses, name).__module__[:5] == "flash"]
DEPRECATED = [name for name in OURS if "Symmetric" in name]
FUSED = [name for name in OURS if name not in DEPRECATED]
OPTIONS = {
    "BatchHardTripletLoss": {"margin": 0.4},
    "ContrastiveLoss": {"distance_metric": losses.SiameseDistanceMetric.MANHATTAN},
    "OnlineContrastiveLoss": {"margin": 2.0},
    "MultipleNegativesRankingLoss": {"directions": ("query_to_doc", "doc_to_query"), "scale": 9.0},
    "CachedMultipleNegativesRankingLoss": {"hardness_mode": "hard_negatives", "mini_batch_size": 3},
}


def test_every_name():
    assert set(losses.__all__) == set(peer.__all__)
    assert (len(FUSED), len(DEPRECATED)) == (8, 2)
    assert set(OURS) < set(package.__all__)
    for name in peer.__all__:
        for other in peer.__all__:
            if issubclass(getattr(peer, name), getattr(peer, other)):
                assert issubclass(getattr(losses, name), getattr(losses, other))
        assert issubclass(getattr(losses, name), getattr(peer, name))


@pytest.mark.filterwarnings("ignore:hardness_mode")
@pytest.mark.parametrize("name", FUSED)
def test_what_a_model_card_reads(name):
    ours, theirs = build(name, **OPTIONS.get(name, {}))
    assert type(ours).__name__ == type(theirs).__name__
    assert inspect.signature(type(ours)) == inspect.signature(type(theirs))
    assert ours.get_config_dict() == theirs.get_config_dict()
    assert getattr(ours, "citation", None) == getattr(theirs, "citation", None)
    assert getattr(ours, "temperature", None) == getattr(theirs, "temperature", None)
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert set(vars(ours)) == set(vars(theirs))


@pytest.mark.parametrize("name", OURS)
def test_what_a_model_card_calls_it(name):
    kind = getattr(losses, name)
    assert util.fullname(kind) == f"flashmetric.sentence_transformers.losses.{name}"
    assert getattr(importlib.import_module(kind.__module__), name) is kind


@pytest.mark.parametrize("name", DEPRECATED)
def test_deprecated_names(name):
    with pytest.warns(DeprecationWarning, match="directions=") as caught:
        ours, theirs = build(name, scale=9.0)
    assert [w.filename.endswith("sentence_transformers_cases.py") for w in caught] == [True] * 2
    assert ours.get_config_dict() == theirs.get_config_dict()
    features = sentences(6, 2)
    assert_agree(outcome(ours, features), outcome(theirs, features))


@pytest.mark.parametrize("name", FUSED)
def test_copies(name):
    ours, _ = build(name)
    features, labels = sentences(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    expected = outcome(ours, features, labels)
    for again in (copy.deepcopy(ours), None if "Contrastive" in name else _pickled(ours)):
        if again is not None:
            assert all(map(torch.equal, outcome(again, features, labels), expected))


def _pickled(loss):
    return pickle.loads(pickle.dumps(loss))


def absent(monkeypatch, *names):
    for name in names:
        monkeypatch.setitem(sys.modules, name, None)
    return pytest.raises(
        ImportError, match=r"python -m pip install 'flashmetric\[sentence-transformers\]'"
    )


def test_missing_package(monkeypatch):
    with absent(monkeypatch, "sentence_transformers"):
        importlib.reload(package)


def test_package_of_an_earlier_release(monkeypatch):
    inside = "sentence_transformers.sentence_transformer"
    with absent(monkeypatch, inside, f"{inside}.losses"):
        importlib.reload(package)


def test_package_whose_own_requirement_is_missing(monkeypatch):
    inside = "sentence_transformers.sentence_transformer.losses"

    class Broken:
        @staticmethod
        def find_spec(name, path, target=None):
            if name == inside:
                raise ModuleNotFoundError("No module named 'transformers'", name="transformers")

    monkeypatch.delitem(sys.modules, inside)
    monkeypatch.setattr(sys, "meta_path", [Broken, *sys.meta_path])
    with pytest.raises(ModuleNotFoundError, match="transformers") as caught:
        importlib.reload(package)
    assert caught.value.name == "transformers"


def own_similarity(a, b):
    return util.cos_sim(a, b) ** 3


def own_distance(embeddings):
    return torch.cdist(embeddings, embeddings, 3)


def own_pair_distance(x, y):
    return (x - y).abs().amax(1)


REASONS = {
    "hard": ("BatchHardTripletLoss", {"distance_metric": own_distance}, "own_distance has no"),
    "soft": (
        "BatchHardSoftMarginTripletLoss",
        {"distance_metric": own_distance},
        "own_distance has no",
    ),
    "semi-hard": ("BatchSemiHardTripletLoss", {"distance_metric": own_distance}, "own_distance"),
    "all": ("BatchAllTripletLoss", {"margin": torch.tensor(0.3)}, "margin is a tensor"),
    "pairs": (
        "ContrastiveLoss",
        {"distance_metric": own_pair_distance},
        "own_pair_distance is not",
    ),
    "online": ("OnlineContrastiveLoss", {"distance_metric": own_pair_distance}, "own_pair_dist"),
    "similarity": (
        "MultipleNegativesRankingLoss",
        {"similarity_fct": own_similarity},
        "own_similarity has no kernel",
    ),
    "scale": (
        "MultipleNegativesRankingLoss",
        {"scale": torch.tensor(4.0)},
        "scale is a tensor",
    ),
    "cached": (
        "CachedMultipleNegativesRankingLoss",
        {"similarity_fct": own_similarity, "mini_batch_size": 2},
        "own_similarity has no kernel",
    ),
}


@pytest.mark.parametrize(("name", "options", "reason"), REASONS.values(), ids=REASONS)
def test_fallback_is_the_parents_and_warns_once(name, options, reason):
    ours, theirs = build(name, **options)
    features, labels = sentences(6, 2), torch.tensor([0, 1, 0, 1, 1, 0])
    with pytest.warns(NotFusedWarning, match=f"{name} is computed by .*: .*{reason}") as caught:
        found = outcome(ours, features, labels)
    assert caught[0].filename.endswith("sentence_transformers_cases.py")
    assert all(map(torch.equal, found, outcome(theirs, features, labels)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        outcome(ours, features, labels)


def test_embeddings_that_no_kernel_takes():
    x = torch.randn(6, 3, dtype=torch.complex64)
    loss = losses.BatchHardTripletLoss(None)
    with pytest.warns(NotFusedWarning, match="complex64"), pytest.raises(RuntimeError):
        loss.compute_loss_from_embeddings([x], torch.arange(6) % 2)


@pytest.mark.parametrize("name", ["cosine", "dot", "euclidean", "manhattan"])
def test_similarity_of_the_model(name):
    model = SentenceTransformer(modules=[Encoder().double()], similarity_fn_name=name)
    rows = [torch.randn(7, 6, dtype=torch.float64, requires_grad=True) for _ in range(3)]
    found = []
    for home in (losses, peer):
        loss = home.MultipleNegativesRankingLoss(model, 2.0, similarity_fct=model.similarity)
        value = loss.compute_loss_from_embeddings(rows, None)
        found.append([value, *torch.autograd.grad(value, rows)])
    assert_agree(*found)


class OwnSimilarity(SentenceTransformer):
    def similarity(self, embeddings1, embeddings2):
        return own_similarity(embeddings1, embeddings2)


def replaced_similarity():
    model = SentenceTransformer(modules=[Encoder()], similarity_fn_name="dot")
    model._similarity = own_similarity
    return model


@pytest.mark.parametrize(
    "make", [lambda: OwnSimilarity(modules=[Encoder()]), replaced_similarity], ids=["own", "set"]
)
def test_similarity_that_a_model_overrides(make):
    model = make()
    rows = [torch.randn(7, 6, dtype=torch.float64) for _ in range(2)]
    values = []
    for home in (losses, peer):
        loss = home.MultipleNegativesRankingLoss(model, 2.0, similarity_fct=model.similarity)
        context = pytest.warns(NotFusedWarning) if home is losses else contextlib.nullcontext()
        with context:
            values.append(loss.compute_loss_from_embeddings(rows, None))
    assert values[0].equal(values[1])


@pytest.mark.parametrize("name", FUSED)
def test_wrong_number_of_labels_or_columns(name):
    ours, _ = build(name)
    features = sentences(6, 1 if "Ranking" in name else 2)
    if "Ranking" in name:
        with pytest.raises(ValueError, match="at least 2|at least two"):
            ours(features, None)
        return
    with pytest.raises(ValueError, match=f"labels of {name} must be 6, .*; got 5 of shape"):
        ours(features, torch.zeros(5, dtype=torch.int64))
    if "Contrastive" in name:
        with pytest.raises(ValueError, match="two columns of sentences; got 3"):
            ours(sentences(6, 3), torch.zeros(6, dtype=torch.int64))


@pytest.mark.parametrize("name", FUSED)
def test_nothing_of_the_size_of_all_pairs_is_kept_for_backward(name):
    n = 256
    options = {"margin": 0.2} if "Batch" in name and "Soft" not in name else {}
    if name == "MultipleNegativesRankingLoss":
        options["directions"] = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")
    columns = 1 if "Triplet" in name else 2
    sizes = {}
    for home in (losses, peer):
        rows = [torch.randn(n, 4, requires_grad=True) for _ in range(columns)]
        loss, kept = getattr(home, name)(Encoder(), **options), weakref.WeakSet()

        def keep(x, kept=kept):
            box = Box(x)
            kept.add(box)
            return box

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda box: box.tensor):
            if name.startswith("Cached"):
                value = loss.calculate_loss([[x] for x in rows])
            else:
                labels = torch.arange(n) // 4
                labels = labels if columns == 1 else labels % 2
                value = loss.compute_loss_from_embeddings(rows, labels)
        sizes[home] = max(box.tensor.numel() for box in kept)
        del value
    assert sizes[losses] < n * 16
    if "Contrastive" not in name:
        assert sizes[peer] >= n * 32


class Box:
    """Holds a tensor for as long as the graph needs it."""

    def __init__(self, tensor):
        self.tensor = tensor


class TestDifferences:
    """Where the results are meant to differ. If the parent changes, these fail and say so."""

    def both(self, name, rows, labels, **options):
        for home in (losses, peer):
            leaves = [torch.tensor(x).requires_grad_() for x in rows]
            loss = getattr(home, name)(None, **options)
            value = loss.compute_loss_from_embeddings(leaves, torch.tensor(labels))
            value.backward()
            yield value.detach(), leaves[0].grad

    def test_hinge_at_exactly_zero(self):
        # Hinges are 1 - 7 + 6 = 0, 1 - 6 + 6 = 1 and 0 - 6 + 6 = 0.
        rows, labels = [[[0.0], [1.0], [7.0]]], [0, 0, 1]
        (value, grad), (peers_value, peers_grad) = self.both(
            "BatchHardTripletLoss", rows, labels, margin=6.0
        )
        assert value == peers_value
        assert grad.flatten().tolist() == pytest.approx([-1 / 3, 2 / 3, -1 / 3])
        assert peers_grad.flatten().tolist() == pytest.approx([-1 / 3, 4 / 3, -1])

    def test_semi_hard_hinge_at_exactly_zero(self):
        rows, labels = [[[0.0], [1.0], [7.0]]], [0, 0, 1]
        (value, grad), (peers_value, peers_grad) = self.both(
            "BatchSemiHardTripletLoss", rows, labels, margin=6.0
        )
        assert value == peers_value
        assert grad.flatten().tolist() == pytest.approx([-1 / 2, 1, -1 / 2])
        assert peers_grad.flatten().tolist() == pytest.approx([-1 / 2, 1.25, -3 / 4])

    def test_batch_all_without_an_active_triplet(self):
        rows, labels = [[[0.0], [1.0], [7.0]]], [0, 0, 1]
        squared = partial(DISTANCES.euclidean_distance, squared=True)
        # The hinges are 1 - 49 + 35 = -13 and 1 - 36 + 35 = 0.
        (value, grad), (peers_value, peers_grad) = self.both(
            "BatchAllTripletLoss", rows, labels, margin=35.0, distance_metric=squared
        )
        assert peers_value == 0
        assert peers_grad.abs().max() > 1e15
        # The implementation in PyTorch may be off by a rounding, and see one active triplet.
        assert value < 1e-5
        assert grad.abs().max() < 100

    def test_near_duplicates_far_from_the_origin(self):
        rows, labels = [[[100.0, 0.0], [100.0, 0.001], [0.0, 0.0], [0.0, 3.0]]], [0, 0, 1, 1]
        (value, grad), (_, peers_grad) = self.both(
            "BatchAllTripletLoss", rows, labels, margin=101.0
        )
        exact = losses.BatchAllTripletLoss(None, margin=101.0)
        x = torch.tensor(rows[0], dtype=torch.float64, requires_grad=True)
        truth = exact.compute_loss_from_embeddings([x], torch.tensor(labels))
        truth.backward()
        assert value.item() == pytest.approx(truth.item(), rel=1e-5)
        assert torch.allclose(grad.double(), x.grad, atol=1e-3)
        # The gradient that pulls the near-duplicates together is lost.
        assert not torch.allclose(peers_grad.double(), x.grad, atol=0.1)

    @pytest.mark.parametrize(
        ("name", "columns", "options"),
        [
            (
                "BatchHardTripletLoss",
                1,
                {"distance_metric": DISTANCES.cosine_distance},
            ),
            ("ContrastiveLoss", 2, {}),
            ("MultipleNegativesRankingLoss", 2, {}),
        ],
    )
    def test_zero_row(self, name, columns, options):
        rows = [[[0.0, 0.0], [3.0, 4.0], [1.0, 2.0]], [[1.0, 2.0], [1.0, 1.0], [3.0, 0.0]]]
        (value, grad), (peers_value, peers_grad) = self.both(
            name, rows[:columns], [1, 1, 0], **options
        )
        assert value.item() == pytest.approx(peers_value.item(), rel=1e-6)
        assert not grad[0].any() and grad.isfinite().all()
        assert peers_grad[0].norm() > 1e6

    def test_nan_is_no_hard_pair_of_the_parent(self):
        rows = [[[0.0, 1.0], [torch.nan, 4.0]], [[1.0, 2.0], [1.0, 1.0]]]
        (value, _), (peers_value, _) = self.both("OnlineContrastiveLoss", rows, [0, 1])
        assert value.isnan()
        assert peers_value == 0

    def test_losses_of_separated_pairs_keep_their_digits(self):
        x = torch.eye(3).tolist()
        (value, grad), (peers_value, _) = self.both("MultipleNegativesRankingLoss", [x, x], [0])
        exact = torch.tensor(2 * torch.e**-20, dtype=torch.float64).log1p()
        assert value.item() == pytest.approx(exact.item(), rel=1e-5)
        assert grad.any()
        assert peers_value == 0

    def test_empty_batch(self):
        x, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        for name in ("BatchHardTripletLoss", "BatchSemiHardTripletLoss", "BatchAllTripletLoss"):
            loss = getattr(losses, name)(None)
            assert loss.compute_loss_from_embeddings([x], labels) == 0
        with pytest.raises(IndexError):
            peer.BatchHardTripletLoss(None).compute_loss_from_embeddings([x], labels)
