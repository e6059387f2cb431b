# SPDX-License-Identifier: Apache-2.0
"""Pairs that come with a label of their own, as arguments of a loss over pairs."""

from typing import Any, Literal, get_args

import torch
from torch import Tensor

from flashmetric.checks import check_choice, check_rows, readable

LabelConvention = Literal["similar=0", "similar=1", "similar=+1/-1"]
_CONVENTIONS = get_args(LabelConvention)
_CODES = {"similar=0": (0, 1), "similar=1": (1, 0), "similar=+1/-1": (1, -1)}


def labelled_pairs(
    x1: Tensor, x2: Tensor, y: Tensor, *, label_convention: LabelConvention
) -> dict[str, Any]:
    """Pairs of rows with a label each, as the arguments by which a loss takes them.

    The loss is over the pairs (x1[i], x2[i]) alone. It must be one that sums over pairs, such as
    the contrastive, margin, deviance and verification losses ("pair sums" in docs/losses.md). In
    triplet and softmax losses an anchor needs a positive and a negative; here each has one pair, so
    that they are 0. Texts and libraries disagree about what a label of 1 means, so there is no
    default.

    Args:
        x1: first rows of the pairs, shape [N, D].
        x2: second rows, shape [N, D].
        y: label of each pair, shape [N], of any dtype.
        label_convention: ``"similar=0"`` (Hadsell, Chopra: 1 for different), ``"similar=1"`` (0 for
            different), or ``"similar=+1/-1"`` (-1 for different).

    Returns:
        ``embeddings``, ``ref_emb`` and ``indices_tuple`` for ``loss(**labelled_pairs(...))``. With
        ``reduction="none"`` the loss has one entry per pair, ready for weights of your own.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: shapes differ, or ``y`` holds other numbers than the convention names.

    Memory:
        O(N). The lists of similar and of different pairs are as long as ``y`` says, so this waits
        for the device and cannot be compiled into one graph.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss
        >>> from flashmetric.functional import labelled_pairs
        >>> x1, x2 = torch.tensor([[0.0], [0.0]]), torch.tensor([[0.5], [0.25]])
        >>> pairs = labelled_pairs(x1, x2, torch.tensor([0, 1]), label_convention="similar=0")
        >>> ContrastiveLoss(reduction="mean")(**pairs).item()
        0.625
        >>> weight = torch.tensor([3.0, 1.0])
        >>> (weight * ContrastiveLoss(reduction="none")(**pairs)).sum().item()
        2.25
    """
    check_rows("x1", x1)
    check_rows("x2", x2)
    if x1.shape != x2.shape:
        raise ValueError(f"x2 must have the shape of x1, {tuple(x1.shape)}; got {tuple(x2.shape)}")
    check_pair_labels(y, x1.shape[:1], x1.device, label_convention)
    similar, different = ((y == code).nonzero().squeeze(1) for code in _CODES[label_convention])
    if len(similar) + len(different) != len(y):
        raise _unknown_label(label_convention)
    indices = (similar, similar, different, different)
    return {"embeddings": x1, "ref_emb": x2, "indices_tuple": indices}


def check_label_convention(label_convention: object) -> None:
    """Raise unless it is known what labels of pairs mean."""
    check_choice("label_convention", label_convention, _CONVENTIONS)


def are_similar(y: Tensor, label_convention: LabelConvention) -> Tensor:
    """Mask of the similar pairs; checks on the CPU that there are no labels but two."""
    similar, different = (y == code for code in _CODES[label_convention])
    if readable(y) and not bool((similar | different).all()):
        raise _unknown_label(label_convention)
    return similar


def check_pair_labels(
    y: object, shape: torch.Size, device: torch.device, label_convention: object
) -> None:
    """Raise unless there is one label per pair, in a known convention."""
    check_label_convention(label_convention)
    if not isinstance(y, Tensor):
        raise TypeError(f"y must be a tensor, got {type(y).__name__}")
    if y.shape != shape:
        raise ValueError(
            f"y must have shape {tuple(shape)}, one label per pair; got {tuple(y.shape)}"
        )
    if y.device != device:
        raise ValueError(f"y must be on {device}, as the pairs are; got {y.device}")
    if y.dtype == torch.bool and label_convention == "similar=+1/-1":
        raise TypeError("y must hold 1 and -1 for 'similar=+1/-1', got bool")


def _unknown_label(label_convention: str) -> ValueError:
    similar, different = _CODES[label_convention]
    return ValueError(
        f"y must hold {similar} or {different} with label_convention={label_convention!r}; "
        "got another number"
    )
