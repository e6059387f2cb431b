# SPDX-License-Identifier: Apache-2.0
"""A sum whose rounding does not depend on the number of threads."""

import torch
from torch import Tensor

# Below torch's threshold for splitting one sum among threads, also for two rows at once.
_RUN = 4096


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, in runs of a fixed length.

    ``torch.sum`` of a long vector gives each thread a part, so that the last bits of a loss would
    change with the number of cores.
    """
    while x.shape[-1] > _RUN:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN)).sum(-1)
    return x.sum(-1)
