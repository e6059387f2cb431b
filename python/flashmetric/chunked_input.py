# SPDX-License-Identifier: Apache-2.0
"""Rows of what an encoder takes, whatever they are wrapped in."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor


class ChunkedInput:
    """What an encoder takes, looked through once for what has an entry per row.

    Args:
        whole: a tensor, or a mapping, tuple or list that holds some; :func:`grad_cache` has the
            rules.
        name: what to call it in errors.

    Raises:
        ValueError: it holds no tensor, or things of different lengths.
    """

    def __init__(self, whole: Any, name: str) -> None:
        """Find the columns: tensors, and sequences without tensors."""
        self.columns: list[Any] = []
        self._put = _take_apart(whole, self.columns)
        tensors = [column for column in self.columns if isinstance(column, Tensor)]
        if not tensors:
            raise ValueError(f"{name} must hold a tensor, got {type(whole).__name__}")
        shapes = {tuple(tensor.shape) for tensor in tensors}
        lengths = {shape[:1] for shape in shapes}
        if len(lengths) != 1 or lengths == {()}:
            raise ValueError(f"{name} must hold tensors of one length, got shapes {sorted(shapes)}")
        self.rows: int = len(tensors[0])
        for column in self.columns:
            if len(column) != self.rows:
                raise ValueError(
                    f"{name} must hold an entry per row, {self.rows}, in a list or tuple without "
                    f"tensors; got {len(column)} in a {type(column).__name__} (give the encoder "
                    "options by functools.partial)"
                )
        self.learned = [
            place
            for place, column in enumerate(self.columns)
            if isinstance(column, Tensor) and column.requires_grad
        ]

    def cut(self, begin: int, end: int) -> list[Any]:
        """These rows of every column."""
        return [column[begin:end] for column in self.columns]

    def put(self, parts: list[Any]) -> Any:
        """The input, with these in place of its columns."""
        return self._put(parts)


def _take_apart(inputs: Any, columns: list[Any]) -> Callable[[list[Any]], Any]:
    """Appends to ``columns`` what has an entry per row.

    Returns:
        A function that puts parts of the columns together as the inputs are.
    """
    if isinstance(inputs, Mapping):
        named = {key: _take_apart(value, columns) for key, value in inputs.items()}
        return lambda parts: _like(inputs, {key: put(parts) for key, put in named.items()})
    if isinstance(inputs, (tuple, list)) and _holds_tensor(inputs):
        held = [_take_apart(value, columns) for value in inputs]
        kind = tuple if isinstance(inputs, tuple) else list
        return lambda parts: _like(inputs, kind(put(parts) for put in held))
    listed = isinstance(inputs, Sequence) and not isinstance(inputs, (str, bytes))
    if not (listed or isinstance(inputs, Tensor) or getattr(inputs, "ndim", None)):
        return lambda _: inputs
    place = len(columns)
    columns.append(inputs)
    return lambda parts: parts[place]


def _holds_tensor(inputs: Any) -> bool:
    if isinstance(inputs, Mapping):
        inputs = tuple(inputs.values())
    if isinstance(inputs, (tuple, list)):
        return any(_holds_tensor(value) for value in inputs)
    return isinstance(inputs, Tensor)


def _like(inputs: Any, values: Any) -> Any:
    kind = type(inputs)
    try:
        return getattr(kind, "_make", kind)(values)
    except (TypeError, ValueError):  # The type is made from something else, as defaultdict is.
        return values
