# SPDX-License-Identifier: Apache-2.0
"""Circle loss."""

import math

import torch
from torch import Tensor

from flashmetric.checks import check_number, check_positive
from flashmetric.functional.anchor_reduction import reduce_anchors, softplus
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.functional.softmax_rows import (
    Reduction,
    check_reduction,
)
from flashmetric.labels import Labels


def circle_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    m: float = 0.4,
    gamma: float = 80.0,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Circle loss: similarities weighted by how far they are from their optimum.

    Equivalent to, without the N x N matrices::

        x = torch.nn.functional.normalize(embeddings)
        s = x @ x.T
        same = labels[:, None] == labels
        eye = torch.eye(len(x), dtype=torch.bool)
        pos = gamma * (1 + m - s.detach()).relu() * (1 - m - s)
        neg = gamma * (s.detach() + m).relu() * (s - m)
        pos = pos.masked_fill(~same | eye, -torch.inf).logsumexp(1)
        neg = neg.masked_fill(same, -torch.inf).logsumexp(1)
        loss = torch.nn.functional.softplus(pos + neg)[pos + neg > -torch.inf].mean()

    .. math::
        \ell_i = \log \Bigl(1 + \sum_n e^{\gamma [s_{in} + m]_+ (s_{in} - m)}
            \sum_p e^{\gamma [1 + m - s_{ip}]_+ (1 - m - s_{ip})} \Bigr)

    with the factors :math:`[\cdot]_+` constant in the gradient, by definition.

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides. The
            similarity s is the cosine.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        m: relaxation; positives should exceed 1 - m, negatives stay below m. Default: 0.4.
        gamma: scale of the logits, above 0. Default: 80.
        reduction: ``"mean"`` (default) over the anchors with a positive and a negative, ``"sum"``
            or ``"none"``.
        ref_emb: rows to pair the anchors with, shape [M, D]. Default: the anchors.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels. Repeated
            pairs count repeatedly.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Anchors without a positive or without a
        negative are left out; if none remains, the loss is 0 and back-propagates zeros.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import circle_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> circle_loss(x, torch.tensor([0, 0, 1]), m=0.0, gamma=1.0).item()  # log 2
        0.6931...

    Source:
        Y. Sun et al.: Circle Loss: A Unified Perspective of Pair Similarity Optimization, CVPR
        2020. It suggests m 0.25 and gamma 256 for faces, 0.25 and 128 for persons, 0.4 and 80 for
        fine-grained retrieval.
    """
    check_circle_options(m, gamma, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance="cosine",
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    # With z = sqrt(gamma) s, or sqrt(gamma) (1 - s), both logits are max(z + b, 0) (z - b).
    root = math.sqrt(gamma)
    positive = Logit(root, 0.0, "circle", root * m)
    lse = pairs.logsumexp(positive, Logit(-root, root, "circle", root * m))
    both = (lse.positive != -torch.inf) & (lse.negative != -torch.inf)
    z = lse.positive.masked_fill(~both, 0) + lse.negative.masked_fill(~both, 0)
    return reduce_anchors(softplus(z).masked_fill(~both, 0), both, reduction)


def check_circle_options(m: float, gamma: float, reduction: str) -> None:
    """Raise unless the options of :func:`circle_loss` are valid."""
    check_number("m", m)
    check_positive("gamma", gamma)
    check_reduction(reduction)
