# SPDX-License-Identifier: Apache-2.0
"""Every fused loss of flashmetric.pml against its parent: values and gradients, call by call.

Warnings are errors, and distance matrices are forbidden: nothing here is the parent's own result.
"""

import pytest
import torch

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pml_cases import CALLS, SETTINGS, arguments, build, check, forbid_matrices, supported  # noqa: E402
from pytorch_metric_learning import losses as peer  # noqa: E402
from pytorch_metric_learning.distances import CosineSimilarity, LpDistance  # noqa: E402
from pytorch_metric_learning.reducers import (  # noqa: E402  # noqa: E402
    DoNothingReducer,
    MeanReducer,
    MultipleReducers,
    SumReducer,
)

from flashmetric.pml import losses, miners  # noqa: E402
from presets import labelled_rows  # noqa: E402

CASES = [
    pytest.param(name, options, call, id=f"{setting}-{call}")
    for setting, name, options in SETTINGS
    for call in CALLS
    if supported(name, setting, call)
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "options", "call"), CASES)
def test_same_loss_and_gradient(name, options, call, dtype):
    ours, theirs = build(name, options)
    forbid_matrices(ours)
    check(ours, theirs, *arguments(call, dtype))


MINERS = {
    "batch-hard": lambda: miners.BatchHardMiner(),
    "semihard": lambda: miners.TripletMarginMiner(type_of_triplets="semihard"),
    "easy-all": lambda: miners.BatchEasyHardMiner("easy", "all"),
    "multi-similarity": lambda: miners.MultiSimilarityMiner(),
    "pair-margin": lambda: miners.PairMarginMiner(pos_margin=0.4, neg_margin=1.1),
}
MINED = {setting: (name, options) for setting, name, options in SETTINGS}
MINED = {name: options for name, options in dict(MINED.values()).items() if name[:6] != "Ranked"}


@pytest.mark.parametrize("miner", MINERS)
@pytest.mark.parametrize("name", MINED)
def test_of_mined_indices(name, miner):
    ours, theirs = build(name, MINED[name])
    forbid_matrices(ours)
    x, (labels,), _ = arguments("batch", torch.float64)
    check(ours, theirs, x, (labels, MINERS[miner]()(x, labels)), None)


@pytest.mark.parametrize("classes", [None, 8])
@pytest.mark.parametrize("call", CALLS)
def test_margin_with_learned_boundaries(call, classes):
    for reducer in (None, MeanReducer(), SumReducer()):
        ours, theirs = (
            home.MarginLoss(nu=0.3, learn_beta=True, num_classes=classes, reducer=reducer).double()
            for home in (losses, peer)
        )
        forbid_matrices(ours)
        check(ours, theirs, *arguments(call, torch.float64))


@pytest.mark.parametrize("name", ["TripletMarginLoss", "MarginLoss"])
def test_random_triplets_are_those_of_the_parent(name):
    ours, theirs = (getattr(home, name)(triplets_per_anchor=5) for home in (losses, peer))
    forbid_matrices(ours)
    x, (labels,), _ = arguments("batch", torch.float32)
    torch.manual_seed(3)
    expected = theirs(x, labels)
    torch.manual_seed(3)
    torch.testing.assert_close(ours(x, labels), expected)


@pytest.mark.parametrize("smooth", [False, True])
def test_swap_of_listed_triplets(smooth):
    for distance in (LpDistance(), CosineSimilarity()):
        ours, theirs = (
            home.TripletMarginLoss(0.4, swap=True, smooth_loss=smooth, distance=distance)
            for home in (losses, peer)
        )
        call = arguments("triplets", torch.float64)
        check(ours, theirs, *call)


def test_a_reducer_of_each_sub_loss():
    def reducers():
        return MultipleReducers({"pos_loss": SumReducer()}, default_reducer=MeanReducer())

    ours, theirs = (home.ContrastiveLoss(reducer=reducers()) for home in (losses, peer))
    forbid_matrices(ours)
    check(ours, theirs, *arguments("batch", torch.float64))


def test_losses_that_are_not_reduced():
    ours, theirs = (home.SupConLoss(reducer=DoNothingReducer()) for home in (losses, peer))
    forbid_matrices(ours)
    x, (labels,), _ = arguments("batch", torch.float64)
    mine, expected = ours(x, labels)["loss"], theirs(x, labels)["loss"]
    assert mine["reduction_type"] == expected["reduction_type"]
    torch.testing.assert_close(mine["losses"], expected["losses"])
    assert mine["indices"].equal(expected["indices"])


