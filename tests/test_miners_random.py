# SPDX-License-Identifier: Apache-2.0
"""Miners that draw: only what they may draw, as often as they should, and again from a seed."""

import pytest
import torch
from torch import Tensor

from flashmetric.labels import ignoring
from flashmetric.miners import (
    DistanceWeightedMiner,
    HardNegativeMiner,
    HardPositiveMiner,
    MarginViolationMiner,
    RandomTripletMiner,
)
from flashmetric.miners import slabs as slab_module
from flashmetric.ops import distance as distance_module
from loop_miners import LoopBatch
from loop_triplets import loop_all_triplets

VIOLATIONS = ["violating", "absolute", "all", "hard", "semihard", "easy"]


def batch(n: int = 14, d: int = 4, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, dtype=torch.float64, generator=generator)
    return x, torch.arange(n) % classes


def rows(found: tuple[Tensor, ...]) -> list[tuple[int, ...]]:
    return list(zip(*(column.tolist() for column in found), strict=True))


def given(name: str) -> tuple:
    (x, labels), (r, ref_labels) = batch(), batch(11, classes=5, seed=1)
    labels[3] = 77
    return {
        "plain": (x, labels),
        "ignoring": (x, ignoring(labels, 1)),
        "references": (x, labels, r, ref_labels),
    }[name]


names = pytest.mark.parametrize("name", ["plain", "ignoring", "references"])


@names
def test_random_triplets_are_uniform(name: str) -> None:
    count = 1000
    found = rows(RandomTripletMiner(count)(*given(name)))
    loop = LoopBatch(*given(name))
    triplets = loop_all_triplets(loop.kinds)
    assert set(found) == set(triplets)
    for a in range(loop.n):
        of_anchor = [t for t in triplets if t[0] == a]
        assert sum(t[0] == a for t in found) == (count if of_anchor else 0)
        for t in of_anchor:
            expected = count / len(of_anchor)
            assert abs(found.count(t) - expected) < 6 * expected**0.5


@names
def test_hard_and_random(name: str) -> None:
    loop = LoopBatch(*given(name), normalize=True)
    drawn: tuple[set, set] = set(), set()
    for _ in range(80):
        drawn[0].update(rows(HardNegativeMiner()(*given(name))))
        drawn[1].update(rows(HardPositiveMiner()(*given(name))))
    triplets = loop_all_triplets(loop.kinds)
    nearest = {a: loop.extreme(a, 1, False) for a in range(loop.n)}
    farthest = {a: loop.extreme(a, 0, True) for a in range(loop.n)}
    assert drawn[0] == {(a, p, n) for a, p, n in triplets if n == nearest[a]}
    assert drawn[1] == {(a, p, n) for a, p, n in triplets if p == farthest[a]}


def test_hard_with_a_scaled_anchor() -> None:
    x, labels = given("plain")
    loop = LoopBatch(x, labels, anchor_scale=2.0)
    found = HardNegativeMiner(normalize=False, anchor_scale=2.0)(x, labels)
    assert {(a, n) for a, _, n in rows(found)} == {
        (a, loop.extreme(a, 1, False)) for a in range(loop.n) if loop.of(a, 0)
    }


@names
@pytest.mark.parametrize("violation", VIOLATIONS)
def test_margin_violation(violation: str, name: str) -> None:
    for margin in (0.3, 0.0):
        allowed = LoopBatch(*given(name), normalize=True).violating(violation, margin)
        miner = MarginViolationMiner(margin, violation=violation)
        drawn: set = set()
        for _ in range(60):
            found = rows(miner(*given(name)))
            # One triplet for every positive pair that has any.
            assert sorted(t[:2] for t in found) == sorted({t[:2] for t in allowed})
            drawn.update(found)
        # Rare ones may be missing.
        assert drawn <= allowed and len(drawn) >= 0.9 * len(allowed)


