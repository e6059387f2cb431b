# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss on signal-to-noise ratios."""

from torch import Tensor

from flashmetric.checks import check_choice, check_flag, check_number
from flashmetric.distances import SNR
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import (
    PAIR_REDUCTIONS,
    PairReduction,
    anchors_with_pairs,
    reduce_pairs,
    reduce_totals,
    totals,
)
from flashmetric.functional.pairs import Term
from flashmetric.functional.totals import count_of, total_of
from flashmetric.labels import Labels

# Rows are normalised before, because the regulariser needs them, too.
_DISTANCE = SNR(normalize=False)


def snr_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    regularization: float = 0.005,
    reduction: PairReduction = "mean_nonzero",
    normalize: bool = True,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss on the variance of the difference over the variance of the anchor.

    Equivalent to, without the N x N x D array::

        x = F.normalize(embeddings)
        d = (x[:, None] - x).var(2) / x.var(1)[:, None]
        same = labels[:, None] == labels
        pos = (d[same & ~torch.eye(len(d), dtype=torch.bool)] - pos_margin).relu()
        neg = (neg_margin - d[~same]).relu()
        loss = pos[pos > 0].mean() + neg[neg > 0].mean() + regularization * x.sum(1).abs().mean()

    .. math::
        \ell_{ij} = \begin{cases}
            \max(d_{ij} - \text{pos\_margin}, 0) & \text{same class} \\
            \max(\text{neg\_margin} - d_{ij}, 0) & \text{other class}
        \end{cases}, \qquad
        d_{ij} = \frac{\operatorname{var}(x_i - x_j)}{\operatorname{var}(x_i)}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        pos_margin: ratio below which a positive pair costs nothing. Default: 0.
        neg_margin: ratio above which a negative pair costs nothing. Default: 1.
        regularization: adds this times the mean of the magnitude of each anchor's sum of features,
            over the anchors that have pairs: rows shall have mean 0. Default: 0.005.
        reduction: of the pairs, as for :func:`contrastive_loss`. Default: ``"mean_nonzero"``.
        normalize: scale rows to unit length first. Default: True.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels. The ratio is of the anchor,
            the first row of a pair.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0. A constant anchor
        is at distance 0 from all rows, with gradient 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. Without the regulariser one
    sweep finds value and gradient.

    Example:
        >>> import torch
        >>> from flashmetric.functional import snr_contrastive_loss
        >>> x = torch.tensor([[1.0, -1.0], [-1.0, 1.0]])
        >>> round(snr_contrastive_loss(x, torch.tensor([0, 0])).item(), 4)
        4.0

    Source:
        T. Yuan et al.: Signal-to-Noise Ratio: A Robust Distance Metric for Deep Metric Learning,
        CVPR 2019; weight of the regulariser from K. Roth et al., ICML 2020 (code).
    """
    check_snr_options(pos_margin, neg_margin, regularization, reduction, normalize)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=_DISTANCE,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    weight = float(regularization)
    positive, negative = (
        Term("hinge", 1.0, -float(pos_margin)),
        Term("hinge", -1.0, float(neg_margin)),
    )
    if weight == 0:
        return reduce_pairs(pairs, positive, negative, reduction)
    rows = pairs.sum(positive, negative)
    loss = rows.positive + rows.negative
    if reduction != "none":
        loss = reduce_totals(totals(rows), reduction)
    x = normalize_rows(embeddings) if normalize else embeddings
    paired = anchors_with_pairs(rows)
    # Masked, not multiplied by 0: a row without pairs may hold anything.
    bias = x.to(loss.dtype).masked_fill(~paired.unsqueeze(1), 0).sum(1).abs()
    bias = weight * bias / count_of(paired).clamp(min=1)
    return loss + (bias if reduction == "none" else total_of(bias))


def check_snr_options(
    pos_margin: float,
    neg_margin: float,
    regularization: float,
    reduction: str,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`snr_contrastive_loss` are valid."""
    check_number("pos_margin", pos_margin)
    check_number("neg_margin", neg_margin)
    check_number("regularization", regularization)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
    check_flag("normalize", normalize)
