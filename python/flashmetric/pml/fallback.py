# SPDX-License-Identifier: Apache-2.0
"""When a call goes to the parent's own code, and how its user learns of it."""

from typing import Any

from torch import Tensor

from flashmetric import not_fused
from flashmetric.not_fused import NotFusedError, NotFusedWarning

__all__ = ["NotFusedError", "NotFusedWarning", "check_not_overridden", "check_numbers", "report"]

# Methods that a subclass may define without changing what the kernels would have to compute.
_HARMLESS = frozenset(
    {
        "extra_repr",
        "forward",
        "get_default_distance",
        "get_default_reducer",
        "get_default_weight_init_func",
        "output_assertion",
        "reset_stats",
        "set_reducer",
    }
)


def report(module: Any, reason: NotFusedError) -> None:
    """Warn that a module falls back, the first time it does."""
    not_fused.report(module, "pytorch-metric-learning", reason)


def check_not_overridden(module: Any) -> None:
    """Raise if the class of ``module`` redefines a part of what the kernels compute."""
    name = _overridden(type(module))
    if name is not None:
        raise NotFusedError(f"{type(module).__name__} has a {name} of its own")


def _overridden(kind: type) -> str | None:
    """A method that a user's subclass replaces, or None."""
    own: list[type] = []
    for base in kind.__mro__:
        if base.__module__.startswith("flashmetric.pml."):
            known = dir(base) if own else ()
            redefined = (name for above in own for name in vars(above) if name in known)
            return next((n for n in redefined if n[:2] != "__" and n not in _HARMLESS), None)
        own.append(base)
    return None


def check_numbers(module: Any, *names: str) -> None:
    """Raise if one of these attributes is a tensor, which may differ by pair or be learned."""
    for name in names:
        if isinstance(getattr(module, name), Tensor):
            raise NotFusedError(f"{name} is a tensor")
