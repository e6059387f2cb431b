# SPDX-License-Identifier: Apache-2.0
"""Rows that are not finite do not vanish from what a miner returns."""

import pytest
import torch

from flashmetric import TripletMarginLoss, miners

LABELS = torch.tensor([0, 0, 1, 1, 2, 2, 3, 3, 4, 5])
RANGE = (0.0, 9.0)
MINERS = {
    "hard": miners.BatchHardMiner(),
    "semi_hard": miners.SemiHardMiner(),
    "per_anchor": miners.SemiHardMiner(per="anchor", fallback=False),
    "easy_hard": miners.BatchEasyHardMiner(),
    "ranges": miners.BatchEasyHardMiner("hard", "hard", RANGE, RANGE),
    "everything": miners.BatchEasyHardMiner("all", "all"),
    "multi_similarity": miners.MultiSimilarityMiner(),
    "hard_negative": miners.HardNegativeMiner(),
    "clusters": miners.ClusterNegativeMiner(2),
    "top_ratio": miners.TopRatioMiner(0.1),
    "fracking": miners.FrackingMiner(),
    "weighted": miners.DistanceWeightedMiner(),
    "violation": miners.MarginViolationMiner(violation="absolute"),
    **{
        type_of: miners.TripletMarginMiner(type_of_triplets=type_of)
        for type_of in ("all", "hard", "semihard", "easy")
    },
}


@pytest.fixture(params=[1 << 17, 0], autouse=True)
def few_pairs(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Both ways of the multi-similarity miner: of few pairs it looks at all."""
    monkeypatch.setattr("flashmetric.miners.multi_similarity._FEW_PAIRS", request.param)


def rows() -> torch.Tensor:
    return torch.randn(10, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("name", MINERS)
def test_a_row_of_a_class_stays(name: str, value: float) -> None:
    x = rows()
    x[2, 1] = value
    found = MINERS[name](x, LABELS)
    assert any(bool((index == 2).any()) for index in found)
    assert TripletMarginLoss()(x, indices_tuple=found).isnan()


# These draw at random among the negatives that there are.
@pytest.mark.parametrize("name", sorted(MINERS.keys() - {"weighted", "violation"}))
@pytest.mark.parametrize("with_references", [False, True])
def test_a_row_that_is_only_a_negative_stays(name: str, with_references: bool) -> None:
    x = rows()
    x[8, 0] = torch.nan
    references = (x, LABELS) if with_references else ()
    given = (rows()[:8], LABELS[:8]) if with_references else (x, LABELS)
    found = MINERS[name](*given, *references)
    assert bool((found[-1] == 8).any())
