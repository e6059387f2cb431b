# SPDX-License-Identifier: Apache-2.0
"""Miners against those of pytorch-metric-learning 2.9: the same sets of pairs and triplets."""

import pytest
import torch
from torch import Tensor

from flashmetric import miners as ours
from flashmetric.losses import TripletMarginLoss

pytest.importorskip("pytorch_metric_learning", reason="the peer pytorch-metric-learning is missing")

from pytorch_metric_learning import distances, losses, miners  # noqa: E402

STRATEGIES = [
    (pos, neg)
    for pos in ("hard", "semihard", "easy", "all")
    for neg in ("hard", "semihard", "easy", "all")
    if {pos, neg} not in ({"semihard"}, {"semihard", "all"})
]
# torch.cdist, on which the peer stands, changes its formula above 25 rows.
SIZES = (20, 40)


def batch(n: int, classes: int = 5, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % classes
    labels[0] = 77  # without a positive
    return torch.randn(n, 6, dtype=torch.float64, generator=generator), labels


def sets(found: tuple[Tensor, ...]) -> list[set]:
    columns = [index.tolist() for index in found]
    parts = [columns] if len(columns) == 3 else [columns[:2], columns[2:]]
    return [set(zip(*part, strict=True)) for part in parts]


def check(miner, peer, n: int) -> None:
    given = batch(n)
    refs = batch(n + 3, 6, seed=1)
    for arguments in (given, (*given, *refs)):
        found, expected = miner(*arguments), peer(*arguments)
        assert sets(found) == sets(expected)
        assert len(found) == len(expected)
        assert [len(index) for index in found] == [len(index) for index in expected]


@pytest.mark.parametrize("n", SIZES)
def test_batch_hard(n: int) -> None:
    check(ours.BatchHardMiner(), miners.BatchHardMiner(), n)
    cosine = miners.BatchHardMiner(distance=distances.CosineSimilarity())
    check(ours.BatchHardMiner(distance="cosine"), cosine, n)
    plain = miners.BatchHardMiner(distance=distances.LpDistance(normalize_embeddings=False))
    check(ours.BatchHardMiner(normalize=False), plain, n)
    dot = miners.BatchHardMiner(distance=distances.DotProductSimilarity(normalize_embeddings=False))
    check(ours.BatchHardMiner(distance="dot", normalize=False), dot, n)


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize(("pos", "neg"), STRATEGIES)
def test_easy_hard(pos: str, neg: str, n: int) -> None:
    for ranges in ((None, None), ((0.5, 1.3), None), (None, (0.9, 1.6)), ((0.2, 1.2), (0.8, 1.5))):
        check(
            ours.BatchEasyHardMiner(pos, neg, *ranges),
            miners.BatchEasyHardMiner(pos, neg, *ranges),
            n,
        )


@pytest.mark.parametrize("n", SIZES)
def test_semi_hard_per_anchor(n: int) -> None:
    given = batch(n)
    a, p, _, neg = miners.BatchEasyHardMiner("hard", "semihard")(*given)
    assert sets(ours.SemiHardMiner.preset("pml")(*given)) == sets((a, p, neg))


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("type_of_triplets", ["all", "hard", "semihard", "easy"])
def test_triplet_margin(type_of_triplets: str, n: int) -> None:
    for margin in (0.2, 0.05):
        check(
            ours.TripletMarginMiner(margin, type_of_triplets),
            miners.TripletMarginMiner(margin, type_of_triplets),
            n,
        )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.0])
def test_multi_similarity(epsilon: float, n: int) -> None:
    check(ours.MultiSimilarityMiner(epsilon), miners.MultiSimilarityMiner(epsilon), n)
    check(
        ours.MultiSimilarityMiner(epsilon, distance="euclidean"),
        miners.MultiSimilarityMiner(epsilon, distance=distances.LpDistance()),
        n,
    )


@pytest.mark.parametrize("n", SIZES)
@pytest.mark.parametrize("ratio", [0.1, 0.5, 1.0])
def test_top_ratio(ratio: float, n: int) -> None:
    given = batch(n)
    # Distances of a batch with itself are there twice, so a share of the pairs may end in a tie.
    for arguments in (given, (*given, *batch(n + 3, 6, seed=1))):
        found = ours.TopRatioMiner(ratio)(*arguments)
        expected = miners.HDCMiner(ratio)(*arguments)
        matrix = distances.LpDistance()(*arguments[::2])
        for mine, theirs in ((found[:2], expected[:2]), (found[2:], expected[2:])):
            assert len(mine[0]) == len(theirs[0])
            d = [matrix[pair].sort().values for pair in (mine, theirs)]
            torch.testing.assert_close(d[0], d[1])


