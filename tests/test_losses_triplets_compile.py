# SPDX-License-Identifier: Apache-2.0
"""Every selection of triplets in one compiled graph, once the number of positives is given."""

from collections.abc import Iterator

import pytest
import torch

from flashmetric.losses import LMNNLoss, TripletMarginLoss, TripletQuotientLoss, TripletRatioLoss
from flashmetric.miners import (
    BatchEasyHardMiner,
    BatchHardMiner,
    MarginViolationMiner,
    MultiSimilarityMiner,
    SemiHardMiner,
)
from loop_triplets import MINING, batch

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")

LOSSES = [
    *(TripletMarginLoss(mining=mining, max_positives=5) for mining in MINING),
    TripletMarginLoss(mining="batch_all", type_of_triplets="semihard", max_positives=5),
    TripletMarginLoss(mining="batch_all", smooth=True, max_positives=5),
    TripletMarginLoss(mining="easy_positive", swap=True, empty="keep"),
    TripletMarginLoss.preset("tubui_scaled_anchor"),
    TripletMarginLoss.preset("snr"),
    TripletRatioLoss(max_positives=5),
    TripletQuotientLoss(),
    LMNNLoss(),
]
MINERS = [
    BatchHardMiner(),
    SemiHardMiner(max_positives=5),
    BatchEasyHardMiner(),
    MultiSimilarityMiner(max_positives=5, max_negatives=3),
    MarginViolationMiner(max_positives=5, violation="absolute"),
]


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.parametrize("loss", LOSSES, ids=repr)
def test_losses(loss: TripletMarginLoss) -> None:
    x, labels = batch()
    expected = loss(x, labels)
    (grad,) = torch.autograd.grad(expected, x)
    value = torch.compile(loss, fullgraph=True, backend="aot_eager")(x, labels)
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(torch.autograd.grad(value, x)[0], grad)


@pytest.mark.parametrize("miner", MINERS, ids=repr)
def test_miners(miner: torch.nn.Module) -> None:
    x, labels = batch()
    torch.manual_seed(0)
    expected = miner(x, labels, fixed_size=True)
    torch.manual_seed(0)
    compiled = torch.compile(miner, fullgraph=True, backend="aot_eager")
    found = compiled(x, labels, fixed_size=True)
    assert all(a.equal(b) for a, b in zip(found, expected, strict=True))
