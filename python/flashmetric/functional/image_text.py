# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss of images and texts, both ways."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_parameter, check_positive
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.listed_pairs import other_way
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, LogSumExps, Pairs, Parameter, Term
from flashmetric.functional.softmax_rows import (
    FORM,
    Form,
    label_towers,
    shares_of_all,
)
from flashmetric.functional.totals import count_of, one_batch, over_all_anchors
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import class_members, words
from flashmetric.ops.ordered_sum import ordered_sum

ImageTextReduction = Literal["mean", "sum"]
_REDUCTION = get_args(ImageTextReduction)
_LOGIT_SCALE = math.log(1 / 0.07)


def image_text_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    logit_scale: Parameter = _LOGIT_SCALE,
    max_scale: float = 100.0,
    form: Form = "out",
    distance: Distance | Metric = "cosine",
    normalize: bool = False,
    reduction: ImageTextReduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss of images and texts, as CLIP is trained with.

    Equivalent to, without the N x N matrix, for ``image_text_loss(images, ref_emb=texts)``::

        images = torch.nn.functional.normalize(images)
        texts = torch.nn.functional.normalize(texts)
        logits = images @ texts.T * min(math.exp(logit_scale), max_scale)
        numbers = torch.arange(len(logits))
        loss = torch.nn.functional.cross_entropy(logits, numbers)
        loss = (loss + torch.nn.functional.cross_entropy(logits.T, numbers)) / 2

    .. math::
        L = \tfrac{1}{2} \operatorname{mean}_i \Bigl(-\log \frac{e^{z_{ii}}}{\sum_j e^{z_{ij}}}
            \Bigr) + \tfrac{1}{2} \operatorname{mean}_j \Bigl(-\log \frac{e^{z_{jj}}}
            {\sum_i e^{z_{ij}}} \Bigr), \qquad z_{ij} = \min(e^{\text{logit\_scale}},
            \text{max\_scale}) \, s_{ij}

    Without labels, row i of both sides belongs together, and rows of ``ref_emb`` beyond N are texts
    without an image. With labels, each side may have several positives (captions of an image,
    images of a class): each direction is then :func:`sup_con_loss` of one side against the other.

    Args:
        embeddings: images, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each image, shape [N], int64, int32 or bool, or :class:`Labels`.
        logit_scale: logarithm of the factor on similarities, of one over the temperature; a tensor
            of shape [] gets a gradient, 0 above the limit. Default: that of temperature 0.07.
        max_scale: limit of the factor. Default: 100.
        form: with several positives, ``"out"`` (default) averages their log shares, ``"in"`` their
            shares, see :func:`sup_con_loss`; with one, both are the same.
        distance: the similarity s is minus the distance (with ``"cosine"``, the default, up to a
            constant that cancels). It must be symmetric.
        normalize: scale rows to unit length first. Default: False.
        reduction: ``"mean"`` (default): half the mean over the images with a positive plus half
            that over the texts; ``"sum"``: half of the sums.
        ref_emb: texts, shape [M, D], M >= N without labels. Default: the images themselves, a row
            being no pair with itself; the directions are then the same.
        ref_labels: classes of the texts, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels, first
            images, then texts.

    Returns:
        A scalar. Images and texts without positives are left out of their means; without any
        positive pair the loss is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. Both directions come from one
    sweep over the pairs.

    Example:
        >>> import torch
        >>> from flashmetric.functional import image_text_loss
        >>> images = torch.eye(2, requires_grad=True)
        >>> image_text_loss(images, ref_emb=torch.eye(2), logit_scale=0.0).item()  # log(1 + 1 / e)
        0.3132...

    Source:
        A. Radford et al.: Learning Transferable Visual Models From Natural Language Supervision,
        ICML 2021; with labels, J. Yang et al.: Unified Contrastive Learning in Image-Text-Label
        Space, CVPR 2022.
    """
    check_image_text_options(logit_scale, max_scale, form, distance, normalize, reduction)
    if labels is None and indices_tuple is None:
        # One positive: its logit is the log-sum-exp that the sweep finds in any case.
        form = "in"
    labels, ref_labels = label_towers(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    scale: Parameter
    if isinstance(logit_scale, Tensor):
        # The gradient of a scale beyond its limit passes: it must find its way back.
        excess = (logit_scale - math.log(max_scale)).clamp(min=0).detach()
        scale = (logit_scale - excess).exp()
    else:
        scale = math.exp(min(logit_scale, math.log(max_scale)))
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    logit = Logit(-scale)
    fused = isinstance(pairs, AllPairs)
    if isinstance(pairs, AllPairs) and pairs.anchor_scale is not None:
        raise ValueError("distance must be symmetric; got one that scales by its first row")
    if fused and one_batch(ref_emb):
        return _of_images(pairs, pairs.logsumexp(logit, logit), scale, form, reduction)
    if indices_tuple is not None:
        indices_tuple = other_way(indices_tuple)
    by_class = isinstance(pairs, AllPairs) and _of_one_class(pairs)
    back = pairs
    if not fused or not (by_class or form == "in"):
        # The same pairs with exchanged roles.
        back = prepare_pairs(
            embeddings if ref_emb is None else ref_emb,
            ref_labels,
            distance=distance,
            normalize=normalize,
            ref_emb=None if ref_emb is None else embeddings,
            ref_labels=None if ref_emb is None else labels,
            indices_tuple=indices_tuple,
        )
    if isinstance(pairs, AllPairs):
        of_images, of_texts = pairs.logsumexp_both_ways(logit, logit)
    else:
        of_images, of_texts = pairs.logsumexp(logit, logit), back.logsumexp(logit, logit)
    of_texts = over_all_anchors(of_texts)
    images = _of_images(pairs, of_images, scale, form, reduction)
    positives = of_texts.positives
    if isinstance(pairs, AllPairs) and by_class and form == "out":
        positives = _of_their_class(pairs, positives)
    return (images + _of_texts(back, of_texts, positives, scale, form, reduction)) / 2


def _of_images(
    pairs: Pairs, lse: LogSumExps, scale: Parameter, form: str, reduction: str
) -> Tensor:
    value, counted = shares_of_all(pairs, lse, scale, form, "sum")
    return value / count_of(counted).clamp(min=1) if reduction == "mean" else value


def _of_texts(
    pairs: Pairs,
    lse: LogSumExps,
    positives: Tensor,
    scale: Parameter,
    form: str,
    reduction: str,
) -> Tensor:
    """The direction of the texts, whose log-sum-exps all ranks have alike.

    ``pairs`` are those of the anchors here, with any roles; ``positives`` counts for each of these
    anchors how many images the text of a pair goes with.
    """
    counted = lse.positive != -torch.inf
    if form == "in":
        value = ordered_sum(shares_of_all(pairs, lse, scale, form, "none")[0])
    else:
        everything = torch.logaddexp(lse.positive.masked_fill(~counted, 0), lse.negative)
        count = positives.clamp(min=1).to(everything.dtype)
        mean = pairs.total(Term("linear", scale / count)).positive
        value = ordered_sum(everything.masked_fill(~counted, 0)) + mean
    return value / counted.sum().clamp(min=1) if reduction == "mean" else value


def _of_one_class(pairs: AllPairs) -> bool:
    return pairs.rule == "equal" and words(pairs.labels).shape[1] == 1


def _of_their_class(pairs: AllPairs, counts: Tensor) -> Tensor:
    """Counts of texts as counts of images: what is equal in a class, by its first text."""
    assert pairs.ref_labels is not None
    labels, ref_labels = (words(side)[:, 0] for side in (pairs.labels, pairs.ref_labels))
    first = class_members(labels, ref_labels, 1)[:, 0]
    # The last one, 0, is for images without a text.
    return torch.nn.functional.pad(counts, (0, 1))[first]


def check_image_text_options(
    logit_scale: Parameter,
    max_scale: float,
    form: str,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`image_text_loss` are valid."""
    check_parameter("logit_scale", logit_scale)
    check_positive("max_scale", max_scale)
    check_choice("form", form, FORM)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, _REDUCTION)
