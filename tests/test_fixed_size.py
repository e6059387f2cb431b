# SPDX-License-Identifier: Apache-2.0
"""Results of miners in a fixed size, as arguments of every loss."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import flashmetric
from flashmetric import checks, miners, reference
from flashmetric.catalog import ENTRIES, Entry
from flashmetric.miners import PairIndices, TripletIndices
from flashmetric.reference import dense

LISTED = [entry for entry in ENTRIES if entry.call == "batch" and entry.listed]
# Two of the classes are of one row, which has no positives: not every entry is valid.
LABELS = torch.tensor([0, 1, 2, 3, 0, 1, 2, 4, 0, 1, 2, 0])
MINERS: dict[str, Callable[[], miners.Miner]] = {
    "triplets": miners.BatchHardMiner,
    "several": lambda: miners.SemiHardMiner(max_positives=3),
    "pairs": lambda: miners.MultiSimilarityMiner(max_positives=3, max_negatives=4, epsilon=0.3),
}


def make(entry: Entry) -> torch.nn.Module:
    torch.manual_seed(0)
    options = {
        **dict(entry.example),
        **({"features": 5} if "features" in dict(entry.example) else {}),
    }
    return getattr(flashmetric, entry.name)(**options).double()


def rows(seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(12, 5, generator=generator, dtype=torch.float64)


def value_and_grads(loss: torch.nn.Module, x: Tensor, **given: object) -> list[Tensor]:
    x = x.clone().requires_grad_()
    loss.zero_grad()
    value = loss(x, LABELS, **given)
    value.sum().backward()
    return [value.detach(), x.grad, *(p.grad.clone() for p in loss.parameters())]


def name_of(entry: Entry) -> str:
    return entry.name


@pytest.mark.parametrize("kind", MINERS)
@pytest.mark.parametrize("entry", LISTED, ids=name_of)
def test_a_loss_of_a_fixed_size_is_that_of_the_valid_entries(entry: Entry, kind: str) -> None:
    loss, x = make(entry), rows()
    found = MINERS[kind]()(x, LABELS, fixed_size=True)
    valid = found.valid if isinstance(found, TripletIndices) else found.positive_valid
    assert not valid.all() and valid.any()
    ours = value_and_grads(loss, x, indices_tuple=found)
    theirs = value_and_grads(loss, x, indices_tuple=found.indices())
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)
    with dense():
        explicit = loss(x, LABELS, indices_tuple=found)
    torch.testing.assert_close(explicit, theirs[0], rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("entry", LISTED, ids=name_of)
def test_nothing_valid_is_nothing(entry: Entry) -> None:
    loss, x = make(entry), rows().requires_grad_()
    none, row = torch.full((12,), -1), torch.arange(12)
    off = torch.zeros(12, dtype=torch.bool)
    for found in (
        TripletIndices(row, none, none, off),
        PairIndices(row, none, row, none, off, off),
        PairIndices(none, row, none, row, off, off),
    ):
        value = loss(x, LABELS, indices_tuple=found)
        plain = loss(x, LABELS, indices_tuple=tuple(row[:0] for _ in range(len(found) // 3 + 2)))
        torch.testing.assert_close(value, plain)
        (grad,) = torch.autograd.grad(value, x)
        assert grad.isfinite().all()


@pytest.mark.parametrize("reduction", ["none", "sum", "mean"])
@pytest.mark.parametrize(
    "name", ["TripletMarginLoss", "ContrastiveLoss", "MarginLoss", "NPairsLoss"]
)
def test_reductions(name: str, reduction: str) -> None:
    loss, x = getattr(flashmetric, name)(reduction=reduction), rows()
    found = MINERS["triplets"]()(x, LABELS, fixed_size=True)
    ours, theirs = loss(x, LABELS, indices_tuple=found), loss(x, LABELS, found.indices())
    if name == "TripletMarginLoss" and reduction == "none":
        assert ours.shape == (12,) and ours[~found.valid].eq(0).all()
        ours = ours[found.valid]
    torch.testing.assert_close(ours, theirs)


def test_swap_skips_what_is_not_there() -> None:
    x = rows()
    found = MINERS["triplets"]()(x, LABELS, fixed_size=True)
    for smooth in (False, True):
        loss = flashmetric.TripletMarginLoss(0.5, swap=True, smooth=smooth)
        ours = value_and_grads(loss, x, indices_tuple=found)
        for a, b in zip(ours, value_and_grads(loss, x, indices_tuple=found.indices()), strict=True):
            torch.testing.assert_close(a, b)


def test_references_and_scaled_anchors() -> None:
    x, r = rows(), rows(1)
    found = miners.BatchHardMiner()(x[:5], LABELS[:5], r, LABELS, fixed_size=True)
    for loss in (
        flashmetric.TripletMarginLoss(anchor_scale=2.0),
        flashmetric.ContrastiveLoss(),
        flashmetric.ContrastiveImageTextLoss(learn_temperature=False),
    ):
        ours = loss(x[:5], indices_tuple=found, ref_emb=r)
        torch.testing.assert_close(ours, loss(x[:5], indices_tuple=found.indices(), ref_emb=r))


def test_no_references() -> None:
    refs, none = torch.empty(0, 5, dtype=torch.float64), torch.empty(0, dtype=torch.int64)
    found = miners.BatchHardMiner()(rows(), LABELS, refs, none, fixed_size=True)
    for entry in LISTED:
        value = make(entry)(rows(), LABELS, found, ref_emb=refs, ref_labels=none)
        assert value == 0, entry.name


def test_the_reference_takes_them_too() -> None:
    x = rows()
    for kind, names in (
        ("triplets", ("triplet_margin_loss", "contrastive_loss")),
        ("pairs", ("contrastive_loss",)),
    ):
        found = MINERS[kind]()(x, LABELS, fixed_size=True)
        for name in names:
            oracle, ours = getattr(reference, name), getattr(flashmetric.functional, name)
            torch.testing.assert_close(oracle(x, indices_tuple=found), ours(x, indices_tuple=found))


class NoWaiting(TorchDispatchMode):
    """Raises where a CUDA tensor would be waited for."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001, ANN204
        name = func.name()
        masked = name in ("aten::index.Tensor", "aten::index_put_") and any(
            index is not None and index.dtype == torch.bool for index in args[1]
        )
        if masked or name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::unique_dim"):
            raise AssertionError(f"{name} waits for the device")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("kind", ["triplets", "several"])
