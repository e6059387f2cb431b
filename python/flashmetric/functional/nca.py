# SPDX-License-Identifier: Apache-2.0
"""Neighbourhood components analysis: how likely a random neighbour has the right label."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_positive
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import REDUCTIONS, Reduction, reduce_anchors, softplus
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance

Form = Literal["log", "probability"]
_FORM = get_args(Form)


def nca_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    softmax_scale: float = 1.0,
    form: Form = "log",
    distance: Distance | Metric = "sqeuclidean",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Neighbourhood components analysis.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings).square()
        p = (-softmax_scale * d).masked_fill(eye, -torch.inf).softmax(1)
        loss = -torch.log((p * same).sum(1)).mean()

    .. math::
        p_i = \frac{\sum_p e^{-s\, d_{ip}}}{\sum_p e^{-s\, d_{ip}} + \sum_n e^{-s\, d_{in}}}, \qquad
        \ell_i = -\log p_i \quad\text{or}\quad \ell_i = -p_i

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        softmax_scale: s, one over the temperature; above 0. Default: 1.
        form: ``"log"`` (default), or ``"probability"`` for the objective of the paper.
        distance: Default: ``"sqeuclidean"``.
        normalize: see there.
        reduction: ``"mean"`` (default) over the anchors that have a positive; ``"mean_nonzero"``
            over those with a loss above 0; ``"sum"``; ``"none"``.
        ref_emb: see there.
        ref_labels: see there.
        indices_tuple: see there. The neighbours are the listed pairs.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], 0 for anchors without a positive. float32,
        or float64 for float64 embeddings. Without any positive it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. No probability underflows: the
    logarithm is that of a ratio of log-sum-exps.

    Example:
        >>> import torch
        >>> from flashmetric.functional import nca_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.0]], requires_grad=True)
        >>> nca_loss(x, torch.tensor([0, 0, 1])).item()
        1.003...

    Source:
        J. Goldberger, S. Roweis, G. Hinton, R. Salakhutdinov: Neighbourhood Components Analysis,
        NIPS 2004.
    """
    check_nca_options(softmax_scale, form, distance, normalize, reduction)
    scale = -float(softmax_scale)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    lse = pairs.logsumexp(Logit(scale, 0.0), Logit(scale, 0.0))
    counted = lse.positive != -torch.inf
    odds = lse.negative - lse.positive.where(counted, lse.positive.new_zeros(()))
    if form == "log":
        loss = softplus(odds)
    else:
        loss = -torch.sigmoid(-odds)
    return reduce_anchors(loss, counted, reduction)


def check_nca_options(
    softmax_scale: float, form: str, distance: str | Metric, normalize: bool, reduction: str
) -> None:
    """Raise unless the options of :func:`nca_loss` are valid."""
    check_positive("softmax_scale", softmax_scale)
    check_choice("form", form, _FORM)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
