# SPDX-License-Identifier: Apache-2.0
"""What a loss can ask of its pairs: sums, log-sum-exps, extremes and lists, all differentiable.

A loss is a formula on a :class:`Pairs`, in ordinary PyTorch on O(N) results. ``all_pairs.py``
answers for every labelled pair of a batch with the fused kernels, ``listed_pairs.py`` for the pairs
that a miner has chosen, with the same results.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

from torch import Tensor

from flashmetric.ops.labels import Kind
from flashmetric.ops.terms import Formula
from flashmetric.ops.terms import Logit as LogitForm

Parameter = float | Tensor
"""One number for all anchors, or one per anchor [N]; tensors get gradients."""


class Term(NamedTuple):
    """What a pair adds to a sum: f(z) with z = scale * distance + offset.

    Formulas: ``"linear"`` z, ``"square"`` z^2, ``"hinge"`` max(z, 0), ``"squared_hinge"``,
    ``"softplus"`` log(1 + e^z), ``"exp"`` e^z, ``"squared_sigmoid"`` 1 / (1 + e^-z)^2.
    """

    formula: Formula
    scale: Parameter = 1.0
    offset: Parameter = 0.0


class Logit(NamedTuple):
    """What a pair adds to a log-sum-exp: e^l with l of z = scale * distance + offset.

    Forms: ``"affine"`` l = z; ``"circle"`` l = max(z + shape, 0) (z - shape), of which the first
    factor counts as a constant in the gradient.
    """

    scale: Parameter = 1.0
    offset: Parameter = 0.0
    form: LogitForm = "affine"
    shape: float = 0.0


class Sums(NamedTuple):
    """Sums over the pairs of each anchor, [N], or over all pairs, 0-d."""

    positive: Tensor
    negative: Tensor
    positives: Tensor
    """How many positives there are, int64."""
    negatives: Tensor
    active_positives: Tensor
    """How many positives have a value above 0, int64."""
    active_negatives: Tensor


class LogSumExps(NamedTuple):
    """Log-sum-exps over the pairs of each anchor, [N]; -inf where there are none."""

    positive: Tensor
    negative: Tensor
    positive_mean: Tensor
    """Mean distance under the softmax weights, a constant; 0 where there are none."""
    negative_mean: Tensor
    positives: Tensor
    """How many positives there are, int64."""
    negatives: Tensor


class PairLists(NamedTuple):
    """Pairs of each anchor in lists of one length, [N, K], filled up with -1."""

    other: Tensor
    """Reference rows, int64; -1 for none."""
    distance: Tensor
    """Their distances, differentiable; 0 for none."""
    valid: Tensor
    """Which entries are pairs, bool."""


def largest(counts: Tensor) -> int:
    """The largest of the counts, at least 1; waits for the device."""
    return max(1, int(counts.max())) if counts.numel() else 1


class Pairs(ABC):
    """The positive and negative pairs of a batch. Smaller distances are always closer."""

    anchors: int
    """N, the number of anchors."""
    references: int
    """M, the number of rows that anchors are paired with."""
    embeddings: Tensor
    """Anchors as they are compared: mapped or of unit length if the distance asks for that."""
    ref_emb: Tensor | None
    """References likewise; None if they are the anchors."""
    distance: str
    """Name of the distance between such rows."""
    anchor_scale: Tensor | None
    """Factor [N] on all distances of each anchor; None for 1."""

    @abstractmethod
    def sum(
        self,
        positive: Term | None = None,
        negative: Term | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> Sums:
        """Sums per anchor.

        Only positives farther than ``bounds[0]`` [N] count, and negatives nearer than
        ``bounds[1]`` [N].
        """

    @abstractmethod
    def total(self, positive: Term | None = None, negative: Term | None = None) -> Sums:
        """Sums over all anchors; cheaper than :meth:`sum`: one sweep finds value and gradient."""

    @abstractmethod
    def logsumexp(
        self,
        positive: Logit | None = None,
        negative: Logit | None = None,
        *,
        bounds: tuple[Tensor | None, Tensor | None] = (None, None),
    ) -> LogSumExps:
        """Log-sum-exps per anchor; bounds as in :meth:`sum`."""

    @abstractmethod
    def nearest(self, kind: Kind, beyond: Tensor | None = None) -> PairLists:
        """The nearest pair of a kind, farther than ``beyond`` [N, K] (or [N, 1] without)."""

    @abstractmethod
    def farthest(self, kind: Kind, below: Tensor | None = None) -> PairLists:
        """The farthest pair of a kind, nearer than ``below`` [N, K] (or [N, 1] without)."""

    @abstractmethod
    def top(self, kind: Kind, k: int, *, farthest: bool = False) -> PairLists:
        """The k nearest (or farthest) pairs of a kind, in that order."""

    @abstractmethod
    def counts(self) -> tuple[Tensor, Tensor]:
        """How many positives and how many negatives each anchor has, int64 [N]."""

    @abstractmethod
    def threshold_sum(
        self, kind: Kind, formula: Formula, thresholds: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Sums [N, K] in float64 of f(threshold - distance) over the pairs of a kind.

        Also int64 counts [N, K] of those nearer than the threshold. Thresholds are [N, K] or
        [1, K] and ascend within a row; -inf stands for none.
        """

    def positives(self, limit: int | None = None) -> PairLists:
        """All positives of each anchor, farthest first, in O(N K) memory; K is at least 1.

        Without ``limit``, K is counted first, which waits for the device and cannot be compiled
        into one graph; with it, only the ``limit`` farthest are listed.
        """
        if limit is None:
            limit = largest(self.counts()[0])
        return self.top("positive", limit, farthest=True)
