# SPDX-License-Identifier: Apache-2.0
"""Labels beyond one class per row: unlabelled rows, several classes per row, classes with groups.

Plain labels are a tensor [N]: rows of equal labels are positives of each other, all others
negatives. Wherever a loss or a miner takes ``labels`` or ``ref_labels``, it also takes what the
functions here return.

One number is reserved: a row labelled -2**63, the least int64, is in no pair, in plain labels too.
That is how :func:`ignoring` marks rows, and what no class should be called.
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


def ignoring(labels: Tensor | Labels, value: int = -1, *, rows: Tensor | None = None) -> Labels:
    """Leave rows of one label, such as unlabelled ones, out of every pair.

    Equivalent to dropping these rows from the batch, without waiting for the device to count them.

    Args:
        labels: class of each row, shape [N], int64 or int32; or what the functions here return.
        value: the class to ignore, of :func:`two_level` labels in any group. Default: -1. Not
            looked at if ``rows`` are given.
        rows: which rows to ignore, bool, shape [N], in place of a class. Labels of several classes
            per row need it.

    Returns:
        Labels for any loss or miner of this package. :func:`two_level` takes those of plain classes
        as its classes.

    Raises:
        TypeError: ``labels`` is no integer tensor, ``value`` no integer, or ``rows`` not bool.
        ValueError: ``labels`` has not one dimension, ``rows`` has another shape, or labels of
            several classes per row come without ``rows``.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss
        >>> from flashmetric.labels import ignoring
        >>> x = torch.tensor([[0.0], [0.5], [9.0]])
        >>> ContrastiveLoss()(x, ignoring(torch.tensor([4, 4, -1]))).item()
        0.5
    """
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"value must be an integer, got {type(value).__name__}")
    words, rule = _words_and_rule("labels", labels)
    first = words if words.ndim == 1 else words[:, 0]
    if rows is None:
        if words.ndim > 1 and not rule.startswith("group"):
            raise ValueError("rows must be given for labels of several classes per row; got None")
        rows = first == value
    elif not isinstance(rows, Tensor) or rows.dtype != torch.bool:
        raise TypeError("rows must be a bool tensor")
    elif rows.shape != first.shape:
        raise ValueError(
            f"rows must have shape {tuple(first.shape)}, one flag per row of labels; "
            f"got {tuple(rows.shape)}"
        )
    if words.ndim > 1:
        # The first word says it; those of the rule stay where they are.
        rows = rows.unsqueeze(1) & (torch.arange(words.shape[1], device=words.device) == 0)
    return Labels(words.masked_fill(rows, IGNORED), rule)


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
    classes: Tensor | Labels,
    groups: Tensor,
    *,
    positives: Groups = "any",
    negatives: Groups = "any",
) -> Labels:
    """Classes, and groups that restrict which pairs count: cameras, domains, super-classes.

    Args:
        classes: class of each row, shape [N], int64 or int32, or :func:`ignoring` of those.
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
    numbers, rule = _words_and_rule("classes", classes)
    if rule != "equal" or numbers.ndim != 1:
        raise ValueError(f"classes must be one class per row, got labels of rule {rule!r}")
    _check_integers("groups", groups, 1)
    if numbers.shape != groups.shape:
        raise ValueError(
            f"groups must have the shape of classes, {tuple(numbers.shape)}; "
            f"got {tuple(groups.shape)}"
        )
    for name, value in (("positives", positives), ("negatives", negatives)):
        if value not in _LETTER:
            raise ValueError(f"{name} must be one of 'any', 'same', 'different'; got {value!r}")
    words = torch.stack((numbers, groups.long()), 1)
    return Labels(words, f"group:{_LETTER[positives]}{_LETTER[negatives]}")


def _words_and_rule(name: str, labels: object) -> Labels:
    """Plain labels as :class:`Labels`, and those as they are."""
    if isinstance(labels, Labels):
        return labels
    _check_integers(name, labels, 1)
    assert isinstance(labels, Tensor)
    return Labels(labels.long(), "equal")


def _check_integers(name: str, labels: object, dimensions: int) -> None:
    if not isinstance(labels, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(labels).__name__}")
    if labels.dtype not in (torch.int64, torch.int32):
        raise TypeError(
            f"{name} must be int64 or int32, got {str(labels.dtype).removeprefix('torch.')}"
        )
    if labels.ndim != dimensions:
        raise ValueError(f"{name} must have {dimensions} dimension, got {tuple(labels.shape)}")