@pytest.mark.parametrize(
    "name", ["TripletMarginLoss", "ContrastiveLoss", "NTXentLoss", "MarginLoss", "SupConLoss"]
)
def test_statistics(name):
    """Also those that reducers and distances collect, of losses that are not listed."""
    made = [_with_statistics(home, name) for home in (losses, peer)]
    forbid_matrices(made[0])
    calls = [arguments(kind, torch.float64) for kind in ("batch", "references")]
    for x, (labels, *rest), refs in calls:
        for loss in made:
            loss(x, labels, None, refs, *rest[1:])
        for mine, theirs in zip(*(loss.modules() for loss in made), strict=True):
            for record in getattr(theirs, "_record_these_stats", []):
                expected = pytest.approx(getattr(theirs, record))
                assert getattr(mine, record) == expected, (type(mine).__name__, record)


def _with_statistics(home, name):
    loss = getattr(home, name)(collect_stats=True)
    distance, reducer = type(loss.distance), type(loss.reducer)
    if reducer is MultipleReducers:
        reducer = type(next(iter(loss.reducer.reducers.values())))
    options = {"distance": distance(collect_stats=True), "reducer": reducer(collect_stats=True)}
    return getattr(home, name)(collect_stats=True, **options)


BY_DEFAULT = sorted({name for _, name, _ in SETTINGS} - {"RankedListLoss", "SoftTripleLoss"})


@pytest.mark.filterwarnings("ignore:std")  # the parent's, of one row
@pytest.mark.parametrize(
    "labels", [[1] * 5, [1, 2, 3, 4, 5], [4], [3, 3], [3, 4], [0, 0, 1]], ids=str
)
@pytest.mark.parametrize("name", BY_DEFAULT)
def test_degenerate_batches(name, labels):
    x, _ = labelled_rows(len(labels), 6, 1)
    ours, theirs = getattr(losses, name)(), getattr(peer, name)()
    labels = torch.tensor(labels)
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    values = [loss(leaf, labels) for loss, leaf in zip((ours, theirs), leaves, strict=True)]
    torch.testing.assert_close(*values, equal_nan=True)
    if not values[1].isnan():
        for value in values:
            value.backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)


@pytest.mark.parametrize("sizes", [(1, 1), (1, 2), (2, 1), (1, 3), (2, 2)], ids=str)
def test_few_pairs_with_references(sizes):
    """One pair of each kind is no pair to the parent."""
    x, refs = (labelled_rows(n, 6, 1, seed=n)[0] for n in sizes)
    for labels, ref_labels in (([0, 0], [0, 1, 0]), ([0, 1], [1, 1, 2]), ([0, 1], [0, 0, 0])):
        labels, ref_labels = torch.tensor(labels[: sizes[0]]), torch.tensor(ref_labels[: sizes[1]])
        for name in ("ContrastiveLoss", "MultiSimilarityLoss", "NTXentLoss", "LiftedStructureLoss"):
            ours, theirs = getattr(losses, name)(), getattr(peer, name)()
            check(ours, theirs, x, (labels, None, ref_labels), refs)


def test_one_listed_pair_of_each_kind():
    x, (labels,), _ = arguments("batch", torch.float64)
    indices = tuple(torch.tensor([i]) for i in (1, 5, 1, 2))
    for name in ("ContrastiveLoss", "MultiSimilarityLoss"):
        assert getattr(losses, name)()(x, labels, indices) == 0


@pytest.mark.parametrize("kind", [torch.float32, torch.int32, torch.uint8, torch.bool])
def test_labels_of_any_dtype(kind):
    x, (labels,), _ = arguments("batch", torch.float64)
    labels = (labels * 0.5 - 1).to(kind) if kind == torch.float32 else labels.to(kind)
    for name in ("TripletMarginLoss", "SupConLoss", "NCALoss"):
        check(getattr(losses, name)(), getattr(peer, name)(), x, (labels,), None)


def test_pairs_that_are_positive_and_negative():
    x, (labels,), _ = arguments("batch", torch.float64)
    row = torch.tensor([1, 2])
    indices = (row, row + 4, row, row + 4)
    for home in (losses, peer):
        with pytest.raises(AssertionError, match="either be positive or negative"):
            home.MultiSimilarityLoss()(x, labels, indices)