def test_distance_weighted_draws_what_the_peer_draws() -> None:
    given = batch(20)
    drawn: tuple[set, set] = set(), set()
    for _ in range(150):
        for seen, miner in zip(
            drawn, (ours.DistanceWeightedMiner(), miners.DistanceWeightedMiner()), strict=True
        ):
            a, _, n = miner(*given)
            seen.update(zip(a.tolist(), n.tolist(), strict=True))
    # Rare ones may be missing on either side.
    assert len(drawn[0] & drawn[1]) > 0.9 * len(drawn[0] | drawn[1])


def test_their_losses_take_our_indices_and_ours_theirs() -> None:
    x, labels = batch(20)
    for miner in (
        ours.BatchHardMiner(),
        ours.SemiHardMiner(),
        ours.MultiSimilarityMiner(),
        ours.BatchEasyHardMiner("all", "hard"),
        ours.DistanceWeightedMiner(),
    ):
        indices = miner(x, labels)
        theirs = losses.TripletMarginLoss()(x, labels, indices)
        mine = TripletMarginLoss.preset("pml")(x, indices_tuple=indices)
        torch.testing.assert_close(mine, theirs)
    indices = miners.TripletMarginMiner(0.2, "semihard")(x, labels)
    theirs = losses.TripletMarginLoss(margin=0.2)(x, labels, indices)
    mine = TripletMarginLoss.preset("pml", margin=0.2)(x, indices_tuple=indices)
    torch.testing.assert_close(mine, theirs)
    fused = TripletMarginLoss.preset("pml", margin=0.2, type_of_triplets="semihard")
    torch.testing.assert_close(fused(x, labels), theirs)


class TestDisagreements:
    """Where this library is meant to differ. If the peer changes, these fail and say so."""

    def test_empty_batches(self) -> None:
        x, labels = torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64)
        with pytest.raises(IndexError):
            miners.BatchHardMiner()(x, labels)
        with pytest.raises(RuntimeError):
            miners.DistanceWeightedMiner()(x, labels)
        for miner in (ours.BatchHardMiner(), ours.DistanceWeightedMiner()):
            assert [len(index) for index in miner(x, labels)] == [0, 0, 0]

    def test_the_peer_tells_a_self_batch_by_identity(self) -> None:
        x, labels = batch(20)
        a, p, _ = miners.BatchHardMiner()(x, labels, x, labels)
        assert (a != p).all()
        a, p, _ = miners.BatchHardMiner()(x, labels, x.clone(), labels.clone())
        alone = a == 0
        assert alone.any() and (p[alone] == 0).all()  # now row 0 is its own positive
        for refs in ((x, labels), (x.clone(), labels.clone())):
            a, p, _ = ours.BatchHardMiner()(x, labels, *refs)
            assert (p[a == 0] == 0).all()  # given references exclude no pair

    def test_distance_weighted_drops_anchors_without_near_negatives(self) -> None:
        x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.2]])
        labels = torch.tensor([0, 0, 1, 2])
        assert len(miners.DistanceWeightedMiner()(x, labels)[0]) == 0
        assert ours.DistanceWeightedMiner()(x, labels)[0].tolist() == [0, 1]

    def test_distance_weighted_positives(self) -> None:
        # The peer draws as many positives as the class has rows, with replacement; here every
        # positive pair comes once.
        given = batch(20)
        a, _, _ = miners.DistanceWeightedMiner()(*given)
        mine, p, _ = ours.DistanceWeightedMiner()(*given)
        assert len(set(zip(mine.tolist(), p.tolist(), strict=True))) == len(mine)
        assert len(a) > len(mine)

    def test_order(self) -> None:
        # The peer lists pairs by row; here the farthest positives and nearest negatives come first.
        given = batch(20)
        found = ours.TripletMarginMiner()(*given)
        expected = miners.TripletMarginMiner()(*given)
        assert sets(found) == sets(expected)
        assert any(not a.equal(b) for a, b in zip(found, expected, strict=True))
