# SPDX-License-Identifier: Apache-2.0
"""The softmax over in-batch negatives, from log-sum-exps that the kernels find.

Row i of every column belongs to example i: a query, its document, and hard negatives of it. What
other examples add to a softmax comes from a sweep over all pairs. What the example's own rows add
comes from a list of few pairs, so that each may have a penalty of its own.
"""

from typing import Any

import torch
from sentence_transformers.util import all_gather_with_grad, get_rank
from torch import Tensor

from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.anchor_reduction import reduce_anchors, softplus
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pairs import Logit
from flashmetric.sentence_transformers.distances import Similarity, similarity
from flashmetric.sentence_transformers.fallback import NotFusedError, check_fused_rows

__all__ = ["ranking_loss"]

# Far below any logit, and still finite: the softmax of nothing but -inf has no gradient.
_NOTHING = -1e30


def ranking_loss(options: Any, queries: Tensor, docs: list[Tensor]) -> Tensor:
    """The loss of these embeddings, or :class:`NotFusedError` before anything costly.

    Args:
        options: has the attributes of a ``MultipleNegativesRankingLoss``.
        queries: shape [B, D].
        docs: the documents, and any columns of hard negatives, each [B, D].
    """
    for name in ("scale", "hardness_strength"):
        if isinstance(getattr(options, name), Tensor):
            raise NotFusedError(f"{name} is a tensor")
    kind = similarity(options.similarity_fct)
    check_fused_rows(queries, *docs)
    if any(len(column) != len(queries) for column in docs):
        raise NotFusedError("the columns differ in the number of rows")

    examples = _Examples(kind, queries, docs, bool(options.gather_across_devices))
    positive, negatives = _logits(options, examples)
    if options.partition_mode == "joint":
        if "doc_to_query" in negatives:
            # That direction names the positive once more.
            negatives["doc_to_query"].append(positive.unsqueeze(1))
        rows = softplus(_logsumexp(sum(negatives.values(), [])) - positive)
    else:
        rows = torch.stack([softplus(_logsumexp(z) - positive) for z in negatives.values()]).mean(0)
    return reduce_anchors(rows, None, "mean")


class _Examples:
    """Rows as the kernels compare them: of W examples, B of which are this process's own."""

    def __init__(self, kind: Similarity, queries: Tensor, docs: list[Tensor], gather: bool) -> None:
        self.kind, self.columns = kind, len(docs)
        self.size, self.first = len(queries), 0
        if gather:
            # The parent's, whose gradients go back to the process that a row came from.
            queries, *docs = (all_gather_with_grad(column) for column in (queries, *docs))
            self.first = get_rank() * self.size
        every_doc = docs[0] if len(docs) == 1 else torch.cat(docs)
        if kind.distance == "cosine":
            queries, every_doc = normalize_rows(queries), normalize_rows(every_doc)
        self.queries, self.docs = queries, every_doc  # [W, D], [columns W, D]
        self.world = torch.arange(len(queries), device=queries.device)
        self.numbers = self._own(self.world)

    def _own(self, column: Tensor) -> Tensor:
        alone = self.size == len(self.queries) == len(column)
        return column if alone else column[self.first : self.first + self.size]

    @property
    def alone(self) -> bool:
        """Whether all examples are this process's own."""
        return self.size == len(self.queries)

    def between(self, anchors: Tensor, references: Tensor) -> AllPairs:
        """Own rows of the first column of ``anchors``, with all references.

        Rows of one example are positives of each other.
        """
        numbers = (
            self.world if len(references) == len(self.world) else self.world.repeat(self.columns)
        )
        distance = self.kind.distance
        return AllPairs(self._own(anchors), self.numbers, references, numbers, "equal", distance)

    def of_own_rows(self, pairs: AllPairs) -> Tensor:
        """Similarities [B, columns] of each query to the documents of its own example."""
        columns = torch.arange(self.columns, device=self.numbers.device)
        index = self.numbers.unsqueeze(1) + len(self.world) * columns
        return self.kind.constant - pairs.distances(index).distance

    def logit(self, scale: float) -> Logit:
        """``scale`` times the similarity."""
        return Logit(-scale, scale * self.kind.constant)


def _logits(options: Any, examples: _Examples) -> tuple[Tensor, dict[str, list[Tensor]]]:
    """The logit of each query's document [B], and by direction all others, as lists of [B, any].

    Those of other examples are summed up to one, their log-sum-exp.
    """
    scale, strength = float(options.scale), float(options.hardness_strength)
    mode = options.hardness_mode
    of_own = strength if mode in ("hard_negatives", "all_negatives") else 0.0
    of_others = strength if mode in ("in_batch_negatives", "all_negatives") else 0.0
    queries, docs = examples.queries, examples.docs

    pairs = examples.between(queries, docs)
    similarities = examples.of_own_rows(pairs)
    positive, own = scale * similarities[:, 0], similarities[:, 1:]
    own = scale * own + of_own * own.detach()
    backward: Tensor | None = None
    if "doc_to_query" in options.directions and examples.alone and not of_others:
        by_query, by_doc = pairs.logsumexp_both_ways(negative=examples.logit(scale))
        forward, backward = by_query.negative, by_doc.negative[: len(queries)]
    else:
        forward = _penalized(examples, pairs, scale, of_others)
    negatives = {"query_to_doc": [own, forward.unsqueeze(1)]}
    if "doc_to_query" in options.directions:
        if backward is None:
            backward = _penalized(examples, examples.between(docs, queries), scale)
        negatives["doc_to_query"] = [backward.unsqueeze(1)]
    for name, column in (("query_to_query", queries), ("doc_to_doc", docs)):
        if name in options.directions:
            same = _penalized(examples, examples.between(column, column), scale)
            negatives[name] = [same.unsqueeze(1)]
    return positive, negatives


def _penalized(examples: _Examples, pairs: AllPairs, scale: float, strength: float = 0.0) -> Tensor:
    """Log-sum-exp [B] of scale * s + strength * s.detach() over rows of other examples."""
    lse = pairs.logsumexp(negative=examples.logit(scale + strength)).negative
    if not strength:
        return lse
    # Its derivative by s is (scale + strength) times the softmax, of which scale times is wanted.
    share = scale / (scale + strength)
    return share * lse + (1 - share) * lse.detach()


def _logsumexp(parts: list[Tensor]) -> Tensor:
    logits = torch.cat(parts, 1)
    return logits.masked_fill(logits == -torch.inf, _NOTHING).logsumexp(1)
