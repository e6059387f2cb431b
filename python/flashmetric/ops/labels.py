# SPDX-License-Identifier: Apache-2.0
"""Which pairs are positives and which are negatives: the label rules of every op.

The ops read labels as one or several int64 words per row, and a rule that compares them:

========== ============== =========================================== =============================
rule       words          positives                                   negatives
========== ============== =========================================== =============================
equal      any number     all words equal                             every other pair
any        bits, 63 each  some bit in common                          every other pair
group:PN   class, group   same class; group as P says                 other class; group as N says
========== ============== =========================================== =============================

P and N are ``a`` (any group), ``s`` (same group) or ``d`` (different groups). A row whose first
word is :data:`IGNORED` is in no pair.
"""

from typing import Literal, get_args

import torch
from torch import Tensor

Kind = Literal["positive", "negative"]
KINDS: tuple[str, ...] = get_args(Kind)

IGNORED = -(2**63)
"""First label word of a row that is in no pair."""

# Pairs whose masks exist at once.
_SLAB = 1 << 22

RULES = ("equal", "any", *(f"group:{p}{n}" for p in "asd" for n in "asd"))


def pair_kinds(labels: Tensor, ref_labels: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    """Masks [n, m] of the positive and of the negative pairs of n with m label rows."""
    x, r = words(labels), words(ref_labels)
    known = (x[:, :1] != IGNORED) & (r[:, 0] != IGNORED)
    if rule == "any":
        same = _common_bit(x, r)
    elif rule == "equal":
        same = _equal(x, r)
    else:
        return _by_group(x, r, known, rule)
    return same & known, known.logical_and_(~same)


def words(labels: Tensor) -> Tensor:
    """Labels as [N, words]."""
    return labels.unsqueeze(1) if labels.ndim == 1 else labels


def _equal(x: Tensor, r: Tensor) -> Tensor:
    same = x[:, :1] == r[:, 0]
    for word in range(1, x.shape[1]):
        same &= x[:, word, None] == r[:, word]
    return same


def _common_bit(x: Tensor, r: Tensor) -> Tensor:
    same = torch.zeros((x.shape[0], r.shape[0]), dtype=torch.bool, device=x.device)
    for word in range(x.shape[1]):
        same |= (x[:, word, None] & r[:, word]) != 0
    return same


def _by_group(x: Tensor, r: Tensor, known: Tensor, rule: str) -> tuple[Tensor, Tensor]:
    same_class = x[:, :1] == r[:, 0]
    same_group = x[:, 1:2] == r[:, 1]
    allowed = {"a": known, "s": known & same_group, "d": known & ~same_group}
    return allowed[rule[-2]] & same_class, allowed[rule[-1]] & ~same_class


def pair_counts(labels: Tensor, ref_labels: Tensor | None, rule: str) -> tuple[Tensor, Tensor]:
    """How many positive and negative pairs each row has, int64 [N], without listing them.

    Args:
        labels: of the rows, [N] or [N, words].
        ref_labels: of what they are paired with; None for the rows themselves, each but itself.
        rule: how the labels are compared.
    """
    alone = ref_labels is None
    refs = labels if ref_labels is None else ref_labels
    if rule == "equal" and words(labels).shape[1] == 1:
        return _count_equal(words(labels)[:, 0], words(refs)[:, 0], alone)
    if rule.startswith("group:"):
        return _count_by_group(labels, refs, rule, alone)
    counts = labels.new_zeros((2, labels.shape[0]), dtype=torch.int64)
    step = max(1, _SLAB // max(1, refs.shape[0]))
    for begin in range(0, labels.shape[0], step):
        rows = slice(begin, begin + step)
        for kind, mask in enumerate(pair_kinds(labels[rows], refs, rule)):
            if alone:
                mask.diagonal(begin).fill_(False)
            counts[kind, rows] = mask.sum(1)
    return counts[0], counts[1]


def _count_equal(labels: Tensor, refs: Tensor, alone: bool) -> tuple[Tensor, Tensor]:
    ordered = refs.sort().values
    first, last = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    known = labels != IGNORED
    same = (last - first).masked_fill(~known, 0)
    other = (refs != IGNORED).sum() - same
    return same - known.long() if alone else same, other.masked_fill(~known, 0)


def _count_by_group(labels: Tensor, refs: Tensor, rule: str, alone: bool) -> tuple[Tensor, Tensor]:
    """Counts from those of equal classes, of equal groups, and of both at once."""
    known, of_refs = labels[:, 0] != IGNORED, refs[:, 0] != IGNORED
    # By class, then by group: both are equal where neither changes from one row to the next.
    every = torch.cat([labels, refs])
    order = every[:, 1].argsort(stable=True)
    order = order[every[order, 0].argsort(stable=True)]
    change = (every[order].diff(dim=0) != 0).any(1).cumsum(0)
    both = torch.zeros_like(order).scatter(0, order, torch.nn.functional.pad(change, (1, 0)))
    columns = [*zip(labels.T.contiguous(), refs.T.contiguous(), strict=True)]
    columns.append(both.split([len(labels), len(refs)]))
    one_class, one_group, pair = (_matches(*column, of_refs) for column in columns)
    positives = {"a": one_class, "s": pair, "d": one_class - pair}[rule[-2]]
    other = {"a": of_refs.sum().expand_as(pair), "s": one_group}.get(rule[-1])
    if other is None:
        other = of_refs.sum() - one_group
    same = {"a": one_class, "s": pair, "d": one_class - pair}[rule[-1]]
    if alone and rule[-2] != "d":
        positives = positives - 1
    return positives.masked_fill(~known, 0), (other - same).masked_fill(~known, 0)


def _matches(keys: Tensor, refs: Tensor, counted: Tensor) -> Tensor:
    """How many of the counted ``refs`` equal each key."""
    order = refs.argsort(stable=True)
    ordered = refs[order]
    before = torch.nn.functional.pad(counted[order].cumsum(0), (1, 0))
    first, last = (torch.searchsorted(ordered, keys, right=right) for right in (False, True))
    return before[last] - before[first]


def class_members(labels: Tensor, refs: Tensor, count: int) -> Tensor:
    """The first ``count`` rows of ``refs`` with the one label word of each row, ascending.

    Returns:
        Row numbers [N, count], -1 where there are no more, or the row is in no pair.
    """
    order = refs.argsort(stable=True)
    ordered = refs[order]
    first, last = (torch.searchsorted(ordered, labels, right=right) for right in (False, True))
    position = first.unsqueeze(1) + torch.arange(count, device=labels.device)
    valid = (position < last.unsqueeze(1)) & (labels != IGNORED).unsqueeze(1)
    return order[position.clamp(max=max(len(refs) - 1, 0))].masked_fill(~valid, -1)
