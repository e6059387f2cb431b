# SPDX-License-Identifier: Apache-2.0
"""What a miner has chosen, in tensors of a size that does not depend on what it found.

Every loss takes these in place of a plain ``indices_tuple``. Entries that are not valid contribute
nothing to it, neither a value nor a count, and nobody waits for the device to learn which they are.
"""

from typing import NamedTuple

from torch import Tensor

__all__ = ["PairIndices", "TripletIndices", "is_ascending"]


class TripletIndices(NamedTuple):
    """Triplets in tensors of a size that does not depend on what was found, all [T]."""

    anchors: Tensor
    positives: Tensor
    """-1 where none was found, as in ``negatives``."""
    negatives: Tensor
    valid: Tensor
    """Which entries are triplets, bool."""

    def pairs(self) -> "PairIndices":
        """The pairs (a, p) and (a, n)."""
        a, p, n, valid = self
        return PairIndices(a, p, a, n, valid, valid)

    def indices(self) -> tuple[Tensor, ...]:
        """The triplets (a, p, n) alone; waits for the device to count them."""
        keep = self.valid.nonzero().squeeze(1)
        return self.anchors[keep], self.positives[keep], self.negatives[keep]


class PairIndices(NamedTuple):
    """Pairs in tensors of a size that does not depend on what was found, [P] and [Q]."""

    positive_anchors: Tensor
    positives: Tensor
    """-1 where none was found, as in ``negatives``."""
    negative_anchors: Tensor
    negatives: Tensor
    positive_valid: Tensor
    """Which entries are positive pairs, bool [P]."""
    negative_valid: Tensor

    def indices(self) -> tuple[Tensor, ...]:
        """The pairs (a1, p, a2, n) alone; waits for the device to count them."""
        a1, p, a2, n, positive_valid, negative_valid = self
        return *_only(positive_valid, a1, p), *_only(negative_valid, a2, n)


def _only(valid: Tensor, anchors: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    if valid.all():
        return anchors, others
    keep = valid.nonzero().squeeze(1)
    return anchors[keep], others[keep]


def is_ascending(keys: Tensor) -> bool:
    """Whether numbers [P] are sorted and each is there once; waits for the device."""
    return bool((keys[1:] > keys[:-1]).all())
