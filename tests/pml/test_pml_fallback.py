# SPDX-License-Identifier: Apache-2.0
"""What the kernels cannot compute: the parent's result, and one warning that says why."""

import copy
import warnings

import pytest
import torch

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pml_cases import arguments, check  # noqa: E402
from pytorch_metric_learning import losses as peer  # noqa: E402
from pytorch_metric_learning import miners as peer_miners  # noqa: E402
from pytorch_metric_learning.distances import (  # noqa: E402
    BaseDistance,
    CosineSimilarity,
    LpDistance,
)
from pytorch_metric_learning.reducers import (  # noqa: E402
    AvgNonZeroReducer,
    ClassWeightedReducer,
    DoNothingReducer,
    MeanReducer,
    PerAnchorReducer,
    ThresholdReducer,
)

from flashmetric.pml import losses, miners  # noqa: E402
from flashmetric.pml.fallback import NotFusedWarning  # noqa: E402


class Own(BaseDistance):
    def compute_mat(self, query_emb, ref_emb):
        return torch.cdist(query_emb, ref_emb, p=3)


class OwnCosine(CosineSimilarity):
    def normalize(self, embeddings, dim=1, **kwargs):
        return embeddings / 3


REASONS = {
    "own distance": ("SupConLoss", lambda: {"distance": Own()}, "the distance Own has"),
    "subclass": ("NTXentLoss", lambda: {"distance": OwnCosine()}, "OwnCosine has no kernel"),
    "p=3": ("TripletMarginLoss", lambda: {"distance": LpDistance(p=3)}, r"LpDistance\(p=3"),
    "power": ("MarginLoss", lambda: {"distance": LpDistance(power=3)}, "power=3"),
    "cosine power": ("NCALoss", lambda: {"distance": CosineSimilarity(power=2)}, "power=2"),
    "classes": (
        "TripletMarginLoss",
        lambda: {"reducer": ClassWeightedReducer(torch.arange(9.0))},
        "ClassWeightedReducer wants the list of all losses",
    ),
    "anchors": ("NTXentLoss", lambda: {"reducer": PerAnchorReducer()}, "PerAnchorReducer wants"),
    "above": ("ContrastiveLoss", lambda: {"reducer": ThresholdReducer(low=0.1)}, "Threshold"),
    "rounded": ("NTXentLoss", lambda: {"reducer": AvgNonZeroReducer()}, "round to 0"),
    "swap": ("TripletMarginLoss", lambda: {"swap": True}, "swap compares"),
    "smooth": (
        "TripletMarginLoss",
        lambda: {"smooth_loss": True, "distance": LpDistance(normalize_embeddings=False)},
        "rounds to 0",
    ),
    "tensor": ("TripletMarginLoss", lambda: {"margin": torch.tensor(0.1)}, "margin is a tensor"),
    "weights": ("RankedListLoss", lambda: {"margin": 0.4, "Tn": 2}, "Tn or Tp above 0"),
    "similarity": (
        "RankedListLoss",
        lambda: {"margin": 0.4, "Tn": 0, "distance": CosineSimilarity()},
        "similarities for distances",
    ),
    "histogram": ("FastAPLoss", lambda: {"distance": LpDistance()}, "power=2"),
    "angles": ("AngularLoss", lambda: {"collect_stats": True}, "statistics are of the angles"),
    "tuplet angles": ("TupletMarginLoss", lambda: {"collect_stats": True}, "statistics are of"),
}


@pytest.mark.parametrize("reason", REASONS)
def test_one_warning_says_why(reason):
    name, options, words = REASONS[reason]
    ours, theirs = getattr(losses, name)(**options()), getattr(peer, name)(**options())
    call = arguments("batch", torch.float64)
    with pytest.warns(NotFusedWarning, match=f"{name} is computed by .*{words}") as caught:
        check(ours, theirs, *call)
    assert len(caught) == 1 and caught[0].filename.endswith("pml_cases.py")
    check(ours, theirs, *call)  # a second warning would be an error
    with pytest.warns(NotFusedWarning):
        getattr(losses, name)(**options())(call[0], *call[1])


def test_losses_that_are_not_reduced():
    ours, theirs = (home.ContrastiveLoss(reducer=DoNothingReducer()) for home in (losses, peer))
    x, (labels,), _ = arguments("batch", torch.float64)
    with pytest.warns(NotFusedWarning, match="DoNothingReducer wants the list"):
        mine = ours(x, labels)
    for name, expected in theirs(x, labels).items():
        assert mine[name]["losses"].equal(expected["losses"])


