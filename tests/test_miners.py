# SPDX-License-Identifier: Apache-2.0
"""Miners against loops over single pairs, in both forms of their result."""

import copy
import inspect
import pickle

import pytest
import torch
from torch import Tensor

from flashmetric import miners
from flashmetric.functional import triplet_margin_loss
from flashmetric.labels import ignoring, multi_hot, two_level
from flashmetric.losses import ContrastiveLoss, TripletMarginLoss
from flashmetric.miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    ClusterNegativeMiner,
    FrackingMiner,
    MultiSimilarityMiner,
    PairIndices,
    SemiHardMiner,
    TopRatioMiner,
    TripletIndices,
    TripletMarginMiner,
)
from loop_miners import LoopBatch

DISTANCES = ["euclidean", "sqeuclidean", "cosine", "dot", "cityblock"]
STRATEGIES = [
    (pos, neg)
    for pos in ("hard", "semihard", "easy", "all")
    for neg in ("hard", "semihard", "easy", "all")
    if {pos, neg} not in ({"semihard"}, {"semihard", "all"})
]
VIOLATIONS = ["violating", "absolute", "all", "hard", "semihard", "easy"]


def batch(n: int = 14, classes: int = 4, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 4, dtype=torch.float64, generator=generator)
    return x, torch.arange(n) % classes


def cases() -> dict[str, tuple]:
    """Arguments of a miner: plain labels, label rules, references, lonely rows."""
    (x, labels), (r, ref_labels) = batch(), batch(11, 5, seed=1)
    lonely = labels.clone()
    lonely[3] = 77
    generator = torch.Generator().manual_seed(2)
    tags = torch.rand(14, 5, generator=generator) > 0.7
    groups = torch.arange(14) // 7
    return {
        "plain": (x, labels),
        "lonely": (x, lonely),
        "ignoring": (x, ignoring(labels, 1)),
        "multi-hot": (x, multi_hot(tags)),
        "two-level": (x, two_level(labels, groups, positives="different", negatives="same")),
        "references": (x, labels, r, ref_labels),
    }


CASES = cases()
case = pytest.mark.parametrize("given", CASES.values(), ids=CASES)


def as_set(*columns: Tensor) -> set[tuple[int, ...]]:
    rows = list(zip(*(column.tolist() for column in columns), strict=True))
    assert len(set(rows)) == len(rows), "some are there twice"
    return set(rows)


def pair_sets(found: tuple[Tensor, ...]) -> tuple[set, set]:
    a1, p, a2, n = found
    return as_set(a1, p), as_set(a2, n)


def both(miner: miners.Miner, given: tuple, fixed: miners.Miner | None = None) -> tuple:
    """The plain result, after it has been compared with that of fixed size."""
    found = miner(*given)
    assert all(index.dtype == torch.int64 and index.ndim == 1 for index in found)
    form = (fixed or miner)(*given, fixed_size=True)
    assert isinstance(form, TripletIndices if len(found) == 3 else PairIndices)
    for a, b in zip(found, form.indices(), strict=True):
        assert a.equal(b)
    return found


@case
@pytest.mark.parametrize("distance", DISTANCES)
def test_batch_hard(distance: str, given: tuple) -> None:
    for normalize in (False, True):
        miner = BatchHardMiner(distance=distance, normalize=normalize)
        loop = LoopBatch(*given, distance=distance, normalize=normalize)
        assert as_set(*both(miner, given)) == loop.hard("batch_hard")


@case
@pytest.mark.parametrize("fallback", [False, True])
@pytest.mark.parametrize("per", ["positive", "anchor"])
def test_semi_hard(per: str, fallback: bool, given: tuple) -> None:
    options = {"fallback": fallback, "normalize": False}
    fixed = SemiHardMiner(per, max_positives=13, **options)
    found = SemiHardMiner(per, **options)(*given)
    assert as_set(*found) == LoopBatch(*given).semi_hard(per, fallback)
    assert as_set(*fixed(*given, fixed_size=True).indices()) == as_set(*found)


