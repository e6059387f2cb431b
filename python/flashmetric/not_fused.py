# SPDX-License-Identifier: Apache-2.0
"""How the user of a drop-in class learns that a call went to the parent's own code."""

import sys
import warnings
from typing import Any

__all__ = ["NotFusedError", "NotFusedWarning", "callers_level", "report"]

# Packages between the code that uses a class and the warning.
_INSIDE = frozenset(
    {
        "accelerate",
        "flashmetric",
        "lightning",
        "pytorch_lightning",
        "pytorch_metric_learning",
        "sentence_transformers",
        "torch",
        "transformers",
    }
)


class NotFusedError(Exception):
    """The kernels cannot compute this call; says why, in words that end a sentence."""


class NotFusedWarning(UserWarning):
    """A drop-in class left a call to the code of the package whose place it takes."""


def report(module: Any, peer: str, reason: NotFusedError) -> None:
    """Warn that ``module`` leaves a call to ``peer``, the first time it does."""
    if getattr(module, "_fallback_reported", False):
        return
    module._fallback_reported = True
    warnings.warn(
        f"{type(module).__name__} is computed by {peer} itself: {reason}",
        NotFusedWarning,
        stacklevel=callers_level(),
    )


def callers_level() -> int:
    """Stack level, as seen by the caller of this, of the code that uses the class."""
    level, frame = 1, sys._getframe(1)
    while frame.f_back is not None:
        if frame.f_globals.get("__name__", "").partition(".")[0] not in _INSIDE:
            break
        level, frame = level + 1, frame.f_back
    return level
