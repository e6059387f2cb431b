# SPDX-License-Identifier: Apache-2.0
"""Bytes that the operators of a call read and write: the memory side of the roofline."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class TrafficCounter(TorchDispatchMode):
    """Adds up the bytes of the arguments and results of every operator.

    It is what a program that stores every intermediate tensor must move if nothing stays in the
    cache between two operators. An operator that only makes a view moves nothing; one that works
    in tiles inside, such as ours, counts with its arguments and results.
    """

    def __init__(self) -> None:
        """Starts at zero."""
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict | None = None
    ) -> Any:
        """Runs the operator and counts."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        taken = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        if not self._is_view(func, taken, made):
            self.bytes += sum(map(stored_bytes, (*taken, *made)))
        return result

    @staticmethod
    def _is_view(func: Any, taken: list[Tensor], made: list[Tensor]) -> bool:
        if func._schema.is_mutable or not made:
            return False
        sources = {leaf.untyped_storage().data_ptr() for leaf in taken if leaf.numel()}
        return all(leaf.untyped_storage().data_ptr() in sources for leaf in made)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes behind a tensor: less than its elements where an expanded dimension repeats them."""
    elements = tensor.numel()
    for size, stride in zip(tensor.shape, tensor.stride(), strict=True):
        if stride == 0 and size > 1:
            elements //= size
    return elements * tensor.element_size()


def traffic(call: Callable[[], object]) -> int:
    """Runs a call once and returns its bytes, those of its backward pass included."""
    with TrafficCounter() as counter:
        call()
    return counter.bytes


def has_cuda_kernel(op: str) -> bool:
    """Whether an op of the library has a kernel for CUDA tensors, not only PyTorch code."""
    try:
        return bool(torch._C._dispatch_has_kernel_for_dispatch_key(f"flashmetric::{op}", "CUDA"))
    except RuntimeError:  # no such op in this build
        return False
