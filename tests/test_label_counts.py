# SPDX-License-Identifier: Apache-2.0
"""Counts of positives and negatives, found without N x M masks, against those masks."""

import pytest
import torch

from flashmetric.ops.labels import IGNORED, RULES, pair_counts, pair_kinds

GROUPED = [rule for rule in RULES if rule.startswith("group:")]


@pytest.mark.parametrize("rule", GROUPED)
@pytest.mark.parametrize("sizes", [(40, 55), (40, 40), (1, 7), (5, 0), (0, 5)], ids=str)
@pytest.mark.parametrize("alone", [False, True], ids=["references", "batch"])
def test_counts_by_group(rule: str, sizes: tuple[int, int], alone: bool) -> None:
    labels, refs = (torch.randint(-2, 4, (size, 2)) for size in sizes)
    for rows in (labels, refs):
        # Neither numbers at the ends of the range nor rows in no pair are anything but numbers.
        rows[::5, 0] = IGNORED
        rows[1::7, 1] = IGNORED
        rows[2::9] = torch.iinfo(torch.int64).max
    masks = pair_kinds(labels, labels if alone else refs, rule)
    if alone:
        for mask in masks:
            mask.fill_diagonal_(False)
    counts = pair_counts(labels, None if alone else refs, rule)
    for count, mask in zip(counts, masks, strict=True):
        assert count.dtype == torch.int64
        assert count.tolist() == mask.sum(1).tolist()


def test_counts_by_group_look_at_no_pairs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flashmetric.ops.labels.pair_kinds", None)
    labels = torch.stack([torch.arange(60_000) % 3, torch.arange(60_000)], 1)
    positives, negatives = pair_counts(labels, labels.clone(), "group:da")
    assert positives.unique().tolist() == [19_999]
    assert negatives.unique().tolist() == [40_000]
