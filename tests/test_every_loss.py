# SPDX-License-Identifier: Apache-2.0
"""What every loss promises, tested for each one in the catalog."""

import copy
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import flashmetric
from flashmetric.catalog import ENTRIES, Entry
from flashmetric.catalog.page import render
from flashmetric.losses.base import Loss
from flashmetric.reference import dense
from helpers import DTYPES, TOLERANCE

ROOT = Path(__file__).resolve().parent.parent
BATCH = [entry for entry in ENTRIES if entry.call == "batch"]

pytestmark = pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning")


def name_of(entry: object) -> str | None:
    return entry.name if isinstance(entry, Entry) else None


def make(entry: Entry, features: int = 6) -> nn.Module:
    torch.manual_seed(0)
    options = dict(entry.example)
    for name in {"features", "embedding_size"} & options.keys():
        options[name] = features
    return getattr(flashmetric, entry.name)(**options)


def rows(n: int, d: int, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, d, generator=generator, dtype=torch.float64)
    # Not negative, which the chi-squared distance asks for, and not far from unit length.
    return x.abs().mul_(0.4).to(dtype).requires_grad_()


def call(entry: Entry, loss: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    """The loss of a batch in the form that it is called in."""
    if entry.call == "towers":
        half = len(x) // 2
        return loss(x[:half], ref_emb=x[half : 2 * half])
    if entry.call == "pairs":
        half = len(x) // 2
        same = (labels[:half] == labels[half : 2 * half]).long()
        pairs = flashmetric.functional.labelled_pairs(
            x[:half], x[half : 2 * half], same, label_convention="similar=1"
        )
        return loss(**pairs)
    if entry.call == "scores":
        half = len(x) // 2
        same = (labels[:half] == labels[half : 2 * half]).long()
        return loss(x[:half], same.unsqueeze(1).expand(-1, x.shape[1]))
    return loss(x, labels)


def widened(loss: nn.Module, dtype: torch.dtype) -> nn.Module:
    """The loss with its learned parameters in the accumulation dtype."""
    return loss.double() if dtype == torch.float64 else loss


def value_and_grad(entry: Entry, loss: nn.Module, x: Tensor, labels: Tensor) -> tuple[Tensor, ...]:
    x = x.detach().clone().requires_grad_()
    loss.zero_grad()
    value = call(entry, loss, x, labels)
    value.backward()
    assert x.grad is not None
    learned = [p.grad.clone() for p in loss.parameters() if p.grad is not None]
    return value.detach(), x.grad, *learned


LABELS = torch.arange(24) // 4


def test_the_catalog_lists_every_loss() -> None:
    losses = {
        name
        for name in flashmetric.__all__
        if isinstance(getattr(flashmetric, name), type)
        and issubclass(getattr(flashmetric, name), nn.Module)
        and (issubclass(getattr(flashmetric, name), Loss) or name.endswith("Loss"))
    }
    assert {entry.name for entry in ENTRIES} == losses - {"Loss", "PairLoss"}
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES)


def test_the_page_is_that_of_the_catalog() -> None:
    assert (ROOT / "docs" / "losses.md").read_text() == render(ENTRIES)


