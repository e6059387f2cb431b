# SPDX-License-Identifier: Apache-2.0
"""Margin loss around a boundary that may be learned, for all classes or for each."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import (
    check_choice,
    check_classes,
    check_distance,
    check_number,
    check_parameter,
)
from flashmetric.distances import Metric
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import anchors_with_pairs, as_parameter, totals
from flashmetric.functional.pairs import Sums, Term
from flashmetric.functional.totals import count_of, total_of
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import IGNORED

MarginReduction = Literal["mean", "mean_nonzero", "sum", "none"]
_REDUCTION = get_args(MarginReduction)


def margin_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 0.2,
    beta: float | Tensor = 1.2,
    nu: float = 0.0,
    distance: Distance | Metric = "euclidean",
    reduction: MarginReduction = "mean_nonzero",
    normalize: bool = True,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Margin loss: positives nearer than beta - margin, negatives farther than beta + margin.

    Equivalent to, without the N x N matrices::

        x = F.normalize(embeddings)
        d = torch.cdist(x, x)
        same = labels[:, None] == labels
        pos = (d - beta + margin)[same & ~torch.eye(len(d), dtype=torch.bool)].relu()
        neg = (beta - d + margin)[~same].relu()
        loss = (pos.sum() + neg.sum()) / ((pos > 0).sum() + (neg > 0).sum())

    .. math::
        \ell_{ij} = \max(\text{margin} + y_{ij} (d_{ij} - \beta_{c(i)}), 0), \qquad y_{ij} = \pm 1

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        margin: alpha, half the width of the gap. Default: 0.2.
        beta: the boundary: a number, a 0-d tensor, or one per class, shape [C]; then ``labels``
            number the classes from 0 and are needed also with ``indices_tuple``. Tensors get
            gradients. Default: 1.2.
        nu: adds nu times the mean of beta over the anchors that have pairs, if beta is a tensor.
            Default: 0.
        distance: ``"euclidean"`` (default) or another one.
        reduction: ``"mean_nonzero"`` (default) over the pairs of both kinds with a loss above 0
            jointly, ``"mean"`` over all pairs, ``"sum"``, or ``"none"``, the sum over each anchor's
            pairs.
        normalize: scale rows to unit length first, for which beta is meant. Default: True.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels. A pair counts as often as it is
            listed, so all triplets of a batch give another mean than all pairs.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import margin_loss
        >>> x = torch.tensor([[1.0, 0.0], [-1.0, 0.0]])
        >>> beta = torch.tensor(1.25, requires_grad=True)
        >>> loss = margin_loss(x, torch.tensor([0, 0]), margin=0.25, beta=beta)
        >>> loss.backward()
        >>> loss.item(), beta.grad.item()
        (1.0, -1.0)

    Source:
        C.-Y. Wu, R. Manmatha, A. Smola, P. Krähenbühl: Sampling Matters in Deep Embedding Learning,
        ICCV 2017. Its negatives are sampled: pass the sample as ``indices_tuple``.
    """
    check_margin_options(margin, beta, nu, distance, reduction, normalize)
    margin, nu = float(margin), float(nu)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    boundary = as_parameter(beta, embeddings)
    if isinstance(boundary, Tensor) and boundary.ndim:
        boundary = _of_classes(boundary, labels)
    positive = Term("hinge", 1.0, margin - boundary)
    negative = Term("hinge", -1.0, margin + boundary)

    regularized = nu != 0 and isinstance(boundary, Tensor)
    if reduction != "none" and not regularized:
        return _reduce(pairs.total(positive, negative), reduction)
    rows = pairs.sum(positive, negative)
    loss = rows.positive + rows.negative
    if reduction != "none":
        loss = _reduce(totals(rows), reduction)
    if not regularized:
        return loss
    paired = anchors_with_pairs(rows).to(loss.dtype)
    each = nu * boundary * paired / count_of(paired).clamp(min=1)
    return loss + (each if reduction == "none" else total_of(each))


def _of_classes(beta: Tensor, labels: Tensor | Labels | None) -> Tensor:
    """The boundary of each anchor, [N]."""
    if labels is None:
        raise ValueError("labels must be given for a beta per class; got None")
    if isinstance(labels, Labels):
        if labels.rule != "equal" or labels.words.ndim != 1:
            raise ValueError("labels must be one class per row for a beta per class")
        labels = labels.words
        check_classes(labels, len(beta))
        # Rows in no pair, whatever their boundary.
        labels = labels.masked_fill(labels == IGNORED, 0)
    else:
        check_classes(labels, len(beta))
    # Not beta[labels]: the gradient of that is summed in no fixed order.
    return torch.nn.functional.embedding(labels.long(), beta.unsqueeze(1)).squeeze(1)


def _reduce(total: Sums, reduction: MarginReduction) -> Tensor:
    loss = total.positive + total.negative
    if reduction == "sum":
        return loss
    count = total.positives + total.negatives
    if reduction == "mean_nonzero":
        count = total.active_positives + total.active_negatives
    return loss / count.clamp(min=1)


def check_margin_options(
    margin: float,
    beta: float | Tensor,
    nu: float,
    distance: str | Metric,
    reduction: str,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`margin_loss` are valid."""
    check_number("margin", margin)
    if isinstance(beta, Tensor) and beta.ndim == 1:
        check_parameter("beta", beta.new_empty(()))
    else:
        check_parameter("beta", beta)
    check_number("nu", nu)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, _REDUCTION)
