# SPDX-License-Identifier: Apache-2.0
"""Large margin nearest neighbours: pull fixed target neighbours, push impostors."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.totals import count_of, total_of
from flashmetric.functional.triplet_selection import spoil
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, accumulate_dtype

Reduction = Literal["sum", "mean", "none"]
_REDUCTION = get_args(Reduction)


def lmnn_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    n_neighbors: int = 3,
    margin: float = 1.0,
    pull_weight: float = 0.5,
    push_weight: float = 0.5,
    distance: Distance | Metric = "sqeuclidean",
    reduction: Reduction = "sum",
    normalize: bool = False,
    target_neighbors: Tensor | None = None,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Loss of large margin nearest neighbour classification.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings).square()
        pull = push = 0
        for a in range(len(d)):
            for p in target_neighbors[a]:
                pull += d[a, p]
                push += (margin + d[a, p] - d[a, labels != labels[a]]).relu().sum()
        loss = pull_weight * pull + push_weight * push

    .. math::
        L = w_\text{pull} \sum_{a, p \in T(a)} d(a, p)
          + w_\text{push} \sum_{a, p \in T(a)} \sum_n \max(\text{margin} + d(a, p) - d(a, n), 0)

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        n_neighbors: how many nearest positives are target neighbours where none are given.
            Default: 3.
        margin: how much farther than a target neighbour a negative should be. Default: 1.
        pull_weight: factor on the distances of target neighbours. Default: 1/2.
        push_weight: factor on the hinges. Default: 1/2.
        distance: a name (see :mod:`flashmetric.distances`) or a distance with parameters, such as
            :class:`flashmetric.distances.LearnedMahalanobis`. Default: ``"sqeuclidean"``.
        reduction: ``"sum"`` (default), ``"mean"`` over the anchors that have target neighbours, or
            ``"none"`` for the loss of each anchor.
        normalize: scale rows to unit length first. Default: False.
        target_neighbors: row numbers of the target neighbours of each anchor, int64, shape [N, k],
            -1 for none; see :func:`target_neighbors`. Default: the nearest positives in this very
            batch, which so change from step to step.
        ref_emb: rows to take neighbours and impostors from, shape [M, D]. Default: the anchors
            themselves, a row being no pair with itself.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n): the positive pairs are the target
            neighbours, the negative pairs all possible impostors.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any target neighbour it is 0 and
        back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Memory:
        O((N + M) D + N k). Ties, determinism and precision as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import lmnn_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.5]])
        >>> lmnn_loss(x, torch.tensor([0, 0, 1])).item()
        1.875

    Source:
        K. Weinberger, L. Saul: Distance Metric Learning for Large Margin Nearest Neighbor
        Classification, JMLR 2009. Weights and k are those of metric-learn.
    """
    check_lmnn_options(
        n_neighbors, margin, pull_weight, push_weight, distance, reduction, normalize
    )
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    if isinstance(pairs, ListedPairs):
        targets = pairs.positives()
    elif target_neighbors is None:
        targets = pairs.top("positive", n_neighbors)
    else:
        check_target_neighbors(target_neighbors, pairs.anchors, embeddings.device)
        assert isinstance(pairs, AllPairs)
        targets = pairs.distances(target_neighbors)
    pull = targets.distance.double().sum(1)
    nearest = targets.distance.masked_fill(~targets.valid, -torch.inf).sort(1).values
    push = pairs.threshold_sum("negative", "hinge", nearest + float(margin))[0].sum(1)
    loss = float(pull_weight) * pull + float(push_weight) * push
    if reduction != "none":
        loss = total_of(loss)
        if reduction == "mean":
            loss = loss / count_of(targets.valid.any(1)).clamp(min=1)
    return spoil(pairs, loss.to(accumulate_dtype(embeddings.dtype)))


@torch.no_grad()
def target_neighbors(
    embeddings: Tensor,
    labels: Tensor | Labels,
    n_neighbors: int = 3,
    *,
    distance: Distance | Metric = "sqeuclidean",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
) -> Tensor:
    """The nearest positives of each row, to be found once, in the space that training starts from.

    Args:
        embeddings: rows, shape [N, D].
        labels: their classes, shape [N], or :class:`Labels`.
        n_neighbors: how many. Default: 3.
        distance: as for :func:`lmnn_loss`.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: rows to choose from, shape [M, D]. Default: the same rows.
        ref_labels: their classes, shape [M].

    Returns:
        Row numbers, int64, shape [N, n_neighbors], nearest first; -1 where there are fewer.

    Example:
        >>> import torch
        >>> from flashmetric.functional.lmnn import target_neighbors
        >>> target_neighbors(torch.tensor([[0.0], [1.0], [1.5]]), torch.tensor([0, 0, 1]), 1)
        tensor([[ 1],
                [ 0],
                [-1]])
    """
    _check_count(n_neighbors)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
    )
    return pairs.top("positive", n_neighbors).other


def check_lmnn_options(
    n_neighbors: int,
    margin: float,
    pull_weight: float,
    push_weight: float,
    distance: str | Metric,
    reduction: str,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`lmnn_loss` are valid."""
    _check_count(n_neighbors)
    check_number("margin", margin)
    check_number("pull_weight", pull_weight)
    check_number("push_weight", push_weight)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, _REDUCTION)


def _check_count(n_neighbors: object) -> None:
    if not isinstance(n_neighbors, int) or isinstance(n_neighbors, bool):
        raise TypeError(f"n_neighbors must be an integer, got {type(n_neighbors).__name__}")
    if n_neighbors < 1:
        raise ValueError(f"n_neighbors must be at least 1, got {n_neighbors}")


def check_target_neighbors(target: object, anchors: int, device: torch.device) -> None:
    """Raise unless there is one row of int64 row numbers per anchor; the op checks their range."""
    if not isinstance(target, Tensor) or target.dtype != torch.int64:
        raise TypeError("target_neighbors must be an int64 tensor")
    if target.ndim != 2 or target.shape[0] != anchors or target.shape[1] == 0:
        raise ValueError(
            f"target_neighbors must have shape [{anchors}, k], got {tuple(target.shape)}"
        )
    if target.device != device:
        raise ValueError(f"target_neighbors must be on {device}, got {target.device}")
