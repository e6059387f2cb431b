# SPDX-License-Identifier: Apache-2.0
"""Lifted structure losses: each positive pair, or each anchor, against all negatives at once."""

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_count, check_distance, check_number
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import (
    REDUCTIONS,
    Reduction,
    both_finite,
    reduce_anchors,
)
from flashmetric.functional.normalize import L2_POWER, L2Power, row_sizes
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.functional.totals import count_of, of_references, one_batch, total_of
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance


def lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    neg_margin: float = 1.0,
    pos_margin: float = 0.0,
    max_positives: int | None = None,
    l2: float = 0.0,
    l2_power: L2Power = 2,
    distance: Distance | Metric = "euclidean",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Lifted structure loss: each positive pair against the negatives of both of its rows.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        neg = (neg_margin - d).masked_fill(same, -torch.inf).logsumexp(1)
        i, j = torch.where(same & ~eye)  # ordered: every pair twice
        loss = (torch.logaddexp(neg[i], neg[j]) + d[i, j] - pos_margin).relu().square().mean() / 2

    .. math::
        J_{ij} = \log\Big( \sum_{k \in N(i)} e^{m_- - d_{ik}} + \sum_{k \in N(j)} e^{m_- - d_{jk}}
                 \Big) + d_{ij} - m_+, \qquad
        L = \frac{1}{2 |P|} \sum_{(i,j) \in P} \max(J_{ij}, 0)^2

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        neg_margin: margin of the negatives. Default: 1.
        pos_margin: margin of the positives. Default: 0.
        max_positives: how many positives of an anchor take part, the farthest ones. By default
            all do, which are counted first: that waits for the device and does not compile into
            one graph.
        l2: adds this times the mean size of the rows that are in any pair (``"none"`` the size of
            each, ``"sum"`` of all): the loss shrinks no row by itself. Default: 0.
        l2_power: 2 (default) for squared lengths, or 1 for lengths.
        distance: Default: ``"euclidean"``, not squared.
        normalize: see there.
        reduction: ``"mean"`` (default) over the positive pairs; ``"mean_nonzero"`` over those with
            a loss above 0; ``"sum"``; ``"none"`` the sum over each anchor's pairs.
        ref_emb: see there. The references have no negatives of their own: J holds those of the
            anchor alone.
        ref_labels: see there.
        indices_tuple: see there. Negatives are those listed for either row.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. float32, or float64 for float64 embeddings.
        Positive pairs without any negative do not count; without any other pair the loss is 0 and
        back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism and precision as for :func:`pair_loss`.

    Memory:
        O((N + M) D), and O(N K) for at most K positives per anchor.

    Example:
        >>> import torch
        >>> from flashmetric.functional import lifted_structure_loss
        >>> x = torch.tensor([[0.0], [1.0], [3.0]], requires_grad=True)
        >>> lifted_structure_loss(x, torch.tensor([0, 0, 1])).item()
        0.049...

    Source:
        H. Oh Song, Y. Xiang, S. Jegelka, S. Savarese: Deep Metric Learning via Lifted Structured
        Feature Embedding, CVPR 2016; the regulariser from K. Roth et al., ICML 2020 (code: weight
        0.005 of lengths).
    """
    check_lifted_structure_options(
        neg_margin, pos_margin, max_positives, l2, l2_power, distance, normalize, reduction
    )
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    by_row = pairs.logsumexp(negative=Logit(-1.0, float(neg_margin))).negative
    listed = pairs.positives(max_positives)
    lse = by_row.unsqueeze(1).expand_as(listed.distance)
    counted = listed.valid
    if one_batch(ref_emb):
        # In float64, of which the CPU adds the gradients in a fixed order.
        by_ref = of_references(by_row.double())
        index = listed.other.clamp(min=0)
        other = (by_ref[index] if index.numel() else by_ref.sum() + index).to(lse.dtype)
        counted = counted & ((lse != -torch.inf) | (other != -torch.inf))
        zero = lse.new_zeros(())
        lse = torch.logaddexp(lse.where(counted, zero), other.where(counted, zero))
    else:
        counted = counted & (lse != -torch.inf)
        lse = lse.where(counted, lse.new_zeros(()))
    violation = (lse + listed.distance - float(pos_margin)).where(counted, lse.new_zeros(()))
    loss = violation.relu().square() / 2
    if reduction == "none":
        total = loss.sum(1)
    else:
        total = total_of(loss.flatten())
    if reduction not in ("none", "sum"):
        total = total / count_of(counted if reduction == "mean" else loss > 0).clamp(min=1)
    if l2 == 0:
        return total
    positives, negatives = pairs.counts()
    paired = (positives + negatives) > 0
    # Masked before, not after: a row without pairs may hold anything.
    rows = embeddings.masked_fill(~paired.unsqueeze(1), 0)
    sizes: Reduction = "mean" if reduction == "mean_nonzero" else reduction
    return total + float(l2) * reduce_anchors(row_sizes(rows, l2_power), paired, sizes)


def check_lifted_structure_options(
    neg_margin: float,
    pos_margin: float,
    max_positives: int | None,
    l2: float,
    l2_power: int,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`lifted_structure_loss` are valid."""
    check_number("l2", l2)
    check_choice("l2_power", l2_power, L2_POWER)
    check_generalized_lifted_structure_options(
        neg_margin, pos_margin, distance, normalize, reduction
    )
    if max_positives is not None:
        check_count("max_positives", max_positives)


def generalized_lifted_structure_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    neg_margin: float = 1.0,
    pos_margin: float = 0.0,
    distance: Distance | Metric = "euclidean",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Lifted structure loss generalised to all positives of an anchor at once.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        pos = (d - pos_margin).masked_fill(~same | eye, -torch.inf).logsumexp(1)
        neg = (neg_margin - d).masked_fill(same, -torch.inf).logsumexp(1)
        loss = (pos + neg).relu().mean()

    .. math::
        \ell_i = \max\Big(0, \log \sum_p e^{d_{ip} - m_+} + \log \sum_n e^{m_- - d_{in}} \Big)

    Args:
        embeddings: as for :func:`pair_loss`, like all arguments not listed here.
        labels: see there.
        neg_margin: margin of the negatives. Default: 1.
        pos_margin: margin of the positives. Default: 0.
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

    Ties, determinism, precision and memory as for :func:`pair_loss`. Where the hinge is active its
    gradient is that of :func:`adaptive_weighted_triplet_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import generalized_lifted_structure_loss
        >>> x = torch.tensor([[0.0], [1.0], [1.5]], requires_grad=True)
        >>> generalized_lifted_structure_loss(x, torch.tensor([0, 0, 1])).item()
        1.0

    Source:
        A. Hermans, L. Beyer, B. Leibe: In Defense of the Triplet Loss for Person
        Re-Identification, 2017, arXiv:1703.07737.
    """
    check_generalized_lifted_structure_options(
        neg_margin, pos_margin, distance, normalize, reduction
    )
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    lse = pairs.logsumexp(Logit(1.0, -float(pos_margin)), Logit(-1.0, float(neg_margin)))
    counted, positive, negative = both_finite(lse.positive, lse.negative)
    return reduce_anchors((positive + negative).relu(), counted, reduction)


def check_generalized_lifted_structure_options(
    neg_margin: float,
    pos_margin: float,
    distance: str | Metric,
    normalize: bool,
    reduction: str,
) -> None:
    """Raise unless the options of :func:`generalized_lifted_structure_loss` are valid."""
    check_number("neg_margin", neg_margin)
    check_number("pos_margin", pos_margin)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, REDUCTIONS)
