# SPDX-License-Identifier: Apache-2.0
"""Verification: learned decisions whether two rows are of one class, as losses."""

from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_flag, check_parameter, check_rows
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pair_reduction import (
    PAIR_REDUCTIONS,
    PairReduction,
    as_parameter,
    reduce_pairs,
)
from flashmetric.functional.pairs import Pairs, Term
from flashmetric.functional.similarity import SIMILARITIES, Similarity, similarity_term
from flashmetric.labels import Labels
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.first_order import first_order_only

Features = Literal["cityblock", "chi2"]
_FEATURES = get_args(Features)


def sigmoid_verification_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    weight: float | Tensor = 1.0,
    bias: float | Tensor = 0.0,
    distance: Similarity = "cosine",
    reduction: PairReduction = "mean",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Half the squared error of a logistic decision on the cosine.

    Equivalent to, without the N x N matrices::

        s = F.normalize(embeddings) @ F.normalize(embeddings).T
        same = (labels[:, None] == labels).float()
        loss = 0.5 * (same - torch.sigmoid(weight * s + bias)) ** 2
        loss = loss[~torch.eye(len(s), dtype=torch.bool)].mean()

    .. math:: \ell_{ij} = \tfrac{1}{2} (y_{ij} - \sigma(w\, s_{ij} + b))^2, \qquad y_{ij} = 0, 1

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        weight: w, a number or a learned 0-d tensor; begin above 0. Default: 1.
        bias: b, likewise. Default: 0.
        distance: ``"cosine"`` (default) or ``"dot"``, which is minus the similarity.
        reduction: ``"mean"`` (default) over all pairs jointly, ``"mean_separate"``,
            ``"mean_nonzero"``, ``"sum"`` or ``"none"`` as for :func:`contrastive_loss`.
        normalize: scale rows to unit length first; the cosine does so itself. Default: False.
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
        >>> from flashmetric.functional import sigmoid_verification_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])  # a cosine of 0: undecided
        >>> sigmoid_verification_loss(x, torch.tensor([0, 1])).item()
        0.125

    Source:
        Y. Sun et al.: Deep Learning Face Representation by Joint Identification-Verification, NIPS
        2014 (DeepID2), the verification signal on the cosine.
    """
    check_sigmoid_options(weight, bias, distance, reduction, normalize)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    weight, bias = as_parameter(weight, embeddings), as_parameter(bias, embeddings)
    # 1 - sigmoid(z) is sigmoid(-z), without cancellation.
    positive = similarity_term("squared_sigmoid", -weight, -bias, distance)
    negative = similarity_term("squared_sigmoid", weight, bias, distance)
    return reduce_pairs(pairs, positive, negative, reduction, (0.5, 0.5))


def check_sigmoid_options(
    weight: float | Tensor,
    bias: float | Tensor,
    distance: str,
    reduction: str,
    normalize: bool,
) -> None:
    """Raise unless the options of :func:`sigmoid_verification_loss` are valid."""
    check_parameter("weight", weight)
    check_parameter("bias", bias)
    check_choice("distance", distance, SIMILARITIES)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
    check_flag("normalize", normalize)


def verification_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    weight: Tensor,
    bias: float | Tensor = 0.0,
    distance: Features = "cityblock",
    reduction: PairReduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Cross-entropy of a logistic regression on the differences of two rows.

    Equivalent to, without the N x N x D array::

        difference = (embeddings[:, None] - embeddings).abs()
        z = bias - (difference * weight).sum(2)
        same = (labels[:, None] == labels).float()
        loss = F.binary_cross_entropy_with_logits(z, same, reduction="none")
        loss = loss[~torch.eye(len(z), dtype=torch.bool)].mean()

    .. math::
        P(\text{same}) = \sigma(b - \sum_k w_k \varphi_k), \qquad
        \varphi_k = \lvert x_k - r_k \rvert
        \quad \text{or} \quad \frac{(x_k - r_k)^2}{x_k + r_k}

    Args:
        embeddings: anchors, shape [N, D].
        labels: class of each anchor, shape [N].
        weight: w, shape [D]: how much each feature's difference speaks against one class. Over
            labelled pairs a weight that is not above 0 counts as 0, and gets the gradient of a
            weight of 0 where a descent would raise it, so that it finds its way back; one that
            would lower it further is withheld. Listed pairs take weights of any sign.
        bias: b, a number or a learned 0-d tensor. Default: 0.
        distance: ``"cityblock"`` (default) for magnitudes of differences, ``"chi2"`` for their
            squares over the sums, of features that are not negative; 0 / 0 is 0.
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
        >>> from flashmetric.functional import verification_loss
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> verification_loss(x, torch.tensor([0, 1]), weight=torch.tensor([1.0, 1.0])).item()
        0.126...

    Source:
        Y. Taigman et al.: DeepFace, CVPR 2014, the "Siamese network" and the weighted chi-squared
        distance; G. Koch et al.: Siamese Neural Networks for One-shot Image Recognition, 2015.
    """
    check_verification_options(weight, bias, distance, reduction)
    check_rows("embeddings", embeddings)
    if weight.shape[0] != embeddings.shape[1]:
        raise ValueError(
            f"weight must have one entry per feature, {embeddings.shape[1]}; got {weight.shape[0]}"
        )
    weight = weight.to(accumulate_dtype(embeddings.dtype))

    def weigh(weight: Tensor) -> Pairs:
        # Both distances of rows times weights are the weighted distances.
        return prepare_pairs(
            embeddings * weight,
            labels,
            distance=distance,
            ref_emb=ref_emb * weight if isinstance(ref_emb, Tensor) else ref_emb,
            ref_labels=ref_labels,
            indices_tuple=indices_tuple,
        )

    if indices_tuple is None:
        pairs = weigh(_not_negative(weight))
    else:
        signed = weight + (weight == 0) * _trace(weight.dtype)
        pairs, against = weigh(signed.clamp(min=0)), weigh((-signed).clamp(min=0))
        assert isinstance(pairs, ListedPairs) and isinstance(against, ListedPairs)
        pairs = pairs.minus(against)
    bias = as_parameter(bias, embeddings)
    positive, negative = Term("softplus", 1.0, -bias), Term("softplus", -1.0, bias)
    return reduce_pairs(pairs, positive, negative, reduction)


