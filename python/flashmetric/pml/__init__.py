# SPDX-License-Identifier: Apache-2.0
"""Drop-in for pytorch-metric-learning: the same classes, computed by the fused kernels.

Change the import, nothing else::

    from flashmetric.pml import losses, miners, distances, reducers

Every class is that of pytorch-metric-learning or a subclass of the same name, with its arguments,
defaults, attributes and call. What the kernels cannot compute, such as a custom distance, is left
to the parent's own code; a warning, once per object, says why. Other modules (``samplers``,
``trainers``, ``testers``, ...) can be imported from here and are the parent's.

Its definitions rule here, also where the rest of this package differs: a batch is compared with
itself, each row being no pair with itself, if and only if labels and reference labels are the same
object. DESIGN.md says what remains different.
"""

import importlib
import importlib.util
from typing import Any

if importlib.util.find_spec("pytorch_metric_learning") is None:
    raise ImportError(
        "flashmetric.pml needs pytorch-metric-learning, which is not installed; "
        "install it with: python -m pip install 'flashmetric[pml]'"
    )

from flashmetric.pml import distances, losses, miners, reducers

__all__ = ["distances", "losses", "miners", "reducers"]

_AS_THEY_ARE = ("datasets", "regularizers", "samplers", "testers", "trainers", "utils")


def __getattr__(name: str) -> Any:
    """Modules that need no kernels, imported when asked for: some need further packages."""
    if name in _AS_THEY_ARE:
        return importlib.import_module(f"pytorch_metric_learning.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