@names
@pytest.mark.parametrize("features", [2, 3, 8])
def test_distance_weighted(features: int, name: str) -> None:
    x, *rest = given(name)
    torch.manual_seed(1)
    x = torch.randn(14, features, dtype=torch.float64)
    if name == "references":
        rest[1] = torch.randn(11, features, dtype=torch.float64)
    loop = LoopBatch(x, *rest, normalize=True)
    miner, times = DistanceWeightedMiner(0.5, 1.4), 200
    counts: dict[tuple[int, int], int] = {}
    for _ in range(times):
        found = rows(miner(x, *rest))
        assert sorted(t[:2] for t in found) == sorted(
            (a, p) for a, p in loop.pairs(0) if loop.of(a, 1)
        )
        for a, _, n in found:
            counts[a, n] = counts.get((a, n), 0) + 1
    for a in range(loop.n):
        draws = times * len(loop.of(a, 0)) if loop.of(a, 1) else 0
        for n, weight in loop.weights(a, features, 0.5, 1.4).items():
            expected = draws * weight
            assert abs(counts.pop((a, n), 0) - expected) <= 6 * expected**0.5 + 1
    assert not counts


def test_distance_weighted_in_many_dimensions() -> None:
    # The largest and the smallest of these weights are a factor of e^500 apart.
    x, labels = batch(60, 512, 3)
    x[:20] = x[0] + 0.02 * x[:20]
    loop = LoopBatch(x[:30], labels[:30], x[30:], labels[30:], normalize=True)
    found = rows(DistanceWeightedMiner()(x[:30], labels[:30], x[30:], labels[30:]))
    assert sorted(t[:2] for t in found) == sorted(loop.pairs(0))
    for a, _, n in found:
        weights = loop.weights(a, 512, 0.5, 1.4)
        assert weights.get(n, 0.0) > 1e-9


def test_distance_weighted_falls_back_to_all_negatives() -> None:
    x = torch.tensor([[1.0, 0.0], [1.0, 0.1], [-1.0, 0.0], [-1.0, 0.2]])
    labels = torch.tensor([0, 0, 1, 2])
    drawn = {n for _ in range(60) for a, _, n in rows(DistanceWeightedMiner()(x, labels)) if a == 0}
    assert drawn == {2, 3}


MINERS = {
    "random": lambda g: RandomTripletMiner(3, generator=g),
    "positive": lambda g: HardPositiveMiner(generator=g),
    "negative": lambda g: HardNegativeMiner(generator=g),
    "violation": lambda g: MarginViolationMiner(1.0, max_positives=3, generator=g),
    "distance": lambda g: DistanceWeightedMiner(max_positives=3, generator=g),
}


@pytest.mark.parametrize("make", MINERS.values(), ids=MINERS)
def test_a_generator_decides(make, monkeypatch: pytest.MonkeyPatch) -> None:
    x, labels = given("plain")

    def draw(seed: int, slab: int = 1 << 20) -> list[list[int]]:
        monkeypatch.setattr(distance_module, "SLAB_ELEMENTS", slab)
        miner = make(torch.Generator().manual_seed(seed))
        torch.rand(1)  # the generator of the device has no part in it
        plain = [column.tolist() for column in miner(x, labels)]
        again = make(torch.Generator().manual_seed(seed))(x, labels, fixed_size=True)
        assert [column.tolist() for column in again.indices()] == plain
        return plain

    assert draw(1) == draw(1) == draw(1, slab=1)
    assert draw(1) != draw(2)


def test_slabs_measure_duplicates_exactly() -> None:
    x, labels = batch(20, 6)
    x = (1000 + x).float()
    x[4], x[5] = x[0], x[1]
    x[5, 0] = x[5, 0].nextafter(torch.tensor(torch.inf))
    (slab,) = slab_module.row_slabs(
        slab_module.AllPairs(x, labels, None, None, "equal", "euclidean")
    )
    assert slab.distance[0, 4] == 0.0 and slab.distance[1, 5] > 0
    exact = torch.cdist(x.double(), x.double(), compute_mode="donot_use_mm_for_euclid_dist")
    torch.testing.assert_close(slab.distance, exact, rtol=1e-6, atol=1e-4)
