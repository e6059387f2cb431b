# SPDX-License-Identifier: Apache-2.0
"""Which pairs are of a row with itself is said by leaving references out, and by nothing else.

Neither the identity of two tensors nor equal contents says it. In pytorch-metric-learning a copy of
the batch as ``ref_emb`` makes every row its own positive, the batch itself does not;
``flashmetric.pml`` keeps that rule, see tests/pml.
"""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from flashmetric.catalog import ENTRIES
from flashmetric.labels import ignoring
from loss_cases import CASES, Case, name_of, rows

# Others compare rows with learned centres, or are given scores.
PAIRED = [c for c in CASES if c.call != "scores" and c.name != "SoftTripletLoss"]
# Two classes of several rows, and rows that are alone in their class.
LABELS = torch.tensor([0, 1, 0, 1, 2, 3, 0, 1, 4, 5])

REFERENCES: dict[str, Callable[[Tensor], Tensor]] = {
    "the same object": lambda x: x,
    "a view": lambda x: x.view_as(x),
    "a slice": lambda x: x[:],
    "a copy": lambda x: x.clone(),
}


def batch() -> Tensor:
    return rows(len(LABELS), torch.float64).requires_grad_()


def loss_of(case: Case) -> nn.Module:
    """The loss, as a mean over all pairs: in a sum, a pair at distance 0 may not show."""
    loss = case.loss().double()
    if getattr(loss, "reduction", None) in ("mean_nonzero", "sum"):
        loss.reduction = "mean"
    return loss


def results(case: Case, x: Tensor, **references: object) -> list[Tensor]:
    """Value, and the gradients in rows and in what the loss learns."""
    loss = loss_of(case)
    value = loss(x, LABELS, **references)
    learned = list(loss.parameters())
    return [value.detach(), *torch.autograd.grad(value, (x, *learned))]


@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_references_exclude_no_pair_whatever_object_they_are(case: Case) -> None:
    found = {}
    for name, other in REFERENCES.items():
        x = batch()
        labels = other(LABELS)
        found[name] = results(case, x, ref_emb=other(x), ref_labels=labels)
    for name, ours in found.items():
        assert ours[0].equal(found["a copy"][0]), name
        for a, b in zip(ours, found["a copy"], strict=True):
            # The gradients of both sides are added up in another order.
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)
    # A row that is alone in its class has no positive but itself, which now is one.
    alone = results(case, batch())[0]
    assert not torch.isclose(alone, found["a copy"][0], rtol=1e-6)


LISTED = {e.name for e in ENTRIES if e.listed and e.statistic != "hardest pairs"}


@pytest.mark.parametrize(
    "case", [c for c in PAIRED if c.name.partition("-")[0] in LISTED], ids=name_of
)
def test_the_pairs_are_those_of_a_list_with_the_diagonal(case: Case) -> None:
    loss, x = loss_of(case), batch()
    same = LABELS[:, None] == LABELS
    every = (*same.nonzero().unbind(1), *(~same).nonzero().unbind(1))
    value = loss(x, LABELS, ref_emb=x, ref_labels=LABELS)
    torch.testing.assert_close(value, loss(x, LABELS, every, ref_emb=x.clone()))


@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_labels_alone_do_not_say_it(case: Case) -> None:
    """One object of labels with other rows as references: row i and reference i are a pair."""
    x, r = batch(), rows(len(LABELS), torch.float64, seed=1)
    ours = results(case, x, ref_emb=r, ref_labels=LABELS)
    theirs = results(case, x, ref_emb=r, ref_labels=LABELS.clone())
    assert all(a.equal(b) for a, b in zip(ours, theirs, strict=True))


@pytest.mark.parametrize("case", PAIRED, ids=name_of)
def test_equal_rows_of_a_batch_are_a_pair(case: Case) -> None:
    """A duplicate is at distance 0, as is a row from itself: only the latter is no pair."""
    x, loss = batch().detach(), loss_of(case)
    # Copies first: the first two rows of a class are the pair that the N-pairs loss takes.
    x, labels = torch.cat((x[:2], x)), torch.cat((LABELS[:2], LABELS))
    copies = torch.arange(len(x)) < 2
    near = x + 1e-7 * copies.unsqueeze(1)
    torch.testing.assert_close(loss(x, labels), loss(near, labels), rtol=1e-4, atol=1e-5)
    # What would come out if the copies were in no pair.
    if case.call != "classes":
        without = loss(x, ignoring(labels, rows=copies))
        assert not torch.isclose(loss(x, labels), without, rtol=1e-6)
