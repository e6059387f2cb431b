# SPDX-License-Identifier: Apache-2.0
"""Hinge loss on the scores that a network of yours gives pairs."""

from typing import Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import EMBEDDING_DTYPES, check_choice, check_number
from flashmetric.functional.labelled_pairs import (
    LabelConvention,
    are_similar,
    check_label_convention,
    check_pair_labels,
)
from flashmetric.functional.totals import count_of, total_of
from flashmetric.ops.distance import accumulate_dtype

HingeReduction = Literal["mean", "mean_nonzero", "sum", "none"]
_REDUCTION = get_args(HingeReduction)


def pair_hinge_loss(
    scores: Tensor,
    y: Tensor,
    *,
    label_convention: LabelConvention,
    margin: float = 1.0,
    reduction: HingeReduction = "mean",
) -> Tensor:
    r"""Hinge loss on the scores of pairs, high for similar ones.

    Equivalent to, with labels of +1 and -1::

        loss = (margin - y * scores).relu().mean()

    .. math:: \ell_i = \max(\text{margin} - y_i\, o_i, 0), \qquad y_i = \pm 1

    Args:
        scores: outputs of a decision network, one per pair, any shape.
        y: label of each pair, of the same shape.
        label_convention: what the labels mean, see :func:`labelled_pairs`; no default.
        margin: score that a similar pair should have, and a different one below 0. Default: 1.
        reduction: ``"mean"`` (default) over all pairs, ``"mean_nonzero"`` over those with a loss
            above 0, ``"sum"`` or ``"none"``.

    Returns:
        A scalar, 0 without pairs; with ``reduction="none"`` the shape of ``scores``. float32, or
        float64 for float64 scores.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes differ, or, on the CPU, ``y`` holds other numbers than the convention
            names.

    Determinism:
        Bitwise reproducible from run to run.

    Memory:
        That of ``scores``.

    Example:
        >>> import torch
        >>> from flashmetric.functional import pair_hinge_loss
        >>> scores, y = torch.tensor([0.5, 0.25]), torch.tensor([1, -1])
        >>> pair_hinge_loss(scores, y, label_convention="similar=+1/-1").item()
        0.875

    Source:
        S. Zagoruyko, N. Komodakis: Learning to Compare Image Patches via Convolutional Neural
        Networks, CVPR 2015.
    """
    check_pair_hinge_options(label_convention, margin, reduction)
    if not isinstance(scores, Tensor):
        raise TypeError(f"scores must be a tensor, got {type(scores).__name__}")
    if scores.dtype not in EMBEDDING_DTYPES:
        raise TypeError(
            "scores must be float32, float16, bfloat16 or float64, "
            f"got {str(scores.dtype).removeprefix('torch.')}"
        )
    check_pair_labels(y, scores.shape, scores.device, label_convention)
    scores = scores.to(accumulate_dtype(scores.dtype))
    losses = (float(margin) - torch.where(are_similar(y, label_convention), scores, -scores)).relu()
    if reduction == "none":
        return losses
    loss = total_of(losses.flatten())
    if reduction == "mean":
        return loss / max(1, losses.numel())
    return loss if reduction == "sum" else loss / count_of(losses > 0).clamp(min=1)


def check_pair_hinge_options(label_convention: str, margin: float, reduction: str) -> None:
    """Raise unless the options of :func:`pair_hinge_loss` are valid."""
    check_label_convention(label_convention)
    check_number("margin", margin)
    check_choice("reduction", reduction, _REDUCTION)
