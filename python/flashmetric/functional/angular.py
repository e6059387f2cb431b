# SPDX-License-Identifier: Apache-2.0
"""Angular loss, alone or on top of the N-pairs loss."""

import math
from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import (
    Batch,
    check_batch,
    check_choice,
    check_flag,
    check_indices,
    check_number,
    check_positive,
)
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.anchor_reduction import reduce_anchors, softplus
from flashmetric.functional.listed_pairs import positive_pairs
from flashmetric.functional.n_pairs import n_pairs_loss
from flashmetric.functional.normalize import L2_POWER, L2Power, normalize_rows
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, Term
from flashmetric.functional.softmax_rows import (
    Reduction,
    check_reduction,
    take_rows,
)
from flashmetric.labels import Labels
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import IGNORED

AngularForm = Literal["log", "hinge"]
_FORM = get_args(AngularForm)


def angular_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    alpha: float = 45.0,
    n_pairs_lambda: float | None = None,
    l2: float = 0.0,
    l2_power: L2Power = 2,
    normalize: bool = True,
    max_positives: int | None = None,
    form: AngularForm = "log",
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Angular loss of every positive pair against all negatives of its anchor.

    Equivalent to, without the P x N matrix of P positive pairs::

        x = torch.nn.functional.normalize(embeddings)
        same = labels[:, None] == labels
        a, p = (same & ~torch.eye(len(x)).bool()).nonzero().unbind(1)
        t = math.tan(math.radians(alpha)) ** 2
        f = 4 * t * (x[a] + x[p]) @ x.T - 2 * (1 + t) * (x[a] * x[p]).sum(1, keepdim=True)
        f = f.masked_fill(same[a], -torch.inf)
        loss = torch.nn.functional.softplus(f.logsumexp(1)).mean()

    .. math::
        \ell_{ap} = \log \Bigl(1 + \sum_n \exp \bigl(4 \tan^2 \alpha \, (x_a + x_p) \cdot x_n
            - 2 (1 + \tan^2 \alpha) \, x_a \cdot x_p \bigr) \Bigr)
        \quad\text{or}\quad
        \sum_n \max\Bigl(0, \lVert x_a - x_p \rVert^2
            - 4 \tan^2 \alpha \, \bigl\lVert x_n - \tfrac{x_a + x_p}{2} \bigr\rVert^2 \Bigr)

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`.
        alpha: angle at the negative, in degrees, above 0 and below 90. Default: 45.
        n_pairs_lambda: if given, the loss is :func:`n_pairs_loss` plus this times the angular
            loss; the former takes rows as they are. The paper has 2. Default: None.
        l2: weight of the regulariser of :func:`n_pairs_loss`. Default: 0.
        l2_power: 2 (default) for squared lengths in it, or 1 for lengths.
        normalize: scale rows, the negatives included, to unit length first. Default: True.
        max_positives: take only so many positives of each anchor, those with the smallest inner
            products. Default: all, which are counted first: that waits for the device, and does
            not compile to one graph.
        form: ``"log"`` (default) for the first formula, the smooth one of the paper's batches, or
            ``"hinge"`` for the second, its constraint as it stands.
        reduction: ``"mean"`` (default) over the positive pairs whose anchor has a negative,
            ``"sum"``, or ``"none"``: the sum over each anchor's positive pairs.
        ref_emb: rows to pair the anchors with, shape [M, D]. Default: the anchors.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n), of which the first two are the
            positive pairs. The negatives are all of other labels, which must be given.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. If no positive pair has a negative it is 0
        and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Memory:
        O((N + M + P) D) for P positive pairs (half of them in a batch of its own with plain
        labels, as both orders of a pair cost the same).

    Ties, determinism and precision as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import angular_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> angular_loss(x, torch.tensor([0, 0, 1])).item()  # log(1 + e^-4)
        0.0181...

    Source:
        J. Wang et al.: Deep Metric Learning with Angular Loss, ICCV 2017.
    """
    check_angular_options(
        alpha, n_pairs_lambda, l2, l2_power, normalize, max_positives, form, reduction
    )
    batch = check_batch(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    if batch.labels is None or (ref_emb is not None and batch.ref_labels is None):
        raise ValueError("labels must be given with indices_tuple: they say what is a negative")
    loss = _angular(batch, alpha, normalize, max_positives, form, reduction, indices_tuple)
    if n_pairs_lambda is None:
        return loss
    n_pairs = n_pairs_loss(
        embeddings,
        labels,
        l2=l2,
        l2_power=l2_power,
        reduction=reduction,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    return n_pairs + n_pairs_lambda * loss


def _angular(
    batch: Batch,
    alpha: float,
    normalize: bool,
    max_positives: int | None,
    form: AngularForm,
    reduction: Reduction,
    indices_tuple: tuple[Tensor, ...] | None,
) -> Tensor:
    x, refs = batch.embeddings, batch.ref_emb
    if normalize:
        x, refs = normalize_rows(x), None if refs is None else normalize_rows(refs)
    labels = batch.labels
    assert labels is not None
    # Both orders of a pair have the same sum and, if positives share the class, negatives.
    half = refs is None and batch.rule == "equal" and reduction != "none"
    half = half and max_positives is None and indices_tuple is None
    if indices_tuple is not None:
        checked = check_indices(indices_tuple, batch.embeddings, batch.ref_emb)
        anchor, positive, valid = positive_pairs(checked)
    else:
        with torch.no_grad():
            anchor, positive, valid = _positive_pairs(batch, x, refs, max_positives, half)
    others, other_labels = (x, labels) if refs is None else (refs, batch.ref_labels)
    assert other_labels is not None
    dtype = accumulate_dtype(x.dtype)
    a, p = take_rows(x, anchor).to(dtype), take_rows(others, positive).to(dtype)
    tan2 = math.tan(math.radians(alpha)) ** 2
    queries = labels[anchor]
    if valid is not None:
        absent = ~valid if queries.ndim == 1 else ~valid.unsqueeze(1)
        queries = queries.masked_fill(absent, IGNORED)
    # A positive pair queries the negatives with its sum or centre: a rectangular batch.
    queried = prepare_pairs(
        a + p if form == "log" else (a + p) / 2,
        Labels(queries, batch.rule),
        distance="dot" if form == "log" else "sqeuclidean",
        ref_emb=others.to(dtype),
        ref_labels=Labels(other_labels, batch.rule),
    )
    if form == "log":
        negatives = queried.logsumexp(negative=Logit(-4 * tan2)).negative
        counted = negatives != -torch.inf
        z = negatives.masked_fill(~counted, 0) - 2 * (1 + tan2) * (a * p).sum(1)
        rows = softplus(z).masked_fill(~counted, 0)
    else:
        sums = queried.sum(negative=Term("hinge", -4 * tan2, (a - p).square().sum(1)))
        rows, counted = sums.negative, sums.negatives > 0
    if reduction == "none":
        return rows.new_zeros(x.shape[0]).index_add(0, anchor, rows)
    value = reduce_anchors(rows, counted, reduction)
    return 2 * value if half and reduction == "sum" else value


def _positive_pairs(
    batch: Batch, x: Tensor, refs: Tensor | None, limit: int | None, half: bool
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Anchors and positives of all positive pairs; with a limit, which entries are pairs."""
    assert batch.labels is not None
    pairs = AllPairs(x, batch.labels, refs, batch.ref_labels, batch.rule, "dot")
    lists = pairs.positives(limit)
    numbers = torch.arange(pairs.anchors, device=lists.other.device)
    if limit is None:
        wanted = lists.valid
        if half:
            wanted = wanted & (lists.other > numbers.unsqueeze(1))
        anchor, place = wanted.nonzero().unbind(1)
        return anchor, lists.other[anchor, place], None
    anchor = numbers.repeat_interleave(limit if pairs.references else 0)
    places = len(anchor)
    return anchor, lists.other.flatten()[:places].clamp(min=0), lists.valid.flatten()[:places]


def check_angular_options(
    alpha: float,
    n_pairs_lambda: float | None,
    l2: float,
    l2_power: int,
    normalize: bool,
    max_positives: int | None,
    form: str,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`angular_loss` are valid."""
    check_number("alpha", alpha)
    if not 0 < alpha < 90:
        raise ValueError(f"alpha must be above 0 and below 90 degrees, got {alpha}")
    if n_pairs_lambda is not None:
        check_number("n_pairs_lambda", n_pairs_lambda)
    check_number("l2", l2)
    check_choice("l2_power", l2_power, L2_POWER)
    check_flag("normalize", normalize)
    if max_positives is not None:
        check_positive("max_positives", max_positives)
        if not isinstance(max_positives, int):
            raise TypeError(f"max_positives must be an integer, got {type(max_positives).__name__}")
    check_choice("form", form, _FORM)
    check_reduction(reduction)
