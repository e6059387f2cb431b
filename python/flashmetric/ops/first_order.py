# SPDX-License-Identifier: Apache-2.0
"""Backward passes that have no derivative of their own."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor

_MESSAGE = b"flashmetric has first derivatives only: its gradients cannot be differentiated again"


def first_order_only(backward: Callable[..., Any]) -> Callable[..., Any]:
    """Run ``backward`` of an autograd function without a graph; differentiating it again raises.

    Like :func:`torch.autograd.function.once_differentiable`, which however attaches its error only
    if the incoming gradient requires one. That of a plain ``loss`` does not, and the second
    derivative of the loss would silently be missing from a gradient penalty.
    """

    @wraps(backward)
    def wrapper(ctx: Any, *grads: Tensor | None) -> Any:
        with torch.no_grad():
            outputs = backward(ctx, *grads)
        # A compiled backward refuses a second one by itself.
        if torch.compiler.is_compiling() or not torch.is_grad_enabled():
            return outputs
        several = outputs if isinstance(outputs, tuple) else (outputs,)
        if all(output is None for output in several):
            return outputs
        # The error becomes part of the graph only behind an input that requires a gradient.
        leaves = [None if o is None else o.detach().requires_grad_() for o in several]
        delayed_error: Callable[..., Any] = torch._C._functions.DelayedError(_MESSAGE, len(several))
        return delayed_error(*leaves)

    return wrapper