def _trace(dtype: torch.dtype) -> float:
    """What stands in for a weight of 0: too small to change a distance.

    The kernels measure weighted rows. At a weight of exactly 0 these all agree, and so tell nothing
    of what another weight would do. A power of two, so that the products are exact, the square of
    which, for chi2, is a normal number.
    """
    return 2.0**-100 if dtype == torch.float64 else 2.0**-40


class _NotNegative(torch.autograd.Function):
    """Weights above 0, and a trace in place of the others."""

    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        trace = _trace(weight.dtype)
        low = weight <= trace
        ctx.save_for_backward(low)
        # NaN stays.
        return weight.masked_fill(low, trace)

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (low,) = ctx.saved_tensors
        return grad.masked_fill(low & (grad > 0), 0)


_not_negative: Callable[[Tensor], Tensor] = _NotNegative.apply


def check_verification_options(
    weight: Tensor, bias: float | Tensor, distance: str, reduction: str
) -> None:
    """Raise unless the options of :func:`verification_loss` are valid."""
    if not isinstance(weight, Tensor):
        raise TypeError(f"weight must be a tensor, got {type(weight).__name__}")
    if weight.ndim != 1:
        raise ValueError(f"weight must have shape [features], got {tuple(weight.shape)}")
    check_parameter("weight", weight.new_empty(()))
    check_parameter("bias", bias)
    check_choice("distance", distance, _FEATURES)
    check_choice("reduction", reduction, PAIR_REDUCTIONS)
