# SPDX-License-Identifier: Apache-2.0
"""Losses on similarities, in terms of the distances that the kernels measure."""

from typing import Literal, get_args

from torch import Tensor

from flashmetric.functional.pairs import Term
from flashmetric.ops.terms import Formula

Similarity = Literal["cosine", "dot"]
"""Distances that are a constant less a similarity."""
SIMILARITIES: tuple[str, ...] = get_args(Similarity)


def similarity_term(
    formula: Formula,
    scale: float | Tensor,
    offset: float | Tensor,
    distance: Similarity = "cosine",
) -> Term:
    """f(scale * s + offset) of the similarity s of a pair.

    That is 1 - d for the cosine distance, -d for the inner product.
    """
    return Term(formula, -scale, scale + offset if distance == "cosine" else offset)
