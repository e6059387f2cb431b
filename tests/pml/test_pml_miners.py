# SPDX-License-Identifier: Apache-2.0
"""Every fused miner of flashmetric.pml against its parent: the same indices in the same order.

Warnings are errors, and distance matrices are forbidden: nothing here is the parent's own result.
"""

import pytest
import torch
from torch import Tensor

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pml_cases import LP, SIMILARITIES, forbid_matrices  # noqa: E402
from pytorch_metric_learning import miners as peer  # noqa: E402
from pytorch_metric_learning.distances import LpDistance, SNRDistance  # noqa: E402

from flashmetric.pml import miners  # noqa: E402

DISTANCES = {**LP, **SIMILARITIES, "snr": SNRDistance}
STRATEGIES = [
    (positive, negative)
    for positive in ("hard", "semihard", "easy", "all")
    for negative in ("hard", "semihard", "easy", "all")
    if {positive, negative} not in ({"semihard"}, {"semihard", "all"})
]
MINERS = [
    *(("BatchEasyHardMiner", strategy) for strategy in STRATEGIES),
    ("BatchHardMiner", ()),
    ("MultiSimilarityMiner", (0.3,)),
    *(("TripletMarginMiner", (0.3, kind)) for kind in ("all", "hard", "semihard", "easy")),
    ("PairMarginMiner", (0.4, 0.7)),
    ("PairMarginMiner", (0.7, 0.4)),
]


def batch(n: int, classes: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    labels[0] = 77  # without a positive
    return torch.randn(n, 6, dtype=torch.float64, generator=generator), labels


def calls() -> dict[str, tuple[Tensor, ...]]:
    x, labels = batch(20, 5)
    refs, ref_labels = batch(23, 6, seed=1)
    return {
        "batch": (x, labels),
        "itself": (x, labels, x, labels),
        "references": (x, labels, refs, ref_labels),
        "one label object": (x, labels, refs[:20], labels),
        "copies": (x, labels, x, labels.clone()),
    }


def assert_same_indices(miner, parent, call):
    found, expected = miner(*call), parent(*call)
    assert len(found) == len(expected)
    for mine, theirs in zip(found, expected, strict=True):
        assert mine.equal(theirs)


@pytest.mark.parametrize("distance", DISTANCES)
@pytest.mark.parametrize(("name", "arguments"), MINERS, ids=str)
def test_same_indices(name, arguments, distance):
    make = DISTANCES[distance]
    miner = getattr(miners, name)(*arguments, distance=make())
    parent = getattr(peer, name)(*arguments, distance=make())
    forbid_matrices(miner)
    for kind, call in calls().items():
        mixed = kind in ("one label object", "copies")
        if name == "MultiSimilarityMiner" and mixed:
            continue
        assert_same_indices_or_sets(miner, parent, call)


def assert_same_indices_or_sets(miner, parent, call):
    """In order, but for the one miner whose parent orders them by distance."""
    if not isinstance(parent, peer.MultiSimilarityMiner):
        assert_same_indices(miner, parent, call)
        return
    found, expected = miner(*call), parent(*call)
    for begin in (0, 2):
        mine, theirs = (
            sorted(zip(*(i.tolist() for i in side[begin : begin + 2]), strict=True))
            for side in (found, expected)
        )
        assert mine == theirs


@pytest.mark.parametrize(
    "ranges", [((0.5, 1.3), None), (None, (0.9, 1.6)), ((0.2, 1.2), (0.8, 1.5))]
)
@pytest.mark.parametrize(("positive", "negative"), STRATEGIES)
def test_allowed_ranges(positive, negative, ranges):
    for make in (LP["l2"], SIMILARITIES["cosine"]):
        options = [1 - torch.tensor(limits).flip(0) if limits else None for limits in ranges]
        limits = (
            ranges if make is LP["l2"] else [o if o is None else tuple(o.tolist()) for o in options]
        )
        miner, parent = (
            home.BatchEasyHardMiner(positive, negative, *limits, distance=make())
            for home in (miners, peer)
        )
        forbid_matrices(miner)
        assert_same_indices(miner, parent, calls()["batch"])
        assert_same_indices(miner, parent, calls()["references"])


@pytest.mark.parametrize("distance", ["l2", "cosine"])
@pytest.mark.parametrize("share", [0.1, 0.5, 1.0])
def test_hardest_share(share, distance):
    make = DISTANCES[distance]
    miner, parent = (home.HDCMiner(share, distance=make()) for home in (miners, peer))
    forbid_matrices(miner)
    for call in calls().values():
        found, expected = miner(*call), parent(*call)
        matrix = make()(*call[::2])
        for mine, theirs in ((found[:2], expected[:2]), (found[2:], expected[2:])):
            # Equal distances, of which one may be chosen, are there twice in a batch.
            torch.testing.assert_close(matrix[mine].sort().values, matrix[theirs].sort().values)
        assert miner.a1.equal(found[0]) and miner.n.equal(found[3])


def test_statistics():
    for strategy in STRATEGIES:
        if "all" in strategy:
            continue
        for make in (LP["l2"], SIMILARITIES["cosine"]):
            miner, parent = (
                home.BatchEasyHardMiner(*strategy, distance=make(), collect_stats=True)
                for home in (miners, peer)
            )
            forbid_matrices(miner)
            for module in (miner, parent):
                module(*calls()["batch"])
            assert miner._record_these_stats == parent._record_these_stats
            for name in parent._record_these_stats:
                assert getattr(miner, name) == pytest.approx(getattr(parent, name))


def test_statistics_of_the_distance():
    miner, parent = (
        home.BatchHardMiner(distance=LpDistance(collect_stats=True)) for home in (miners, peer)
    )
    for module in (miner, parent):
        module(*calls()["references"])
    for name in parent.distance._record_these_stats:
        expected = getattr(parent.distance, name)
        assert expected > 0
        assert getattr(miner.distance, name) == pytest.approx(expected)


@pytest.mark.parametrize("labels", [[1] * 5, [1, 2, 3, 4, 5], [4]], ids=str)
@pytest.mark.parametrize(("name", "arguments"), MINERS, ids=str)
def test_degenerate_batches(name, arguments, labels):
    x, labels = batch(len(labels), 1)[0], torch.tensor(labels)
    miner, parent = (getattr(home, name)(*arguments) for home in (miners, peer))
    assert_same_indices(miner, parent, (x, labels))
    assert all(index.dtype == torch.int64 for index in miner(x, labels))


def test_chosen_from_pairs_set_by_hand():
    x, labels = batch(20, 5)
    indices = tuple(torch.tensor([0, 1, 2, 3]) for _ in range(4))
    miner, parent = miners.HDCMiner(), peer.HDCMiner()
    for module in (miner, parent):
        module.set_idx_externally(indices, labels)
    with pytest.warns(UserWarning, match="HDCMiner.*pairs that were set by hand"):
        found = miner(x, labels)
    for mine, theirs in zip(found, parent(x, labels), strict=True):
        assert mine.equal(theirs)
