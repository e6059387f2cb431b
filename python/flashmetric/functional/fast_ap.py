# SPDX-License-Identifier: Apache-2.0
"""FastAP: average precision of each anchor's ranking, from soft histograms of its distances."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_count
from flashmetric.functional.anchor_reduction import reduce_anchors
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Pairs
from flashmetric.labels import Labels
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import Kind

Reduction = Literal["mean", "sum", "none"]
_REDUCTION = get_args(Reduction)
_LARGEST = 4.0
"""Largest squared distance of unit rows."""


def fast_ap_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    bins: int = 10,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""One minus the average precision, made differentiable by binning squared distances softly.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(normalize(embeddings), normalize(embeddings)).square()
        centre = torch.linspace(0, 4, bins + 1)
        pulse = (1 - (d[..., None] - centre).abs() * bins / 4).relu()
        h_pos = (pulse * (same & ~eye)[..., None]).sum(1)
        h_neg = (pulse * ~same[..., None]).sum(1)
        H_pos, H = h_pos.cumsum(1), (h_pos + h_neg).cumsum(1)
        ap = (h_pos * H_pos / H).sum(1) / (same & ~eye).sum(1)  # 0 / 0 = 0
        loss = (1 - ap).mean()

    .. math::
        \ell_i = 1 - \frac{1}{N^+_i} \sum_{l=0}^{Q} \frac{h^+_{il} H^+_{il}}{H_{il}}

    with soft histograms h of the positives and of all pairs, and their cumulative sums H.

    Rows are scaled to unit length; the squared distances lie in [0, 4].

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        bins: Q, from 1 on; the histograms have Q + 1 centres. Default: 10.
        reduction: ``"mean"`` (default) over the anchors that have a positive; ``"sum"``;
            ``"none"``.
        ref_emb: see there.
        ref_labels: see there.
        indices_tuple: see there. The ranking is that of the listed pairs.

    Returns:
        A scalar; with ``reduction="none"`` shape [N], 0 for anchors without a positive. float32,
        or float64 for float64 embeddings. Without any positive it is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism and precision as for :func:`pair_loss`. Histograms are float64. The gradient
    is that of the value; the one that the authors' code writes by hand is N / 2 times as large.

    Memory:
        O((N + M) D + N Q).

    Example:
        >>> import torch
        >>> from flashmetric.functional import fast_ap_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> fast_ap_loss(x, torch.tensor([0, 0, 1])).item()
        0.5

    Source:
        F. Cakir, K. He, X. Xia, B. Kulis, S. Sclaroff: Deep Metric Learning to Rank, CVPR 2019.
    """
    check_fast_ap_options(bins, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance="sqeuclidean",
        normalize=True,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    dtype = accumulate_dtype(embeddings.dtype)
    # Centres 1 to Q, and one beyond that everything lies below.
    edges = torch.arange(1, bins + 2, dtype=dtype, device=embeddings.device) * (_LARGEST / bins)
    positive, positives = _below_bins(pairs, "positive", edges)
    negative, _ = _below_bins(pairs, "negative", edges)
    histogram = torch.diff(positive, dim=1, prepend=positive.new_zeros((pairs.anchors, 1)))
    # Compared for equality, so that NaN remains; it is below no threshold, and must count.
    total = positive + negative
    total = total.masked_fill(total == 0, 1)
    counted = (positives > 0) | positive[:, -1].isnan()
    precision = (histogram * positive / total).sum(1) / positives.clamp(min=1)
    return reduce_anchors(1 - precision, counted, reduction).to(dtype)


def _below_bins(pairs: Pairs, kind: Kind, edges: Tensor) -> tuple[Tensor, Tensor]:
    """Cumulative soft histograms [N, Q + 1] of the pairs of a kind, and their numbers [N].

    A triangular bin is a second difference of hinges, so the pairs up to a bin are a first one:
    1 below its centre, falling to 0 at the next. Nothing lies below the first centre, 0.
    """
    below, counts = pairs.threshold_sum(kind, "hinge", edges.unsqueeze(0))
    width = torch.diff(edges.double(), prepend=edges.new_zeros(1, dtype=torch.float64))
    rise = torch.diff(below, dim=1, prepend=below.new_zeros((pairs.anchors, 1)))
    return rise / width, counts[:, -1]


def check_fast_ap_options(bins: int, reduction: str) -> None:
    """Raise unless the options of :func:`fast_ap_loss` are valid."""
    check_count("bins", bins)
    check_choice("reduction", reduction, _REDUCTION)
