# SPDX-License-Identifier: Apache-2.0
"""Ranked list loss: pull positives into a ball, push negatives out of a larger one."""

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import (
    REDUCTIONS,
    Reduction,
    reduce_anchors,
    straight_through,
)
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, Pairs, Term
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance


def ranked_list_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 0.4,
    alpha: float | None = None,
    neg_temperature: float = 10.0,
    pos_temperature: float = 0.0,
    imbalance: float = 0.5,
    distance: Distance | Metric = "euclidean",
    normalize: bool = True,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Ranked list loss: positives within ``alpha - margin``, negatives beyond ``alpha``.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(normalize(embeddings), normalize(embeddings))
        pos = same & ~eye & (d > alpha - margin)
        neg = ~same & (d < alpha)
        w_pos = torch.where(pos, (pos_temperature * d).exp(), 0).detach()
        w_neg = torch.where(neg, (-neg_temperature * d).exp(), 0).detach()
        loss_pos = (w_pos * (d - (alpha - margin))).sum(1) / w_pos.sum(1)  # 0 / 0 = 0
        loss_neg = (w_neg * (alpha - d)).sum(1) / w_neg.sum(1)
        loss = ((1 - imbalance) * loss_pos + imbalance * loss_neg).mean()

    .. math::
        \ell_i = (1 - \lambda) \sum_{p:\, d_{ip} > \alpha - m} w_p (d_{ip} - (\alpha - m))
               + \lambda \sum_{n:\, d_{in} < \alpha} w_n (\alpha - d_{in}), \quad
        w_p \propto e^{T_+ d_{ip}}, \quad w_n \propto e^{-T_- d_{in}}

    The weights of each anchor sum to 1 and count as constants in the gradient.

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        margin: m, width of the gap between positives and negatives. Default: 0.4.
        alpha: distance that negatives should have. Default: 1 + margin / 2.
        neg_temperature: T of the negatives, at least 0; 0 weighs all alike. Default: 10.
        pos_temperature: T of the positives. Default: 0.
        imbalance: share of the negatives, from 0 to 1. Default: 0.5.
        distance: Default: ``"euclidean"``.
        normalize: see there. Default: True; ``alpha`` is meant for unit rows.
        reduction: ``"mean"`` (default) over the anchors that have a positive and a negative, near
            or far; ``"mean_nonzero"`` over those with a loss above 0; ``"sum"``; ``"none"``.
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

    Ties, determinism, precision and memory as for :func:`pair_loss`. There is no variant with
    gradients through the weights: that one needs a second moment of the distances per anchor,
    which a log-sum-exp does not have.

    Example:
        >>> import torch
        >>> from flashmetric.functional import ranked_list_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.5]], requires_grad=True)
        >>> ranked_list_loss(x, torch.tensor([0, 0, 1]), normalize=False).item()
        0.275...

    Source:
        X. Wang et al.: Ranked List Loss for Deep Metric Learning, CVPR 2019, arXiv:1903.03238;
        temperature and margin from the authors' repository.
    """
    check_ranked_list_options(
        margin,
        alpha,
        neg_temperature,
        pos_temperature,
        imbalance,
        distance,
        normalize,
        reduction,
    )
    outer = 1 + float(margin) / 2 if alpha is None else float(alpha)
    inner = outer - float(margin)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    temperatures = float(pos_temperature), float(neg_temperature)
    # Kinds that are not summed are counted nevertheless.
    sums = pairs.sum(
        Term("hinge", 1.0, -inner) if temperatures[0] == 0 else None,
        Term("hinge", -1.0, outer) if temperatures[1] == 0 else None,
    )
    positive = sums.positive / sums.active_positives.clamp(min=1)
    negative = sums.negative / sums.active_negatives.clamp(min=1)
    if any(temperatures):
        of_positives, of_negatives = _softmax_means(pairs, inner, outer, *temperatures)
        positive = positive if of_positives is None else of_positives
        negative = negative if of_negatives is None else of_negatives
    loss = (1 - float(imbalance)) * positive + float(imbalance) * negative
    return reduce_anchors(loss, (sums.positives > 0) & (sums.negatives > 0), reduction)


def _softmax_means(
    pairs: Pairs, inner: float, outer: float, positive: float, negative: float
) -> tuple[Tensor | None, Tensor | None]:
    """Weighted mean violations of both kinds; None where the temperature is 0."""
    lse = pairs.logsumexp(
        Logit(positive, -positive * inner) if positive else None,
        Logit(-negative, negative * outer) if negative else None,
        bounds=(_level(pairs, inner), _level(pairs, outer)),
    )
    return (
        _mean_violation(lse.positive_mean - inner, lse.positive, positive),
        _mean_violation(outer - lse.negative_mean, lse.negative, negative),
    )


def _level(pairs: Pairs, value: float) -> Tensor:
    return pairs.embeddings.new_full((pairs.anchors,), value, dtype=torch.float64)


def _mean_violation(mean: Tensor, lse: Tensor, temperature: float) -> Tensor | None:
    """A mean under softmax weights that count as constants."""
    if not temperature:
        return None
    some, zero = lse != -torch.inf, lse.new_zeros(())
    slope = lse.where(some, zero) / temperature
    return straight_through(mean.where(some, zero), slope)


def check_ranked_list_options(
    margin: float,
    alpha: float | None,
    neg_temperature: float,
    pos_temperature: float,
    imbalance: float,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`ranked_list_loss` are valid."""
    check_number("margin", margin)
    if alpha is not None:
        check_number("alpha", alpha)
    for name, temperature in (
        ("neg_temperature", neg_temperature),
        ("pos_temperature", pos_temperature),
    ):
        check_number(name, temperature)
        if temperature < 0:
            raise ValueError(f"{name} must be at least 0, got {temperature}")
    check_number("imbalance", imbalance)
    if not 0 <= imbalance <= 1:
        raise ValueError(f"imbalance must be from 0 to 1, got {imbalance}")
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
