# SPDX-License-Identifier: Apache-2.0
"""InfoNCE and NT-Xent: the softmax of a positive pair against the negatives of its anchor."""

import torch
from torch import Tensor

from flashmetric.checks import check_distance
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import reduce_anchors
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, Pairs, Parameter, Term
from flashmetric.functional.softmax_rows import (
    Reduction,
    check_reduction,
    check_temperature,
    inverse_of,
    label_towers,
    negative_log_share,
)
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance

# Far below any logit, and still finite: 0 times infinity is NaN.
_NOTHING = -1e30


def ntxent_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    temperature: Parameter = 0.07,
    distance: Distance | Metric = "cosine",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""NT-Xent: every positive pair against the negatives of its anchor.

    Equivalent to, without the N x N matrices and without a list of pairs::

        x = torch.nn.functional.normalize(embeddings)
        s = x @ x.T / temperature
        same = labels[:, None] == labels
        negatives = s.masked_fill(same, -torch.inf).logsumexp(1, keepdim=True)
        loss = torch.nn.functional.softplus(negatives - s)[same & ~torch.eye(len(s)).bool()].mean()

    .. math::
        \ell_{ap} = -\log \frac{e^{s_{ap} / T}}{e^{s_{ap} / T} + \sum_n e^{s_{an} / T}}

    SimCLR's loss of two views ``a`` and ``b`` is this one of ``torch.cat((a, b))`` with the labels
    ``torch.arange(len(a)).repeat(2)``: every row then has one positive, and 2 N - 2 negatives.

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        temperature: T, above 0; a tensor of shape [] gets a gradient. Where it is learned, learn
            its logarithm: :class:`~flashmetric.losses.LearnedTemperature`. Default: 0.07.
        distance: the similarity s is minus the distance (with ``"cosine"``, the default, up to a
            constant that cancels).
        normalize: scale rows to unit length first. Default: False.
        reduction: ``"mean"`` (default) over all positive pairs, ``"sum"``, or ``"none"``: the sum
            over each anchor's positive pairs.
        ref_emb: rows to pair the anchors with, shape [M, D]. Default: the anchors.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels. Repeated
            pairs count repeatedly.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without positive pairs it is 0 and
        back-propagates zeros. A positive pair whose anchor has no negatives costs 0, and counts.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import ntxent_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> ntxent_loss(x, torch.tensor([0, 0, 1]), temperature=1.0).item()  # log(1 + 1 / e)
        0.3132...

    Source:
        T. Chen et al.: A Simple Framework for Contrastive Learning of Visual Representations,
        ICML 2020; for several positives as in pytorch-metric-learning.
    """
    check_info_nce_options(temperature, distance, normalize, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    return _every_pair(pairs, temperature, reduction)


def info_nce_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    temperature: Parameter = 0.07,
    distance: Distance | Metric = "cosine",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""InfoNCE of two towers or views, with the other rows of the batch as negatives.

    Equivalent to, without the N x M matrix::

        q = torch.nn.functional.normalize(embeddings)
        k = torch.nn.functional.normalize(ref_emb)
        loss = torch.nn.functional.cross_entropy(q @ k.T / temperature, torch.arange(len(q)))

    .. math::
        \ell_{ap} = -\log \frac{e^{s_{ap} / T}}{e^{s_{ap} / T} + \sum_n e^{s_{an} / T}}

    Without labels, row i of ``ref_emb`` is the positive of anchor i, all its other rows are
    negatives, and rows beyond N are negatives of every anchor (mined ones, or a memory bank). With
    labels the loss is :func:`ntxent_loss`.

    Args:
        embeddings: anchors (queries), shape [N, D], float32, float16, bfloat16 or float64, any
            strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``ref_emb`` or ``indices_tuple``.
        temperature: T, above 0; a tensor of shape [] gets a gradient. Where it is learned, learn
            its logarithm: :class:`~flashmetric.losses.LearnedTemperature`. Default: 0.07.
        distance: the similarity s is minus the distance (with ``"cosine"``, the default, up to a
            constant that cancels).
        normalize: scale rows to unit length first. Default: False.
        reduction: ``"mean"`` (default) over all positive pairs, ``"sum"``, or ``"none"``: the sum
            over each anchor's positive pairs.
        ref_emb: rows to pair the anchors with (keys), shape [M, D], M >= N without labels.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without positive pairs it is 0 and
        back-propagates zeros. A positive pair whose anchor has no negatives costs 0, and counts.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import info_nce_loss
        >>> x = torch.eye(2)
        >>> info_nce_loss(x, ref_emb=x, temperature=1.0).item()  # log(1 + 1 / e)
        0.3132...

    Source:
        A. van den Oord, Y. Li, O. Vinyals: Representation Learning with Contrastive Predictive
        Coding, 2018.
    """
    check_info_nce_options(temperature, distance, normalize, reduction)
    towers = labels is None and indices_tuple is None and ref_labels is None
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
    if not towers:
        return _every_pair(pairs, temperature, reduction)
    # The log-sum-exp over one positive is its logit: a single sweep finds everything.
    scale = inverse_of(temperature)
    rows, counted = negative_log_share(pairs.logsumexp(Logit(-scale), Logit(-scale)))
    return reduce_anchors(rows, counted, reduction)


def _every_pair(pairs: Pairs, temperature: Parameter, reduction: str) -> Tensor:
    scale = inverse_of(temperature)
    negatives = pairs.logsumexp(negative=Logit(-scale)).negative
    # -log(p / (p + n)) = log(1 + e^(log n - log p)), with log n an offset of the anchor.
    offset = negatives.masked_fill(negatives == -torch.inf, _NOTHING)
    term = Term("softplus", scale, offset)
    if reduction == "none":
        return pairs.sum(term).positive
    total = pairs.total(term)
    if reduction == "sum":
        return total.positive
    return total.positive / total.positives.clamp(min=1)


def check_info_nce_options(
    temperature: Parameter, distance: str | Metric, normalize: bool, reduction: str
) -> None:
    """Raise unless the options of :func:`ntxent_loss` and :func:`info_nce_loss` are valid."""
    check_temperature(temperature)
    check_distance(distance, normalize)
    check_reduction(reduction)
