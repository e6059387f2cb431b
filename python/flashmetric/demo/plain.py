# SPDX-License-Identifier: Apache-2.0
"""The two losses as they are usually written in PyTorch: a matrix of all distances, and masks.

They define the same values as :class:`flashmetric.TripletMarginLoss` and
:class:`flashmetric.ContrastiveLoss` with the job's settings and stand beside them in its timing.
"""

import torch
from torch import Tensor


def triplet_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Batch-hard triplet margin loss, mean over anchors that have a positive and a negative."""
    distance = torch.cdist(embeddings, embeddings)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    hardest_positive = distance.masked_fill(~positive, -torch.inf).max(1).values
    hardest_negative = distance.masked_fill(same, torch.inf).min(1).values
    valid = positive.any(1) & ~same.all(1)
    return (hardest_positive - hardest_negative + margin)[valid].relu().mean()


def contrastive_loss(embeddings: Tensor, labels: Tensor, margin: float) -> Tensor:
    """Contrastive loss over all pairs, each kind averaged over its pairs with a loss above 0."""
    distance = torch.cdist(embeddings, embeddings)
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    positive = same & ~torch.eye(len(labels), dtype=torch.bool)
    pull = distance * positive
    push = (margin - distance).relu() * ~same
    return pull.sum() / (pull > 0).sum().clamp(min=1) + push.sum() / (push > 0).sum().clamp(min=1)
