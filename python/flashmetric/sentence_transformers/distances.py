# SPDX-License-Identifier: Apache-2.0
"""The distance and similarity functions of sentence-transformers, as the kernels know them."""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.losses import (
    BatchHardTripletLossDistanceFunction,
    SiameseDistanceMetric,
)
from sentence_transformers.util import (
    SimilarityFunction,
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pytorch_cos_sim,
)

from flashmetric.ops.distance import Distance
from flashmetric.sentence_transformers.fallback import NotFusedError

__all__ = ["PairMetric", "Similarity", "pair_metric", "similarity", "triplet_distance"]


class PairMetric(NamedTuple):
    """A distance of two columns, row by row."""

    distance: Distance
    shift: float
    """Added to every feature of the difference."""


class Similarity(NamedTuple):
    """A similarity of all rows of two columns, ``constant - distance``."""

    distance: Distance
    constant: float


# What torch.nn.functional.pairwise_distance adds.
_EPS = 1e-6
_PAIRS = {
    SiameseDistanceMetric.EUCLIDEAN: PairMetric("euclidean", _EPS),
    SiameseDistanceMetric.MANHATTAN: PairMetric("cityblock", _EPS),
    SiameseDistanceMetric.COSINE_DISTANCE: PairMetric("cosine", 0.0),
}
_SIMILARITIES = {
    cos_sim: Similarity("cosine", 1.0),
    pytorch_cos_sim: Similarity("cosine", 1.0),
    dot_score: Similarity("dot", 0.0),
    euclidean_sim: Similarity("euclidean", 0.0),
    manhattan_sim: Similarity("cityblock", 0.0),
}


def _name(function: Any) -> str:
    return getattr(function, "__name__", repr(function))


def triplet_distance(function: Callable[..., Any]) -> Distance:
    """The kernel's distance that a triplet loss's ``distance_metric`` computes."""
    known = BatchHardTripletLossDistanceFunction
    if (
        isinstance(function, partial)
        and function.func is known.euclidean_distance
        and not function.args
        and set(function.keywords) <= {"squared"}
    ):
        return "sqeuclidean" if function.keywords.get("squared") else "euclidean"
    if function is known.euclidean_distance:
        return "euclidean"
    if function is known.cosine_distance:
        return "cosine"
    raise NotFusedError(
        f"the distance {_name(function)} has no kernel, only those of "
        "BatchHardTripletLossDistanceFunction have"
    )


def pair_metric(function: Callable[..., Any]) -> PairMetric:
    """The kernel's distance that a pair loss's ``distance_metric`` computes."""
    for known, found in _PAIRS.items():
        if function is known:
            return found
    raise NotFusedError(
        f"the distance {_name(function)} has no kernel, only those of SiameseDistanceMetric have"
    )


def similarity(function: Callable[..., Any]) -> Similarity:
    """The kernel's distance behind a ``similarity_fct``, also a model's own ``similarity``."""
    owner = getattr(function, "__self__", None)
    if isinstance(owner, SentenceTransformer) and _name(function) == "similarity":
        function = SimilarityFunction.to_similarity_fn(owner.similarity_fn_name)
    for known, found in _SIMILARITIES.items():
        if function is known:
            return found
    raise NotFusedError(
        f"the similarity {_name(function)} has no kernel, only cos_sim, dot_score, euclidean_sim "
        "and manhattan_sim of sentence_transformers.util have"
    )