def test_the_page_runs() -> None:
    text = (ROOT / "docs" / "losses.md").read_text()
    scope: dict[str, Any] = {}
    blocks = [part.split("```")[0] for part in text.split("```python\n")[1:]]
    assert len(blocks) == 2
    for block in blocks:
        exec(block, scope)  # noqa: S102  our own page
    assert scope["x"].grad.isfinite().all()
    theirs = flashmetric.SupConLoss(temperature=0.1)(scope["x"], scope["labels"])
    ours = flashmetric.pair_loss(
        scope["supervised_contrastive"], scope["x"], scope["labels"], distance="cosine"
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_entry_is_complete(entry: Entry) -> None:
    for text in (entry.formula, entry.defaults, entry.source, entry.complexity, entry.rows):
        assert len(text) > 1
    for text in (entry.title, entry.reduction, entry.disagreements):
        assert len(text) > 3


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dtypes(entry: Entry, dtype: torch.dtype) -> None:
    x = rows(24, 6, dtype)
    ours = value_and_grad(entry, widened(make(entry), dtype), x, LABELS)
    exact = value_and_grad(entry, make(entry).double(), x.double(), LABELS)
    assert ours[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert ours[0].ndim == 0 and ours[1].dtype == dtype
    # Rows are the same numbers in both: what is left is arithmetic, and one rounding of gradients.
    arithmetic = 1e-9 if dtype == torch.float64 else 2e-4
    torch.testing.assert_close(ours[0].double(), exact[0], rtol=arithmetic, atol=arithmetic)
    scale = exact[1].abs().max().clamp(min=1e-3)
    assert ((ours[1].double() - exact[1]).abs() / scale).max() < 10 * TOLERANCE[dtype] + 2e-4


# The others are held against the dense reference, which holds the same factors constant.
@pytest.mark.parametrize("entry", [e for e in ENTRIES if not e.holds_factors], ids=name_of)
def test_gradcheck(entry: Entry) -> None:
    loss = make(entry, 3).double()
    x = rows(12, 3, seed=3)
    labels = torch.arange(12) // 3
    assert torch.autograd.gradcheck(lambda x: call(entry, loss, x, labels), (x,), atol=1e-6)


@pytest.mark.parametrize("entry", BATCH, ids=name_of)
def test_equals_the_dense_reference(entry: Entry) -> None:
    loss = make(entry).double()
    ours = value_and_grad(entry, loss, rows(24, 6), LABELS)
    with dense():
        theirs = value_and_grad(entry, loss, rows(24, 6), LABELS)
    torch.testing.assert_close(ours, theirs, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("entry", BATCH, ids=name_of)
@pytest.mark.parametrize(
    "batch", ["empty", "one row", "one class", "all unique", "equal rows", "zero rows"]
)
def test_degenerate(entry: Entry, batch: str) -> None:
    n = {"empty": 0, "one row": 1}.get(batch, 8)
    x = rows(n, 4)
    if batch in ("equal rows", "zero rows"):
        with torch.no_grad():
            x[:] = 0.0 if batch == "zero rows" else 0.3
    labels = torch.zeros(n, dtype=torch.int64)
    if batch == "all unique":
        labels = torch.arange(n)
    elif batch.endswith("rows"):
        labels = torch.arange(n) // 2
    value, grad, *_ = value_and_grad(entry, make(entry, 4).double(), x, labels)
    assert value.isfinite() and grad.isfinite().all()
    if n <= 1:
        assert value == 0 and not grad.any()


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_nan_is_seen(entry: Entry) -> None:
    x = rows(24, 6)
    with torch.no_grad():
        x[5, 2] = torch.nan
    assert call(entry, make(entry).double(), x, LABELS).isnan()


@pytest.mark.parametrize("entry", BATCH, ids=name_of)
def test_order_of_rows_does_not_matter(entry: Entry) -> None:
    loss, x = make(entry).double(), rows(24, 6)
    order = torch.randperm(24, generator=torch.Generator().manual_seed(1))
    if entry.name == "NPairsLoss":
        # It takes the first two rows of each class: move the classes as wholes.
        order = torch.randperm(6, generator=torch.Generator().manual_seed(1))
        order = (order[:, None] * 4 + torch.arange(4)).flatten()
    value, grad, *_ = value_and_grad(entry, loss, x, LABELS)
    moved, moved_grad, *_ = value_and_grad(entry, loss, x[order], LABELS[order])
    torch.testing.assert_close(moved, value)
    torch.testing.assert_close(moved_grad, grad[order])


@pytest.mark.skipif(
    os.environ.get("FLASHMETRIC_BACKEND") == "python",
    reason="PyTorch's exponentials change their last bits with the number of threads",
)
@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_threads_change_no_bit(entry: Entry) -> None:
    x, labels = rows(700, 24, torch.float32), torch.arange(700) // 5
    if entry.call == "classes":
        labels = labels % 4
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 2):
            torch.set_num_threads(threads)
            results.append(value_and_grad(entry, make(entry, 24), x, labels))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(a.equal(b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_copies(entry: Entry) -> None:
    loss, x = make(entry).double(), rows(24, 6)
    value = call(entry, loss, x, LABELS)
    for twin in (pickle.loads(pickle.dumps(loss)), copy.deepcopy(loss)):
        assert call(entry, twin, x, LABELS).equal(value)
        assert repr(twin) == repr(loss)
    twin = make(entry).double()
    twin.load_state_dict(loss.state_dict())
    assert call(entry, twin, x, LABELS).equal(value)


@pytest.mark.parametrize("entry", ENTRIES, ids=name_of)
def test_autocast_changes_nothing(entry: Entry) -> None:
    loss, x = make(entry), rows(24, 6, torch.float32)
    plain = value_and_grad(entry, loss, x, LABELS)
    with torch.autocast("cpu", torch.bfloat16):
        mixed = value_and_grad(entry, loss, x, LABELS)
    torch.testing.assert_close(mixed, plain)


@pytest.mark.parametrize("entry", [e for e in BATCH if e.listed], ids=name_of)
def test_listing_all_pairs(entry: Entry) -> None:
    """All pairs in a list are all labelled pairs."""
    loss, x = make(entry).double(), rows(24, 6)
    same = (LABELS[:, None] == LABELS) & ~torch.eye(24, dtype=torch.bool)
    other = LABELS[:, None] != LABELS
    indices = (*same.nonzero().unbind(1), *other.nonzero().unbind(1))
    if entry.statistic == "hardest pairs":
        pytest.skip("a list of triplets replaces the mining")
    listed = loss(x, indices_tuple=indices)
    torch.testing.assert_close(listed, loss(x, LABELS))
