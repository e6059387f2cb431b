# SPDX-License-Identifier: Apache-2.0
"""Losses over the rows of all ranks of a process group."""

from flashmetric.distributed.agreement import RankError
from flashmetric.distributed.gather import GatherLoss, gather_loss, ring_loss

__all__ = ["GatherLoss", "RankError", "gather_loss", "ring_loss"]
