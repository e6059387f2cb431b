# SPDX-License-Identifier: Apache-2.0
"""Pairwise losses on the cosine: a target for each kind of pair, or a margin."""

from torch import Tensor

from flashmetric.checks import check_choice, check_number
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import PAIR_REDUCTIONS, PairReduction, reduce_pairs
from flashmetric.functional.pairs import Term
from flashmetric.functional.similarity import similarity_term
from flashmetric.labels import Labels


def cosine_target_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    pos_target: float = 1.0,
    neg_target: float = -1.0,
    reduction: PairReduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Half the squared difference between the cosine of a pair and what it should be.

    Equivalent to, without the N x N matrices::

        s = F.normalize(embeddings) @ F.normalize(embeddings).T
        target = torch.where(labels[:, None] == labels, pos_target, neg_target)
        loss = (0.5 * (s - target) ** 2)[~torch.eye(len(s), dtype=torch.bool)].mean()

    .. math:: \ell_{ij} = \tfrac{1}{2} (s_{ij} - t_{ij})^2

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        pos_target: cosine of positive pairs. Default: 1.
        neg_target: cosine of negative pairs. Default: -1, as for two classes; three or more cannot
            all be opposite to each other, 0 suits them better.
        reduction: ``"mean"`` (default) over all pairs jointly, ``"mean_separate"``,
            ``"mean_nonzero"``, ``"sum"`` or ``"none"`` as for :func:`contrastive_loss`.
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
        >>> from flashmetric.functional import cosine_target_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cosine_target_loss(x, torch.tensor([0, 1])).item()
        0.5

    Source:
        J. Bromley et al.: Signature Verification using a "Siamese" Time Delay Neural Network, NIPS
        1993, which gives the targets.
    """
    check_cosine_target_options(pos_target, neg_target, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance="cosine",
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    positive = similarity_term("square", 1.0, -float(pos_target))
    negative = similarity_term("square", 1.0, -float(neg_target))
    return reduce_pairs(pairs, positive, negative, reduction, (0.5, 0.5))


def check_cosine_target_options(pos_target: float, neg_target: float, reduction: str) -> None:
    """Raise unless the options of :func:`cosine_target_loss` are valid."""
    check_number("pos_target", pos_target)
    check_number("neg_target", neg_target)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)


def cosine_embedding_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 0.0,
    reduction: PairReduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""``torch.nn.CosineEmbeddingLoss`` over all pairs.

    Equivalent to, without the N x N matrices::

        s = F.normalize(embeddings) @ F.normalize(embeddings).T
        loss = torch.where(labels[:, None] == labels, 1 - s, (s - margin).relu())
        loss = loss[~torch.eye(len(s), dtype=torch.bool)].mean()

    .. math::
        \ell_{ij} = \begin{cases}
            1 - s_{ij} & \text{same class} \\
            \max(s_{ij} - \text{margin}, 0) & \text{other class}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        margin: cosine below which a negative pair costs nothing. Default: 0.
        reduction: ``"mean"`` (default) over all pairs jointly, ``"mean_separate"``,
            ``"mean_nonzero"``, ``"sum"`` or ``"none"`` as for :func:`contrastive_loss`.
        ref_emb: see :func:`pair_loss`, as for what follows.
        ref_labels: classes of ``ref_emb``.
        indices_tuple: pairs or triplets that replace the labels.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without any pair it is 0.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`. It is
    :func:`contrastive_loss` of the cosine distance with a ``neg_margin`` of 1 - ``margin``.

    Example:
        >>> import torch
        >>> from flashmetric.functional import cosine_embedding_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cosine_embedding_loss(x, torch.tensor([0, 0])).item()
        1.0
    """
    check_cosine_margin_options(margin, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance="cosine",
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    # 1 - s is the distance itself.
    negative = similarity_term("hinge", 1.0, -float(margin))
    return reduce_pairs(pairs, Term("linear"), negative, reduction)


def cosine_contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    margin: float = 0.5,
    reduction: PairReduction = "mean_nonzero",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss on cosines as HORDE and ABE use it: squares attract, a hinge repels.

    Equivalent to, without the N x N matrices::

        s = F.normalize(embeddings) @ F.normalize(embeddings).T
        same = labels[:, None] == labels
        pos = (1 - s[same & ~torch.eye(len(s), dtype=torch.bool)]) ** 2 / 2
        neg = (s[~same] - margin).relu() / 2
        loss = pos[pos > 0].mean() + neg[neg > 0].mean()

    .. math::
        \ell_{ij} = \begin{cases}
            \frac{1}{2} (1 - s_{ij})^2 & \text{same class} \\
            \frac{1}{2} \max(s_{ij} - \text{margin}, 0) & \text{other class}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        margin: cosine below which a negative pair costs nothing. Default: 0.5.
        reduction: ``"mean_nonzero"`` (default) is the mean over the positives with a loss above 0
            plus the mean over the negatives with a loss above 0; ``"mean_separate"``, ``"mean"``,
            ``"sum"`` or ``"none"`` as for :func:`contrastive_loss`.
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
        >>> from flashmetric.functional import cosine_contrastive_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> cosine_contrastive_loss(x, torch.tensor([0, 0])).item()
        0.5

    Source:
        P. Jacob et al.: Metric Learning with HORDE, ICCV 2019, and its code, which takes the mean
        over all positives: the same unless some coincide.
    """
    check_cosine_margin_options(margin, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance="cosine",
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    negative = similarity_term("hinge", 1.0, -float(margin))
    return reduce_pairs(pairs, Term("square"), negative, reduction, (0.5, 0.5))


def check_cosine_margin_options(margin: float, reduction: str) -> None:
    """Raise unless the options of a loss on cosines with a margin are valid."""
    check_number("margin", margin)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
