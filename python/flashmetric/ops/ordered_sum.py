# SPDX-License-Identifier: Apache-2.0
"""Sums and products whose rounding does not depend on the number of threads."""

import torch
from torch import Tensor

# Below torch's threshold for splitting one sum among threads, also for two rows at once.
_RUN = 4096

# MKL splits the inner dimension of a product among threads from about 1000 on.
_INNER = 512


def ordered_sum(x: Tensor) -> Tensor:
    """Sum over the last dimension, in runs of a fixed length.

    ``torch.sum`` of a long vector gives each thread a part, so that the last bits of a loss would
    change with the number of cores.
    """
    while x.shape[-1] > _RUN:
        x = torch.nn.functional.pad(x, (0, -x.shape[-1] % _RUN)).unflatten(-1, (-1, _RUN)).sum(-1)
    return x.sum(-1)


def add_product(out: Tensor, a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Add the matrix product alpha a b to ``out``, on the CPU in runs of the inner dimension."""
    if out.device.type != "cpu":
        return out.addmm_(a, b, alpha=alpha)
    for begin in range(0, a.shape[1], _INNER):
        run = slice(begin, begin + _INNER)
        out.addmm_(a[:, run], b[run], alpha=alpha)
    return out
