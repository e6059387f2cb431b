# SPDX-License-Identifier: Apache-2.0
"""Binomial deviance on similarities."""

from typing import Literal, get_args

from torch import Tensor

from flashmetric.checks import check_choice, check_flag, check_number, check_positive
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import (
    PAIR_REDUCTIONS,
    anchors_with_pairs,
    reduce_pairs,
    totals,
)
from flashmetric.functional.pairs import Pairs, Sums, Term
from flashmetric.functional.similarity import SIMILARITIES, Similarity, similarity_term
from flashmetric.functional.totals import count_of, one_batch, total_of
from flashmetric.labels import Labels

DevianceReduction = Literal["mean", "mean_separate", "mean_nonzero", "sum", "none", "bier", "horde"]
_REDUCTION = get_args(DevianceReduction)
assert set(PAIR_REDUCTIONS) < set(_REDUCTION)


def binomial_deviance_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 0.5,
    cost: float = 25.0,
    distance: Similarity = "cosine",
    reduction: DevianceReduction = "mean_separate",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Binomial deviance: a logistic loss on cosines in which negatives count more steeply.

    Equivalent to, without the N x N matrices::

        s = F.normalize(embeddings) @ F.normalize(embeddings).T
        same = labels[:, None] == labels
        pos = F.softplus(-alpha * (s[same & ~torch.eye(len(s), dtype=torch.bool)] - beta))
        neg = F.softplus(alpha * cost * (s[~same] - beta))
        loss = pos.mean() + neg.mean()

    .. math::
        \ell_{ij} = \begin{cases}
            \log(1 + e^{-\alpha (s_{ij} - \beta)}) & \text{same class} \\
            \log(1 + e^{\alpha C (s_{ij} - \beta)}) & \text{other class}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        alpha: steepness, above 0. Default: 2.
        beta: similarity that separates positives from negatives. Default: 0.5.
        cost: C, how much steeper negatives are, above 0. Default: 25.
        distance: ``"cosine"`` (default) or ``"dot"``, which is minus the similarity.
        reduction: ``"mean_separate"`` (default) is the mean over all positives plus the mean over
            all negatives; ``"bier"`` divides the positives by their number plus the number of
            anchors, as BIER's code does, which counts each row as its own positive but not its
            loss; ``"horde"`` is the sum over the anchors of the mean over its positives plus the
            mean over its negatives, as in HORDE's code; ``"mean"``, ``"mean_nonzero"``, ``"sum"``
            or ``"none"`` as for :func:`contrastive_loss`.
        normalize: scale rows to unit length first; the cosine does so itself. Default: False.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. No exponential overflows.

    Example:
        >>> import torch
        >>> from flashmetric.functional import binomial_deviance_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0]])
        >>> binomial_deviance_loss(x, torch.tensor([0, 0])).item()
        0.313...

    Source:
        E. Ustinova, V. Lempitsky: Learning Deep Embeddings with Histogram Loss, NIPS 2016 (after
        D. Yi et al., ICPR 2014); M. Opitz et al.: BIER, ICCV 2017.
    """
    check_deviance_options(alpha, beta, cost, distance, reduction, normalize)
    alpha, beta, cost = float(alpha), float(beta), float(cost)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    steep = alpha * cost
    positive = similarity_term("softplus", -alpha, alpha * beta, distance)
    negative = similarity_term("softplus", steep, -steep * beta, distance)
    if reduction == "bier":
        return _over_selves_too(pairs, positive, negative)
    if reduction == "horde":
        return _means_of_anchors(pairs.sum(positive, negative))
    return reduce_pairs(pairs, positive, negative, reduction)


def _over_selves_too(pairs: Pairs, positive: Term, negative: Term) -> Tensor:
    rows = pairs.sum(positive, negative)
    total = totals(rows)
    selves = count_of(anchors_with_pairs(rows)) if one_batch(pairs.ref_emb) else 0
    positives = (total.positives + selves).clamp(min=1)
    return total.positive / positives + total.negative / total.negatives.clamp(min=1)


def _means_of_anchors(rows: Sums) -> Tensor:
    positive = rows.positive / rows.positives.clamp(min=1)
    return total_of(positive + rows.negative / rows.negatives.clamp(min=1))


def check_deviance_options(
    alpha: float, beta: float, cost: float, distance: str, reduction: str, normalize: bool
) -> None:
    """Raise unless the options of :func:`binomial_deviance_loss` are valid."""
    check_positive("alpha", alpha)
    check_number("beta", beta)
    check_positive("cost", cost)
    check_choice("distance", distance, SIMILARITIES)
    check_choice("reduction", reduction, _REDUCTION)
    check_flag("normalize", normalize)
