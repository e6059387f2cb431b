# SPDX-License-Identifier: Apache-2.0
"""Smooth pairwise losses on distances: exponential repulsion, and logistic on both sides."""

from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_number, check_positive
from flashmetric.distances import Metric
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import PAIR_REDUCTIONS, PairReduction, reduce_pairs
from flashmetric.functional.pairs import Term
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance

_DECAY = 2.77


def exponential_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    q: float,
    distance: Distance | Metric = "cityblock",
    reduction: PairReduction = "sum",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss of Chopra et al. with an exponential repulsion.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings, p=1)
        same = labels[:, None] == labels
        pos = d[same & ~torch.eye(len(d), dtype=torch.bool)]
        loss = (2 / q * pos**2).sum() + (2 * q * (-2.77 / q * d[~same]).exp()).sum()

    .. math::
        \ell_{ij} = \begin{cases}
            \frac{2}{q} d_{ij}^2 & \text{same class} \\
            2 q\, e^{-2.77\, d_{ij} / q} & \text{other class}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        q: upper bound of the distance, above 0; a constant that the loss has no default for.
        distance: ``"cityblock"`` (default, as in the paper), ``"euclidean"``, or another one.
        reduction: ``"sum"`` (default) over all ordered pairs, ``"mean"`` over them,
            ``"mean_separate"``, ``"mean_nonzero"`` or ``"none"`` as for :func:`contrastive_loss`.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import exponential_contrastive_loss
        >>> x = torch.tensor([[0.0], [0.5]])
        >>> exponential_contrastive_loss(x, torch.tensor([0, 0]), q=1.0).item()
        1.0

    Source:
        S. Chopra, R. Hadsell, Y. LeCun: Learning a Similarity Metric Discriminatively, with
        Application to Face Verification, CVPR 2005.
    """
    check_exponential_options(q, distance, reduction, normalize)
    q = float(q)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    positive, negative = Term("square"), Term("exp", -_DECAY / q)
    return reduce_pairs(pairs, positive, negative, reduction, (2 / q, 2 * q))


def check_exponential_options(
    q: float, distance: str | Metric, reduction: str, normalize: bool
) -> None:
    """Raise unless the options of :func:`exponential_contrastive_loss` are valid."""
    check_positive("q", q)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)


def logistic_distance_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    tau: float = 3.0,
    beta: float = 1.0,
    distance: Distance | Metric = "sqeuclidean",
    reduction: PairReduction = "sum",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Logistic loss on squared distances, the one of deep metric learning by Hu et al. (DDML).

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings) ** 2
        sign = torch.where(labels[:, None] == labels, 1, -1)
        pairs = ~torch.eye(len(d), dtype=torch.bool)
        loss = (F.softplus(beta * (1 - sign * (tau - d))) / (2 * beta))[pairs].sum()

    .. math::
        \ell_{ij} = \frac{1}{2\beta} \log\bigl(1 + e^{\beta (1 - l_{ij} (\tau - d_{ij}))}\bigr),
        \qquad l_{ij} = \pm 1

    Positives are asked to be nearer than tau - 1, negatives farther than tau + 1.

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        tau: threshold on the distance; at or below 1 no positive can be near enough. Default: 3.
        beta: sharpness, above 0; towards infinity the loss becomes a hinge. Default: 1, the plain
            logistic function.
        distance: ``"sqeuclidean"`` (default) or another one.
        reduction: ``"sum"`` (default) over all ordered pairs, ``"mean"`` over them,
            ``"mean_separate"``, ``"mean_nonzero"`` or ``"none"`` as for :func:`contrastive_loss`.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import logistic_distance_loss
        >>> x = torch.tensor([[0.0], [2.0]])  # 1 above tau: log(2) / 2 for each of two pairs
        >>> logistic_distance_loss(x, torch.tensor([0, 1])).item()
        0.693...

    Source:
        J. Hu, J. Lu, Y.-P. Tan: Discriminative Deep Metric Learning for Face Verification in the
        Wild, CVPR 2014. Its weight decay is the business of the optimiser.
    """
    check_logistic_options(tau, beta, distance, reduction, normalize)
    tau, beta = float(tau), float(beta)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    positive = Term("softplus", beta, beta * (1 - tau))
    negative = Term("softplus", -beta, beta * (1 + tau))
    return reduce_pairs(pairs, positive, negative, reduction, (0.5 / beta, 0.5 / beta))


def check_logistic_options(
    tau: float, beta: float, distance: str | Metric, reduction: str, normalize: bool
) -> None:
    """Raise unless the options of :func:`logistic_distance_loss` are valid."""
    check_number("tau", tau)
    check_positive("beta", beta)
    check_distance(distance, normalize)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
