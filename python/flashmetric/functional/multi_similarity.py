# SPDX-License-Identifier: Apache-2.0
"""Multi-similarity loss, over all pairs or over those that its miner keeps."""

import torch
from torch import Tensor

from flashmetric.checks import (
    check_choice,
    check_distance,
    check_flag,
    check_number,
    check_positive,
)
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import REDUCTIONS, Reduction, reduce_anchors
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, PairLists, Pairs
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance


def multi_similarity_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    alpha: float = 2.0,
    beta: float = 50.0,
    base: float = 0.5,
    mining: bool = False,
    epsilon: float = 0.1,
    distance: Distance | Metric = "cosine",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Multi-similarity loss: a soft maximum over positives and one over negatives per anchor.

    Equivalent to, without the N x N matrices::

        s = normalize(embeddings) @ normalize(embeddings).T
        pos = torch.where(same & ~eye, torch.exp(-alpha * (s - base)), 0).sum(1)
        neg = torch.where(~same, torch.exp(beta * (s - base)), 0).sum(1)
        loss = (torch.log(1 + pos) / alpha + torch.log(1 + neg) / beta).mean()

    .. math::
        \ell_i = \frac1\alpha \log\Big(1 + \sum_{p} e^{-\alpha (s_{ip} - \text{base})}\Big)
               + \frac1\beta \log\Big(1 + \sum_{n} e^{\beta (s_{in} - \text{base})}\Big)

    With ``mining`` the sums hold the positives with
    :math:`s_{ip} - \epsilon < \max_n s_{in}` and the negatives with
    :math:`s_{in} + \epsilon > \min_p s_{ip}`.

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        alpha: steepness for positives, above 0. Default: 2.
        beta: steepness for negatives, above 0. Default: 50.
        base: similarity at which a pair begins to cost. Default: 0.5. With a distance other than
            "cosine" and "dot" it is a distance, and -s above is that distance.
        mining: keep only the pairs that the hardest pair of the other kind does not beat by
            ``epsilon``. An anchor without positives or without negatives keeps none. Default:
            False.
        epsilon: slack of the mining. Default: 0.1.
        distance: Default: ``"cosine"``.
        normalize: see there.
        reduction: ``"mean"`` (default) over all anchors of the batch, also those without pairs;
            ``"mean_nonzero"`` over those with a loss above 0; ``"sum"``; ``"none"``.
        ref_emb: see there.
        ref_labels: see there.
        indices_tuple: see there.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. float32, or float64 for float64 embeddings.
        Without any pair it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. ``mining`` takes two sweeps
    more; which pairs it keeps is no part of the gradient.

    Example:
        >>> import torch
        >>> from flashmetric.functional import multi_similarity_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> multi_similarity_loss(x, torch.tensor([0, 0, 1])).item()
        0.649...

    Source:
        X. Wang et al.: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning,
        CVPR 2019. beta is 50 in the paper and 40 in the authors' configuration.
    """
    check_multi_similarity_options(
        alpha, beta, base, mining, epsilon, distance, normalize, reduction
    )
    alpha, beta, level = float(alpha), float(beta), _as_distance(float(base), distance)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    lse = pairs.logsumexp(
        positive=Logit(alpha, -alpha * level),
        negative=Logit(-beta, beta * level),
        bounds=_mined_bounds(pairs, float(epsilon)) if mining else (None, None),
    )
    one = torch.zeros_like(lse.positive)  # the logarithm of the 1 in log(1 + sum)
    loss = torch.logaddexp(lse.positive, one) / alpha + torch.logaddexp(lse.negative, one) / beta
    return reduce_anchors(loss, None, reduction)


def _as_distance(level: float, distance: Distance | Metric) -> float:
    """A level of similarity as a level of ``distance``; one of another distance stays as it is."""
    name = distance.kernel if isinstance(distance, Metric) else distance
    if name == "cosine":
        return 1.0 - level
    return -level if name == "dot" else level


def _mined_bounds(pairs: Pairs, epsilon: float) -> tuple[Tensor, Tensor]:
    """Positives count beyond the first bound, negatives before the second."""
    nearest, farthest = pairs.nearest("negative"), pairs.farthest("positive")
    return _beyond(nearest, -epsilon, torch.inf), _beyond(farthest, epsilon, -torch.inf)


def _beyond(extreme: PairLists, step: float, none: float) -> Tensor:
    return (extreme.distance.detach() + step).masked_fill(~extreme.valid, none)[:, 0]


def check_multi_similarity_options(
    alpha: float,
    beta: float,
    base: float,
    mining: bool,
    epsilon: float,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`multi_similarity_loss` are valid."""
    check_positive("alpha", alpha)
    check_positive("beta", beta)
    check_number("base", base)
    check_flag("mining", mining)
    check_number("epsilon", epsilon)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