@pytest.mark.parametrize("entry", LISTED, ids=name_of)
def test_no_loss_waits_for_the_device(
    entry: Entry, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if entry.name in ("LiftedStructureLoss", "QuadrupletLoss", "LMNNLoss"):
        pytest.skip("counts the pairs of an anchor, as its documentation says")
    loss, x = make(entry), rows()
    found = MINERS[kind]()(x, LABELS, fixed_size=True)
    # What reads tensors on the CPU only.
    monkeypatch.setattr(checks, "_check_index", lambda *_: None)
    monkeypatch.setattr(checks, "check_classes", lambda *_: None)
    with NoWaiting():
        loss(x, LABELS, indices_tuple=found)


def test_messages() -> None:
    x, loss = rows(), flashmetric.ContrastiveLoss()
    row, on = torch.arange(12), torch.ones(12, dtype=torch.bool)
    for found, error, message in (
        (TripletIndices(row, row, row, row), TypeError, "indices_tuple.valid must be a bool"),
        (TripletIndices(row, row[:3], row, on), ValueError, "positives must be as long as"),
        (TripletIndices(row, row.int(), row, on), TypeError, "positives must be int64, got int32"),
        (TripletIndices(row, row, row + 1, on), ValueError, "negatives must hold row numbers from"),
        (
            PairIndices(row, row, row, row, on, on[:4]),
            ValueError,
            "negative_anchors must be as long as its mask",
        ),
    ):
        with pytest.raises(error, match=message):
            loss(x, LABELS, indices_tuple=found)
