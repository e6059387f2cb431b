# SPDX-License-Identifier: Apache-2.0
"""How sums over all labelled pairs are asked for changes nothing about them."""

import pytest
import torch
from torch import Tensor

from flashmetric.functional import Pairs, Term, all_pairs, pair_loss
from flashmetric.labels import Labels, ignoring, two_level
from helpers import make_labels, make_rows


@pytest.mark.parametrize("refs", [False, True])
@pytest.mark.parametrize("kind", ["plain", "ignoring", "groups"])
def test_rows_by_class(monkeypatch: pytest.MonkeyPatch, kind: str, refs: bool) -> None:
    """Sums over positives alone come from rows in the order of their classes."""
    x, r = make_rows(60, 5), make_rows(40, 5)
    weight = torch.rand(60, dtype=torch.float64, requires_grad=True)

    def labels(n: int) -> Tensor | Labels:
        classes = make_labels(n, 12)
        if kind == "groups":
            return two_level(classes, make_labels(n, 3), positives="different")
        return ignoring(classes, 3) if kind == "ignoring" else classes

    def formula(pairs: Pairs) -> Tensor:
        rows = pairs.sum(Term("softplus", weight, -weight))
        total = pairs.total(Term("square", 2.0, weight))
        order = torch.arange(60) + 1
        return (rows.positive * order).sum() + total.positive + (rows.positives * order).sum()

    own = labels(60)
    options = {"ref_emb": r, "ref_labels": labels(40)} if refs else {}
    results = []
    for least in (1 << 60, 1):
        monkeypatch.setattr(all_pairs, "_MANY_PAIRS", least)
        x.grad = r.grad = weight.grad = None
        loss = pair_loss(formula, x, own, **options)
        loss.backward()
        results.append([loss.detach(), x.grad, weight.grad, *([r.grad] if refs else [])])
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
