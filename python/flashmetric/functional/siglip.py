# SPDX-License-Identifier: Apache-2.0
"""Sigmoid loss of two towers, or of labelled rows."""

import math
from typing import Literal, get_args

from torch import Tensor

from flashmetric.checks import LARGEST_NUMBER, check_choice, check_flag, check_parameter
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import anchors_with_pairs, as_parameter
from flashmetric.functional.similarity import SIMILARITIES, Similarity, similarity_term
from flashmetric.functional.softmax_rows import label_towers
from flashmetric.functional.totals import count_of, number_of_anchors, total_of
from flashmetric.labels import Labels

SigLIPReduction = Literal["mean", "sum", "none"]
_REDUCTION = get_args(SigLIPReduction)
_LOG_10 = math.log(10.0)


def siglip_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    log_scale: float | Tensor = _LOG_10,
    bias: float | Tensor = -10.0,
    distance: Similarity = "cosine",
    reduction: SigLIPReduction = "mean",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Sigmoid loss for language image pre-training, over all pairs of two towers' rows.

    Equivalent to, without the N x N matrices::

        z = log_scale.exp() * F.normalize(embeddings) @ F.normalize(ref_emb).T + bias
        sign = 2 * torch.eye(len(z)) - 1
        loss = -F.logsigmoid(sign * z).sum() / len(z)

    .. math::
        L = \frac{1}{N} \sum_{i,j} \log\bigl(1 + e^{-y_{ij} (t\, s_{ij} + b)}\bigr),
        \qquad t = e^{t'}

    Args:
        embeddings: rows of one tower, shape [N, D].
        labels: class of each row, shape [N]; rows of one class belong together, also in several
            pairs. Default: row i of both towers belong together, and no others.
        log_scale: t', the logarithm of the scale; a number or a learned 0-d tensor. Default:
            log 10.
        bias: b, likewise. Default: -10.
        distance: ``"cosine"`` (default) or ``"dot"``, which is minus the similarity.
        reduction: ``"mean"`` (default) the sum over all pairs over the number of anchors that have
            any; ``"sum"``; ``"none"`` the sum over each anchor's pairs.
        normalize: scale rows to unit length first; the cosine does so itself. Default: False.
        ref_emb: rows of the other tower, shape [M, D], M >= N without labels: rows beyond N belong
            to no row of the first. Default with labels: the anchors.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels, see :func:`pair_loss`.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import siglip_loss
        >>> images = texts = torch.eye(2)
        >>> siglip_loss(images, ref_emb=texts, log_scale=0.0, bias=0.0).item()
        1.006...

    Source:
        X. Zhai et al.: Sigmoid Loss for Language Image Pre-Training, ICCV 2023; open_clip.
    """
    check_siglip_options(log_scale, bias, distance, reduction, normalize)
    labels, ref_labels = label_towers(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    log_scale, bias = as_parameter(log_scale, embeddings), as_parameter(bias, embeddings)
    scale = log_scale.exp() if isinstance(log_scale, Tensor) else math.exp(log_scale)
    positive = similarity_term("softplus", -scale, -bias, distance)
    negative = similarity_term("softplus", scale, bias, distance)
    if reduction != "none" and indices_tuple is None and not isinstance(labels, Labels):
        # Then every anchor has as many pairs as any other.
        total = pairs.total(positive, negative)
        loss = total.positive + total.negative
        return (
            loss if reduction == "sum" else loss / number_of_anchors(embeddings[:, 0]).clamp(min=1)
        )
    rows = pairs.sum(positive, negative)
    each = rows.positive + rows.negative
    if reduction == "none":
        return each
    loss = total_of(each)
    return loss if reduction == "sum" else loss / count_of(anchors_with_pairs(rows)).clamp(min=1)


def check_siglip_options(
    log_scale: float | Tensor,
    bias: float | Tensor,
    distance: str,
    reduction: str,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`siglip_loss` are valid."""
    check_parameter("log_scale", log_scale)
    if not isinstance(log_scale, Tensor) and log_scale > math.log(LARGEST_NUMBER):
        raise ValueError(
            f"log_scale must be at most {math.log(LARGEST_NUMBER):.1f}, the logarithm of "
            f"{LARGEST_NUMBER:g}; got {log_scale}"
        )
    check_parameter("bias", bias)
    check_choice("distance", distance, SIMILARITIES)
    check_choice("reduction", reduction, _REDUCTION)
    check_flag("normalize", normalize)
