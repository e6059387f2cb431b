# SPDX-License-Identifier: Apache-2.0
"""torch's switch for the precision of float32 products, for native code to ask for."""

import torch

from flashmetric._library import library

library.define("_float32_is_exact() -> bool")


def _float32_is_exact() -> bool:
    """Whether float32 products keep the accuracy of float32.

    An op, because the library's stable interface to torch does not show the switch, and because an
    argument of the other ops would be frozen into compiled graphs.
    """
    # The newer of torch's two switches shows what the older one chose, too; the older one raises
    # once the newer has been used.
    return str(torch.backends.cuda.matmul.fp32_precision) in ("ieee", "none")


library.impl("_float32_is_exact", _float32_is_exact, "CompositeExplicitAutograd")
