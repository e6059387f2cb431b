# SPDX-License-Identifier: Apache-2.0
"""The losses as functions: what they compute, checked and differentiable."""

from flashmetric.functional.contrastive import contrastive_loss
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.triplet import triplet_margin_loss

__all__ = ["contrastive_loss", "normalize_rows", "triplet_margin_loss"]
