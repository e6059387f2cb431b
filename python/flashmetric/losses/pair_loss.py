# SPDX-License-Identifier: Apache-2.0
"""A formula on pairs as a module."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from flashmetric.checks import check_distance
from flashmetric.distances import Metric
from flashmetric.functional.pair_loss import pair_loss
from flashmetric.functional.pairs import Pairs
from flashmetric.losses.base import Loss
from flashmetric.ops.distance import Distance


def _with_formula(
    embeddings: Tensor, labels: Any, *, formula: Callable[[Pairs], Tensor], **options: Any
) -> Tensor:
    return pair_loss(formula, embeddings, labels, **options)


def _check(
    formula: Callable[[Pairs], Tensor], distance: Distance | Metric, normalize: bool
) -> None:
    if not callable(formula):
        raise TypeError(f"formula must be callable, got {type(formula).__name__}")
    check_distance(distance, normalize)


class PairLoss(Loss):
    """A loss of your own on the fused kernels, see :func:`flashmetric.functional.pair_loss`.

    Args:
        formula: turns the pairs of a batch into the loss; a module's parameters are learned.
        distance: a name or a distance with parameters.
        normalize: scale rows to unit length first.

    Example:
        >>> import torch
        >>> from flashmetric import PairLoss
        >>> from flashmetric.functional import Term
        >>> loss = PairLoss(lambda pairs: pairs.total(Term("square")).positive)
        >>> loss(torch.tensor([[0.0], [3.0]]), torch.tensor([1, 1])).item()
        18.0
    """

    function = staticmethod(_with_formula)
    check = staticmethod(_check)

    def __init__(
        self,
        formula: Callable[[Pairs], Tensor],
        *,
        distance: Distance | Metric = "euclidean",
        normalize: bool = False,
    ) -> None:
        """Check and store the formula and the distance."""
        super().__init__(formula=formula, distance=distance, normalize=normalize)
