# SPDX-License-Identifier: Apache-2.0
"""Labels beyond one class per row: unlabelled rows, several classes per row, classes with groups.

Plain labels are a tensor [N]: rows of equal labels are positives of each other, all others
negatives. Wherever a loss or a miner takes ``labels`` or ``ref_labels``, it also takes what the
functions here return.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flashmetric.ops.labels import IGNORED

Groups = Literal["any", "same", "different"]
_LETTER = {"any": "a", "same": "s", "different": "d"}
_BITS = 63
"""Classes per word: the sign bit stays clear, so that no set of classes looks ignored."""

__all__ = ["Labels", "ignoring", "multi_hot", "two_level"]


class Labels(NamedTuple):
    """Labels as the kernels compare them; see :mod:`flashmetric.ops.labels`."""

    words: Tensor
    """int64, shape [N] or [N, words]."""
    rule: str
    """Which rows are positives and which are negatives of each other."""

    def __len__(self) -> int:
        """Number of rows, not of fields."""
        return self.words.shape[0]


def ignoring(labels: Tensor, value: int = -1) -> Labels:
    """Leave rows of one label, such as unlabelled ones, out of every pair.

    Equivalent to dropping these rows from the batch, without waiting for the device to count them.

    Args:
        labels: class of each row, shape [N], int64 or int32.
        value: the label to ignore. Default: -1.

    Returns:
        Labels for any loss or miner of this package.

    Raises:
        TypeError: ``labels`` is no integer tensor, or ``value`` no integer.
        ValueError: ``labels`` has not one dimension.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss
        >>> from flashmetric.labels import ignoring
        >>> x = torch.tensor([[0.0], [0.5], [9.0]])
        >>> ContrastiveLoss()(x, ignoring(torch.tensor([4, 4, -1]))).item()
        0.5
    """
    _check_integers("labels", labels, 1)
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"value must be an integer, got {type(value).__name__}")
    return Labels(labels.long().masked_fill(labels == value, IGNORED), "equal")


def multi_hot(classes: Tensor, match: Literal["any", "all"] = "any") -> Labels:
    """Several classes per row.

    Args:
        classes: which classes each row belongs to, shape [N, C], bool or numbers of which those
            above 0 count.
        match: rows are positives of each other when they share ``"any"`` class (default), or when
            ``"all"`` their classes agree. All other rows are negatives.

    Returns:
        Labels for any loss or miner of this package. A row without classes has no positives under
        ``"any"``; rows without classes are each other's positives under ``"all"``.

    Raises:
        TypeError: ``classes`` is no tensor.
        ValueError: ``classes`` has not two dimensions, or ``match`` is unknown.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss
        >>> from flashmetric.labels import multi_hot
        >>> x = torch.tensor([[0.0], [0.5], [9.0]])
        >>> tags = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 1]])
        >>> ContrastiveLoss()(x, multi_hot(tags)).item()
        0.5
    """
    if not isinstance(classes, Tensor):
        raise TypeError(f"classes must be a tensor, got {type(classes).__name__}")
    if classes.ndim != 2:
        raise ValueError(f"classes must have shape [rows, classes], got {tuple(classes.shape)}")
    if match not in ("any", "all"):
        raise ValueError(f"match must be 'any' or 'all', got {match!r}")
    bits = (classes > 0).long()
    columns = max(1, -(-bits.shape[1] // _BITS)) * _BITS
    bits = torch.nn.functional.pad(bits, (0, columns - bits.shape[1]))
    powers = torch.arange(_BITS, device=bits.device)
    words = bits.unflatten(1, (-1, _BITS)).bitwise_left_shift(powers).sum(2)
    return Labels(words, "any" if match == "any" else "equal")


def two_level(
    classes: Tensor, groups: Tensor, *, positives: Groups = "any", negatives: Groups = "any"
) -> Labels:
    """Classes, and groups that restrict which pairs count: cameras, domains, super-classes.

    Args:
        classes: class of each row, shape [N], int64 or int32.
        groups: group of each row, shape [N], int64 or int32.
        positives: rows of one class are positives in ``"any"`` groups (default), only in the
            ``"same"``, or only in ``"different"`` groups (one person, two cameras).
        negatives: rows of other classes are negatives likewise (``"same"``: hard ones of the same
            super-class). Pairs that are neither do not count.

    Returns:
        Labels for any loss or miner of this package.

    Raises:
        TypeError: ``classes`` or ``groups`` is no integer tensor.
        ValueError: their shapes differ or have not one dimension, or an option is unknown.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss
        >>> from flashmetric.labels import two_level
        >>> x = torch.tensor([[0.0], [0.5], [9.0]])
        >>> labels = two_level(
        ...     torch.tensor([1, 1, 1]), torch.tensor([0, 1, 0]), positives="different"
        ... )
        >>> ContrastiveLoss(reduction="sum")(x, labels).item()
        18.0
    """
    _check_integers("classes", classes, 1)
    _check_integers("groups", groups, 1)
    if classes.shape != groups.shape:
        raise ValueError(
            f"groups must have the shape of classes, {tuple(classes.shape)}; "
            f"got {tuple(groups.shape)}"
        )
    for name, value in (("positives", positives), ("negatives", negatives)):
        if value not in _LETTER:
            raise ValueError(f"{name} must be one of 'any', 'same', 'different'; got {value!r}")
    words = torch.stack((classes.long(), groups.long()), 1)
    return Labels(words, f"group:{_LETTER[positives]}{_LETTER[negatives]}")


def _check_integers(name: str, labels: object, dimensions: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be int64 or int32, got {str(labels.dtype).removeprefix('torch.')}"
        )
    if labels.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension, got {tuple(labels.shape)}")
