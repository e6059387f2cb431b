# SPDX-License-Identifier: Apache-2.0
"""Triplet loss on weighted means of an anchor's pairs, the harder ones weighing more."""

from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_flag, check_number
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import (
    REDUCTIONS,
    Reduction,
    both_finite,
    reduce_anchors,
    softplus,
    straight_through,
)
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance


def adaptive_weighted_triplet_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 1.0,
    smooth: bool = False,
    distance: Distance | Metric = "euclidean",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Triplet loss between softmax-weighted mean distances of an anchor's pairs.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        w_pos = d.masked_fill(~same | eye, -torch.inf).softmax(1).detach()
        w_neg = (-d).masked_fill(same, -torch.inf).softmax(1).detach()
        loss = (margin + (w_pos * d).sum(1) - (w_neg * d).sum(1)).relu().mean()

    .. math::
        \ell_i = \max\Big(0, m + \sum_p w_p d_{ip} - \sum_n w_n d_{in}\Big), \quad
        w_p = \frac{e^{d_{ip}}}{\sum_q e^{d_{iq}}}, \quad
        w_n = \frac{e^{-d_{in}}}{\sum_q e^{-d_{iq}}}

    The weights count as constants in the gradient.

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        margin: how much farther than the positives the negatives should be. Default: 1.
        smooth: softplus in place of the hinge. Default: False.
        distance: Default: ``"euclidean"``, not squared.
        normalize: see there.
        reduction: ``"mean"`` (default) over the anchors that have a positive and a negative;
            ``"mean_nonzero"`` over those with a loss above 0; ``"sum"``; ``"none"``.
        ref_emb: see there.
        ref_labels: see there.
        indices_tuple: see there.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], 0 for anchors that do not count. float32, or
        float64 for float64 embeddings. Without any anchor that counts it is 0 and back-propagates
        zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import adaptive_weighted_triplet_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.5]], requires_grad=True)
        >>> adaptive_weighted_triplet_loss(x, torch.tensor([0, 0, 1])).item()
        1.0

    Source:
        E. Ristani, C. Tomasi: Features for Multi-Target Multi-Camera Tracking and
        Re-Identification, CVPR 2018.
    """
    check_adaptive_weighted_triplet_options(margin, smooth, distance, normalize, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    lse = pairs.logsumexp(Logit(1.0, 0.0), Logit(-1.0, 0.0))
    # A log-sum-exp has the softmax weights as its gradient.
    counted, positive, negative = both_finite(lse.positive, lse.negative)
    violation = float(margin) + straight_through(
        lse.positive_mean - lse.negative_mean, positive + negative
    )
    loss = softplus(violation) if smooth else violation.relu()
    return reduce_anchors(loss, counted, reduction)


def check_adaptive_weighted_triplet_options(
    margin: float, smooth: bool, distance: str | Metric, normalize: bool, reduction: str
) -> None:
    """Raise unless the options of :func:`adaptive_weighted_triplet_loss` are valid."""
    check_number("margin", margin)
    check_flag("smooth", smooth)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
