# SPDX-License-Identifier: Apache-2.0
"""When a call goes to the parent's own code, and how its user learns of it."""

from typing import Any

from torch import Tensor

from flashmetric import not_fused
from flashmetric.checks import check_rows
from flashmetric.not_fused import NotFusedError, NotFusedWarning

__all__ = ["NotFusedError", "NotFusedWarning", "check_fused_rows", "report"]


def report(loss: Any, reason: NotFusedError) -> None:
    """Warn that a loss falls back, the first time it does."""
    not_fused.report(loss, "sentence-transformers", reason)


def check_fused_rows(*columns: Tensor) -> None:
    """Raise unless the kernels take these embeddings, of one dtype and device."""
    for rows in columns:
        try:
            check_rows("the embeddings", rows)
        except (TypeError, ValueError) as error:
            raise NotFusedError(str(error)) from None
        if rows.dtype != columns[0].dtype or rows.device != columns[0].device:
            raise NotFusedError("the columns differ in dtype or device")
        if rows.shape[1] != columns[0].shape[1]:
            raise NotFusedError("the columns differ in the number of features")
