# SPDX-License-Identifier: Apache-2.0
"""Drop-in for pytorch-metric-learning: the same classes, computed by the fused kernels.

Change the import, nothing else::

    from flashmetric.pml import losses, miners, distances, reducers

Every class is that of pytorch-metric-learning or a subclass of the same name, with its arguments,
defaults, attributes and call. What the kernels cannot compute, such as a custom distance, is left
to the parent's own code; a warning, once per object, says why.

Its definitions rule here, also where the rest of this package differs: a batch is compared with
itself, each row being no pair with itself, if and only if labels and reference labels are the same
object. DESIGN.md says what remains different.
"""

import importlib.util

if importlib.util.find_spec("pytorch_metric_learning") is None:
    raise ImportError(
        "flashmetric.pml needs pytorch-metric-learning, which is not installed; "
        "install it with: python -m pip install 'flashmetric[pml]'"
    )

from flashmetric.pml import distances, losses, miners, reducers

__all__ = ["distances", "losses", "miners", "reducers"]
