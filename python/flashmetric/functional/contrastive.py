# SPDX-License-Identifier: Apache-2.0
"""Contrastive loss over all pairs, or over given pairs."""

from typing import Literal, get_args

from torch import Tensor

from flashmetric.checks import check_choice, check_distance, check_not_negative, check_number
from flashmetric.distances import Metric
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import PAIR_REDUCTIONS, PairReduction, reduce_pairs
from flashmetric.functional.pairs import Pairs, Term
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, accumulate_dtype
from flashmetric.ops.terms import Formula

Power = Literal[1, 2]
_POWER = get_args(Power)
_FORMULA: dict[int, Formula] = {1: "hinge", 2: "squared_hinge"}


def contrastive_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    pos_margin: float = 0.0,
    neg_margin: float = 1.0,
    distance: Distance | Metric = "euclidean",
    pos_weight: float | Tensor = 1.0,
    power: Power = 1,
    scale: float = 1.0,
    reduction: PairReduction = "mean_nonzero",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Contrastive loss over all ordered pairs of different rows.

    Equivalent to, without the N x N matrices::

        d = torch.cdist(embeddings, embeddings)
        same = labels[:, None] == labels
        pos = d[same & ~torch.eye(len(d), dtype=torch.bool)].sub(pos_margin).relu() ** power
        neg = (neg_margin - d[~same]).relu() ** power
        loss = scale * (pos.sum() / (pos > 0).sum() + neg.sum() / (neg > 0).sum())

    .. math::
        \ell_{ij} = \text{scale} \cdot \begin{cases}
            \max(d_{ij} - \text{pos\_margin}, 0)^{\text{power}} & \text{same class} \\
            \max(\text{neg\_margin} - d_{ij}, 0)^{\text{power}} & \text{other class}
        \end{cases}

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool. May be None with
            ``indices_tuple``.
        pos_margin: distance below which a positive pair costs nothing. Default: 0.
        neg_margin: distance above which a negative pair costs nothing. Default: 1.
        distance: ``"euclidean"`` (default), ``"sqeuclidean"``, ``"cosine"`` (1 - cosine, rows are
            normalised first), ``"dot"`` (minus the inner product), or another name or object of
            :mod:`flashmetric.distances`. The margins are in its units: those of a loss on squared
            distances are margins of squares.
        pos_weight: factor on positive pairs, at least 0: one for all, or a tensor [N] with that of
            each anchor; a constant. Default: 1.
        power: 1 (default) for the hinge, 2 for its square.
        scale: factor on every pair. Default: 1.
        reduction: ``"mean_nonzero"`` (default) is the mean over the positives with a loss above 0
            plus the mean over the negatives with a loss above 0; ``"mean_separate"`` the mean over
            all positives plus the mean over all negatives; ``"mean"`` over all pairs jointly;
            ``"sum"``; ``"none"`` the sum over each anchor's pairs.
        normalize: scale rows to unit length first, see :func:`normalize_rows`. Default: False.
        ref_emb: second rows of the pairs, shape [M, D], dtype of ``embeddings``. Default: the
            anchors themselves, a row being no pair with itself. Given references exclude no pair,
            whatever object they are.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: int64 row numbers that replace the labels: pairs (a1, p, a2, n), or triplets
            (a, p, n), which stand for the pairs (a, p) and (a, n). ``a`` indexes ``embeddings``,
            ``p`` and ``n`` index ``ref_emb`` if given, else ``embeddings``. Repeated pairs count
            repeatedly.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. float32, or float64 for float64 embeddings.
        Without any pair it is 0 and back-propagates zeros. NaN or infinite rows, and rows so long
        that four times the squared length overflows, make the loss over labelled pairs NaN.
        There are no second derivatives.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties:
        Coinciding rows have distance 0 and gradient 0. The hinge is active strictly above 0. Pairs
        much closer than their distance to the origin are measured by differences, so that
        duplicates are exact.

    Determinism:
        Bitwise reproducible from run to run, forward and backward: on the CPU for any number of
        threads, on CUDA for one kind of device. The kernels add no floats by atomics and satisfy
        ``torch.use_deterministic_algorithms``.

    Precision:
        float32 rows are compared in float32; on CUDA, with ``"high"`` or ``"medium"`` as
        ``torch.set_float32_matmul_precision``, with the 11 bits of TF32. float16 and bfloat16 rows
        are used as they are. Sums and what enters the loss are float32 (float64 for float64).

    Memory:
        O((N + M) D) besides a slab of fixed size: the gradient is computed along with the loss,
        and no matrix of pairs is kept for backward.

    Example:
        >>> import torch
        >>> from flashmetric.functional import contrastive_loss
        >>> x = torch.tensor([[0.0], [0.5], [1.0]], requires_grad=True)
        >>> loss = contrastive_loss(x, torch.tensor([0, 0, 1]), reduction="mean_separate")
        >>> loss.backward()
        >>> loss.item(), x.grad.flatten().tolist()
        (0.75, [-1.0, 1.5, -0.5])

    Source:
        R. Hadsell, S. Chopra, Y. LeCun: Dimensionality Reduction by Learning an Invariant Mapping,
        CVPR 2006 (power 2, scale 1/2, pos_margin 0).
    """
    check_contrastive_options(
        pos_margin, neg_margin, distance, power, scale, reduction, normalize, pos_weight
    )
    pos_margin, neg_margin, scale = float(pos_margin), float(neg_margin), float(scale)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    weight = _weight(pos_weight, pairs)
    # Inside of the square, its root.
    weight = weight if power == 1 else weight**0.5
    formula = _FORMULA[power]
    positive = Term(formula, weight, -pos_margin * weight)
    negative = Term(formula, -1.0, neg_margin)
    return scale * reduce_pairs(pairs, positive, negative, reduction)


def _weight(pos_weight: float | Tensor, pairs: Pairs) -> float | Tensor:
    """The weight of positive pairs, one for all or one per anchor, as a constant."""
    if not isinstance(pos_weight, Tensor):
        return float(pos_weight)
    if pos_weight.shape != (pairs.anchors,):
        raise ValueError(
            f"pos_weight must be a number or have shape [{pairs.anchors}], one for each of "
            f"embeddings; got {tuple(pos_weight.shape)}"
        )
    if pos_weight.device != pairs.embeddings.device:
        raise ValueError(
            f"pos_weight must have the device of embeddings, {pairs.embeddings.device}; "
            f"got {pos_weight.device}"
        )
    return pos_weight.detach().to(accumulate_dtype(pairs.embeddings.dtype))


def check_contrastive_options(
    pos_margin: float,
    neg_margin: float,
    distance: str | Metric,
    power: int,
    scale: float,
    reduction: str,
    normalize: bool,
    pos_weight: float | Tensor = 1.0,
) -> None:
    """Raise unless the options of :func:`contrastive_loss` are valid."""
    check_number("pos_margin", pos_margin)
    check_number("neg_margin", neg_margin)
    check_distance(distance, normalize)
    check_choice("power", power, _POWER)
    check_number("scale", scale)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
    check_not_negative("pos_weight", pos_weight)
