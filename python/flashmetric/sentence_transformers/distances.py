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
    cos_sim,
    dot_score,
    euclidean_sim,
    manhattan_sim,
    pytorch_cos_sim,
)

from flashmetric.ops.distance import Distance
from flashmetric.sentence_transformers.fallback import NotFusedError

__all__ = ["Similarity", "pair_metric", "similarity", "triplet_distance"]


class Similarity(NamedTuple):
    """A similarity of all rows of two columns, ``constant - distance``."""

    distance: Distance
    constant: float


_PAIRS: dict[Callable[..., Any], Distance] = {
    SiameseDistanceMetric.EUCLIDEAN: "euclidean",
    SiameseDistanceMetric.MANHATTAN: "cityblock",
    SiameseDistanceMetric.COSINE_DISTANCE: "cosine",
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


def pair_metric(function: Callable[..., Any]) -> Distance:
    """The distance that a pair loss's ``distance_metric`` computes."""
    for known, found in _PAIRS.items():
        if function is known:
            return found
    raise NotFusedError(
        f"the distance {_name(function)} is not known, only those of SiameseDistanceMetric are"
    )


def similarity(function: Any) -> Similarity:
    """The kernel's distance behind a ``similarity_fct``, also a model's own ``similarity``."""
    if getattr(function, "__func__", None) is SentenceTransformer.similarity:
        model = function.__self__
        # The first look at the name chooses the function.
        assert model.similarity_fn_name
        function = model._similarity
    for known, found in _SIMILARITIES.items():
        if function is known:
            return found
    raise NotFusedError(
        f"the similarity {_name(function)} has no kernel, only cos_sim, dot_score, euclidean_sim "
        "and manhattan_sim of sentence_transformers.util have"
    )