@case
@pytest.mark.parametrize(("pos", "neg"), STRATEGIES)
def test_easy_hard(pos: str, neg: str, given: tuple) -> None:
    loop = LoopBatch(*given, normalize=True)
    limits = {"max_positives": 14, "max_negatives": 14}
    for ranges in ((None, None), ((0.6, 1.3), None), (None, (0.5, 1.2)), ((0.3, 1.5), (0.9, 1.9))):
        found = BatchEasyHardMiner(pos, neg, *ranges)(*given)
        assert pair_sets(found) == loop.easy_hard(pos, neg, ranges)
        fixed = BatchEasyHardMiner(pos, neg, *ranges, **limits)(*given, fixed_size=True)
        assert pair_sets(fixed.indices()) == pair_sets(found)


def test_easy_hard_allows_the_ends_of_a_range() -> None:
    x, labels = torch.tensor([[0.0], [1.0], [-2.0], [3.0]]), torch.tensor([0, 0, 1, 1])
    for pos, neg, expected in (("hard", "hard", (1, 2)), ("easy", "easy", (1, 3))):
        miner = BatchEasyHardMiner(pos, neg, (1.0, 1.0), (2.0, 3.0), normalize=False)
        a1, p, _, n = miner(x, labels)
        assert (p[a1 == 0].item(), n[a1 == 0].item()) == expected


