# SPDX-License-Identifier: Apache-2.0
"""Deep metric learning losses for PyTorch whose memory does not grow with the square of the batch.

``TripletMarginLoss`` and ``ContrastiveLoss`` are modules; :mod:`flashmetric.functional` has the
same losses as functions, and :mod:`flashmetric.reference` as textbook formulas to compare with.
"""

from flashmetric import _library, functional, ops, reference
from flashmetric.losses import ContrastiveLoss, TripletMarginLoss

__version__ = "0.1.0"
__all__ = ["ContrastiveLoss", "TripletMarginLoss", "functional", "ops", "reference"]

# The ops are defined by now; the library adds implementations to them.
_library.load_native()
