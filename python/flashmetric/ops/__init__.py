# SPDX-License-Identifier: Apache-2.0
"""Raw ops ``torch.ops.flashmetric.*`` and the autograd functions around them.

Every op has its schema, its PyTorch implementation for any device and its shape rule here, in
Python; the native library adds faster implementations for some devices. The ops check only what
memory safety needs: :mod:`flashmetric.functional` is the interface for users.
"""

import flashmetric.ops.matmul_precision  # noqa: F401  defines an op
import flashmetric.ops.nearest_beyond  # noqa: F401  defines an op
import flashmetric.ops.row_top_k  # noqa: F401  defines an op
from flashmetric.ops.class_cross_entropy import ClassCrossEntropy
from flashmetric.ops.hardest import Hardest
from flashmetric.ops.hardest_triplets import HardestTriplets
from flashmetric.ops.pair_distance import PairDistance
from flashmetric.ops.row_lse import RowLse
from flashmetric.ops.row_sum import RowSum, RowTotal
from flashmetric.ops.threshold_sum import ThresholdSum

__all__ = [
    "ClassCrossEntropy",
    "Hardest",
    "HardestTriplets",
    "PairDistance",
    "RowLse",
    "RowSum",
    "RowTotal",
    "ThresholdSum",
]