@case
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.5])
@pytest.mark.parametrize(
    ("few_pairs", "long_list"), [(1 << 17, 1.0), (0, 1.0), (0, 0.0)], ids=["few", "lists", "rows"]
)
def test_multi_similarity(
    few_pairs: int,
    long_list: float,
    epsilon: float,
    given: tuple,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("flashmetric.miners.multi_similarity._FEW_PAIRS", few_pairs)
    monkeypatch.setattr("flashmetric.miners.multi_similarity._LONG_LIST", long_list)
    found = MultiSimilarityMiner(epsilon)(*given)
    expected = LoopBatch(*given, distance="cosine").multi_similarity(epsilon)
    assert pair_sets(found) == expected
    fixed = MultiSimilarityMiner(epsilon, max_positives=14, max_negatives=14)
    assert pair_sets(fixed(*given, fixed_size=True).indices()) == expected


@case
@pytest.mark.parametrize("type_of_triplets", ["all", "hard", "semihard", "easy"])
def test_triplet_margin(type_of_triplets: str, given: tuple) -> None:
    loop = LoopBatch(*given, normalize=True)
    for margin in (0.2, 0.0, -0.2):
        found = TripletMarginMiner(margin, type_of_triplets)(*given)
        assert as_set(*found) == loop.violating(type_of_triplets, margin)


@case
@pytest.mark.parametrize("ratio", [0.05, 0.3, 0.5, 1.0])
def test_top_ratio(ratio: float, given: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    loop = LoopBatch(*given, normalize=True)
    expected = [loop.top_ratio(0, ratio), loop.top_ratio(1, 0.25)]
    from flashmetric.miners import top_ratio
    from flashmetric.ops import distance

    for elements in (1 << 20, 1):
        monkeypatch.setattr(distance, "SLAB_ELEMENTS", elements)
        monkeypatch.setattr(top_ratio, "SLAB_ELEMENTS", elements)
        a1, p, a2, n = both(TopRatioMiner(ratio, 0.25), given)
        assert list(zip(a1.tolist(), p.tolist(), strict=True)) == expected[0]
        assert list(zip(a2.tolist(), n.tolist(), strict=True)) == expected[1]


def test_top_ratio_ties_go_to_the_lowest_numbers() -> None:
    x, labels = torch.zeros(6, 2), torch.tensor([0, 0, 0, 1, 1, 1])
    a1, p, a2, n = TopRatioMiner(0.5, 0.2, normalize=False)(x, labels)
    assert list(zip(a1.tolist(), p.tolist(), strict=True)) == [
        (0, 1),
        (0, 2),
        (1, 0),
        (1, 2),
        (2, 0),
        (2, 1),
    ]
    assert (a2.tolist(), n.tolist()) == ([0, 0, 0, 1], [3, 4, 5, 3])


def test_fracking_is_a_share_of_one_over_the_factor() -> None:
    given = CASES["plain"]
    found = both(FrackingMiner(4, 8), given)
    expected = TopRatioMiner(1 / 4, 1 / 8, normalize=False)(*given)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("k", [1, 2, 5])
def test_cluster_negatives(k: int) -> None:
    for name, clusters in (
        ("plain", CASES["plain"][1].tolist()),
        ("lonely", CASES["lonely"][1].tolist()),
        ("ignoring", CASES["ignoring"][1].words.tolist()),
        ("two-level", CASES["two-level"][1].words[:, 0].tolist()),
        ("references", CASES["references"][3].tolist()),
    ):
        given = CASES[name]
        loop = LoopBatch(*given, normalize=True)
        positive, negative = pair_sets(ClusterNegativeMiner(k)(*given))
        assert positive == set(loop.pairs(0))
        assert negative == loop.cluster_negatives(k, clusters)
        fixed = ClusterNegativeMiner(k, max_positives=14)(*given, fixed_size=True)
        assert pair_sets(fixed.indices()) == (positive, negative)


@pytest.mark.parametrize("distance", ["euclidean", "cityblock", "dot"])
def test_scaled_anchor(distance: str) -> None:
    given = CASES["lonely"]
    miner = BatchHardMiner(distance=distance, normalize=False, anchor_scale=2.0)
    loop = LoopBatch(*given, distance=distance, anchor_scale=2.0)
    assert as_set(*miner(*given)) == loop.hard("batch_hard")


MINERS = [
    BatchHardMiner(),
    BatchHardMiner(anchor_scale=2.0),
    SemiHardMiner(max_positives=3),
    SemiHardMiner("anchor", fallback=False),
    BatchEasyHardMiner(),
    BatchEasyHardMiner("all", "all", max_positives=3, max_negatives=4),
    MultiSimilarityMiner(max_positives=3, max_negatives=4),
    miners.DistanceWeightedMiner(max_positives=3),
    miners.HardPositiveMiner(),
    miners.HardNegativeMiner(),
    miners.RandomTripletMiner(2),
    miners.MarginViolationMiner(max_positives=3),
    TopRatioMiner(),
    FrackingMiner(),
    ClusterNegativeMiner(2, max_positives=3),
    TripletMarginMiner(),
]
every = pytest.mark.parametrize("miner", MINERS, ids=repr)


def test_every_miner_is_tested_here() -> None:
    names = {
        name
        for name in miners.__all__
        if issubclass(getattr(miners, name), miners.Miner) and name != "Miner"
    }
    assert {type(miner).__name__ for miner in MINERS} == names


@every
@pytest.mark.parametrize(
    ("n", "classes"), [(0, 1), (1, 1), (2, 1), (2, 2), (5, 1), (5, 5)], ids=str
)
def test_awkward_batches(miner: miners.Miner, n: int, classes: int) -> None:
    x, labels = batch(n, classes)
    kinds = LoopBatch(x, labels)
    for given in ((x, labels), (x, labels, x[:0], labels[:0])):
        found = miner(*given)
        assert all(index.dtype == torch.int64 for index in found)
        if len(found) == 3:
            assert all(len(index) == 0 for index in found)
        elif len(given) == 2:
            positive, negative = pair_sets(found)
            assert positive <= set(kinds.pairs(0)) and negative <= set(kinds.pairs(1))
        refs = given[2] if len(given) > 2 else None
        assert triplet_margin_loss(x, indices_tuple=found, ref_emb=refs).item() >= 0


@every
def test_same_classes_and_losses_accept_what_is_found(miner: miners.Miner) -> None:
    x, labels = batch()
    x.requires_grad_()
    found = miner(x, labels)
    a1, p, a2, n = found if len(found) == 4 else (found[0], found[1], found[0], found[2])
    assert labels[a1].equal(labels[p]) and (a1 != p).all()
    assert (labels[a2] != labels[n]).all()
    for loss in (TripletMarginLoss(), ContrastiveLoss()):
        loss(x, indices_tuple=found).backward()
    assert not any(index.requires_grad for index in found)


@every
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_narrow_rows(miner: miners.Miner, dtype: torch.dtype) -> None:
    x, labels = batch()
    torch.manual_seed(0)
    found = miner(x.to(dtype), labels)
    torch.manual_seed(0)
    exact = miner(x.to(dtype).double(), labels)
    assert all(a.equal(b) for a, b in zip(found, exact, strict=True))


@every
def test_the_fixed_size_does_not_depend_on_the_data(miner: miners.Miner) -> None:
    x, labels = batch()
    if isinstance(miner, TripletMarginMiner):
        with pytest.raises(ValueError, match="fixed_size must be False"):
            miner(x, labels, fixed_size=True)
        return
    forms = [miner(x, given, fixed_size=True) for given in (labels, labels % 2, labels * 0)]
    for form in forms:
        assert [t.shape for t in form] == [t.shape for t in forms[0]]
        assert all(t.dtype in (torch.int64, torch.bool) for t in form)


@every
def test_no_operator_of_the_fixed_form_waits_for_the_device(miner: miners.Miner) -> None:
    if isinstance(miner, TripletMarginMiner):
        return
    from torch.utils._python_dispatch import TorchDispatchMode

    waiting = {"_local_scalar_dense", "nonzero", "item", "masked_select", "repeat_interleave"}
    seen = []

    class Recorder(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if function.namespace == "flashmetric":
                # On a device these are kernels of their own: what they do elsewhere is not seen.
                with torch.utils._python_dispatch._disable_current_modes():
                    return function(*args, **(kwargs or {}))
            seen.append(function.overloadpacket.__name__)
            return function(*args, **(kwargs or {}))

    with Recorder():
        miner(*batch(), fixed_size=True)
    assert seen and not waiting & set(seen)


@every
def test_copies_and_repr(miner: miners.Miner) -> None:
    rebuilt = eval(repr(miner), vars(miners))
    assert repr(rebuilt) == repr(miner)
    given = CASES["plain"]
    for twin in (rebuilt, copy.deepcopy(miner), pickle.loads(pickle.dumps(miner))):
        torch.manual_seed(3)
        expected = miner(*given)
        torch.manual_seed(3)
        assert all(a.equal(b) for a, b in zip(twin(*given), expected, strict=True))
    assert not miner.state_dict()
    named = set(inspect.signature(type(miner)).parameters) - {"generator"}
    assert all(hasattr(miner, name) for name in named)


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: BatchEasyHardMiner("semihard", "semihard"), ValueError, "neg_strategy must be 'h"),
        (lambda: BatchEasyHardMiner("all", "semihard"), ValueError, "neg_strategy must be 'hard'"),
        (lambda: BatchEasyHardMiner("best"), ValueError, "pos_strategy must be one of"),
        (lambda: BatchEasyHardMiner(allowed_pos_range=("a", 1)), TypeError, "allowed_pos_range mu"),
        (lambda: SemiHardMiner("row"), ValueError, "per must be one of"),
        (lambda: SemiHardMiner.preset("oml"), ValueError, "name must be one of"),
        (lambda: TopRatioMiner(0), ValueError, "ratio must be above 0 and at most 1, got 0"),
        (lambda: FrackingMiner(0.5), ValueError, "positive_factor must be at least 1"),
        (lambda: ClusterNegativeMiner(0), ValueError, "k must be at least 1"),
        (lambda: ClusterNegativeMiner(1.5), TypeError, "k must be an integer"),
        (lambda: miners.RandomTripletMiner(0), ValueError, "triplets_per_anchor must be at least"),
        (lambda: miners.DistanceWeightedMiner(0), ValueError, "cutoff must be above 0"),
        (lambda: BatchHardMiner(distance="l7"), ValueError, "distance must be one of"),
        (
            lambda: SemiHardMiner()(*batch(), fixed_size=True),
            ValueError,
            "max_positives must be given for fixed_size",
        ),
    ],
)
def test_errors(make, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_ratios_of_whole_numbers_round_to_these():
    x, labels = torch.rand(10, 3), torch.tensor([0, 0, 0, 0, 0, 1, 1, 1, 1, 1])
    a1, _, a2, _ = TopRatioMiner(0.35, 0.28)(x, labels)
    assert (len(a1), len(a2)) == (14, 14)  # of 40 and of 50