def test_formula_of_a_subclass():
    class Quadratic(losses.ContrastiveLoss):
        def pos_calc(self, pos_pair_dist, margin):
            return pos_pair_dist**2

    class Renamed(losses.ContrastiveLoss):
        def forward(self, *call):
            return 2 * super().forward(*call)

    x, (labels,), _ = arguments("batch", torch.float64)
    with pytest.warns(NotFusedWarning, match="Quadratic has a pos_calc of its own"):
        value = Quadratic()(x, labels)
    assert value != losses.ContrastiveLoss()(x, labels)
    assert Renamed()(x, labels) == 2 * losses.ContrastiveLoss()(x, labels)


def test_attributes_that_no_longer_fit():
    ours, theirs = losses.CircleLoss(), peer.CircleLoss()
    ours.op = theirs.op = 1.1
    with pytest.warns(NotFusedWarning, match="op, on, delta_p or delta_n"):
        check(ours, theirs, *arguments("batch", torch.float64))


def test_attributes_that_changed():
    ours, theirs = losses.TripletMarginLoss(), peer.TripletMarginLoss()
    for loss in (ours, theirs):
        loss.margin, loss.reducer = 0.7, MeanReducer()
    check(ours, theirs, *arguments("batch", torch.float64))


def test_references_without_labels():
    x, (labels,), _ = arguments("batch", torch.float64)
    refs = torch.flip(x, (0,))
    ours, theirs = losses.ContrastiveLoss(), peer.ContrastiveLoss()
    with pytest.warns(NotFusedWarning, match="ref_emb came without ref_labels"):
        value = ours(x, labels, None, refs)
    torch.testing.assert_close(value, theirs(x, labels, None, refs))


@pytest.mark.parametrize("name", ["PairMarginMiner", "TripletMarginMiner", "BatchEasyHardMiner"])
def test_miners_that_collect_statistics(name):
    x, (labels,), _ = arguments("batch", torch.float64)
    options = {"collect_stats": True}
    if name == "BatchEasyHardMiner":
        options["pos_strategy"], options["neg_strategy"] = "all", "hard"
    miner, parent = (getattr(home, name)(**options) for home in (miners, peer_miners))
    with pytest.warns(NotFusedWarning, match=f"{name}.*statistics") as caught:
        found = miner(x, labels), miner(x, labels)
    assert len(caught) == 1
    parent(x, labels)
    assert len(found[0]) == len(found[1])
    for record in parent._record_these_stats:
        assert getattr(miner, record) == getattr(parent, record)


def test_miners_with_a_distance_of_ones_own():
    x, (labels,), _ = arguments("batch", torch.float64)
    miner, parent = (home.BatchHardMiner(distance=Own()) for home in (miners, peer_miners))
    with pytest.warns(NotFusedWarning, match="BatchHardMiner .*the distance Own"):
        found = miner(x, labels)
    assert all(a.equal(b) for a, b in zip(found, parent(x, labels), strict=True))


def test_a_copy_of_one_that_warned_does_not_warn_again():
    loss = losses.SupConLoss(distance=Own())
    x, (labels,), _ = arguments("batch", torch.float64)
    with pytest.warns(NotFusedWarning):
        loss(x, labels)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        copy.deepcopy(loss)(x, labels)


@pytest.mark.parametrize("name", ["FastAPLoss", "NPairsLoss", "SoftTripleLoss", "RankedListLoss"])
def test_errors_are_those_of_the_parent(name):
    options = {
        "SoftTripleLoss": {"num_classes": 8, "embedding_size": 6},
        "RankedListLoss": {"margin": 0.4, "Tn": 0},
    }.get(name, {})
    x, (labels,), _ = arguments("batch", torch.float64)
    for home in (losses, peer):
        loss = getattr(home, name)(**options)
        with pytest.raises(ValueError, match="ref_emb is not supported"):
            loss(x, labels, None, x.clone(), labels)
        with pytest.raises(ValueError, match="labels are required"):
            loss(x)
    for home in (losses, peer):
        with pytest.raises(ValueError, match="cannot both be None"):
            home.TripletMarginLoss()(x)
        with pytest.raises(ValueError, match="1D tensor"):
            home.TripletMarginLoss()(x, labels.unsqueeze(1))
        with pytest.raises(ValueError, match="2D tensor"):
            home.TripletMarginLoss()(x.unsqueeze(2), labels)
