# SPDX-License-Identifier: Apache-2.0
"""Labels as the trainer hands them over: of any shape and dtype, one per example."""

import warnings
from typing import Any

import torch
from torch import Tensor

from flashmetric.not_fused import callers_level

__all__ = ["class_numbers", "one_per_row", "warn_unless_binary"]


def one_per_row(loss: Any, labels: Tensor, rows: int) -> Tensor:
    """The labels [N]; raises unless there is one per row."""
    if labels.numel() != rows:
        raise ValueError(
            f"labels of {type(loss).__name__} must be {rows}, one per example; "
            f"got {labels.numel()} of shape {tuple(labels.shape)}"
        )
    return labels.reshape(-1)


def class_numbers(labels: Tensor) -> Tensor:
    """Integers that are equal where the labels are."""
    if labels.is_floating_point() or labels.is_complex():
        codes: Tensor = torch.unique(labels, return_inverse=True)[1]
        return codes
    return labels.long()


def warn_unless_binary(loss: Any, labels: Tensor, consequence: str) -> None:
    """Warn of labels that are neither 0 nor 1, looking at the first batch only, as the parent."""
    if loss._checked_labels:
        return
    loss._checked_labels = True
    if ((labels != 0) & (labels != 1)).any():
        warnings.warn(
            f"labels of {type(loss).__name__} should be 0 or 1; {consequence}",
            UserWarning,
            stacklevel=callers_level(),
        )
