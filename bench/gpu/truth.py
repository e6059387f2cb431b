# SPDX-License-Identifier: Apache-2.0
"""The float64 truth at full size, over chunks of rows so that no N x N matrix is stored.

``bench.gate`` judges contenders on a small batch by coordinate differences; this form uses inner
products, which in float64 are exact enough, and tells whether a contender is still right at the
size at which it is timed.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

CHUNK_ELEMENTS = 2**25


@dataclass(frozen=True)
class Truth:
    """What a contender must return.

    Attributes:
        result: The loss, or the selected distances [2, N].
        grad_norm: Norm of the gradient; None for the bare selection.
        active: Share of triplets, or of negative pairs, with a loss above zero.
    """

    result: Tensor
    grad_norm: float | None
    active: float


def blocks(x: Tensor, labels: Tensor) -> Iterator[tuple[slice, Tensor, Tensor, Tensor]]:
    """Yields rows, their squared distances to all rows, same-class mask and own-row mask."""
    n = len(x)
    norms = (x * x).sum(1)
    step = max(1, CHUNK_ELEMENTS // max(n, 1))
    columns = torch.arange(n, device=x.device)
    for start in range(0, n, step):
        rows = slice(start, min(start + step, n))
        squared = torch.addmm(norms[rows, None] + norms, x[rows], x.T, alpha=-2).clamp_min_(0)
        yield rows, squared, labels[rows, None] == labels, columns[rows, None] == columns


def mined(x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Rows of the hardest positive and of the hardest negative."""
    positive, negative = labels.new_empty(len(x)), labels.new_empty(len(x))
    for rows, squared, same, own in blocks(x, labels):
        positive[rows] = squared.masked_fill(~same | own, -torch.inf).argmax(1)
        negative[rows] = squared.masked_fill(same, torch.inf).argmin(1)
    return positive, negative


def triplet_truth(x: Tensor, labels: Tensor, margin: float, only_select: bool) -> Truth:
    """Truth of the batch-hard loss, or of the selection alone."""
    positive, negative = mined(x, labels)
    to_positive, to_negative = x - x[positive], x - x[negative]
    d_pos, d_neg = to_positive.norm(dim=1), to_negative.norm(dim=1)
    violation = d_pos - d_neg + margin
    active = violation > 0
    share = float(active.double().mean())
    if only_select:
        return Truth(torch.stack((d_pos, d_neg)), None, share)
    weight = active.to(x.dtype)[:, None] / len(x)
    pull = weight * to_positive / d_pos[:, None].clamp_min(1e-300)
    push = weight * to_negative / d_neg[:, None].clamp_min(1e-300)
    grad = (pull - push).index_add_(0, positive, -pull).index_add_(0, negative, push)
    return Truth(violation.relu().mean(), float(grad.norm()), share)


def contrastive_truth(x: Tensor, labels: Tensor, margin: float) -> Truth:
    """Truth of the contrastive loss: mean of active positives plus mean of active negatives."""
    sums, counts = x.new_zeros(2), x.new_zeros(2)
    grads = x.new_zeros(2, *x.shape)
    negatives = 0
    for rows, squared, same, own in blocks(x, labels):
        distance = squared.masked_fill_(own, 1.0).sqrt_()
        pull = distance.masked_fill(~same | own, 0.0)
        push = (margin - distance).relu_().masked_fill_(same, 0.0)
        negatives += int((~same).sum())
        for kind, (terms, sign) in enumerate(((pull, 1.0), (push, -1.0))):
            sums[kind] += terms.sum()
            counts[kind] += (terms > 0).sum()
            weight = (terms > 0) * (sign / distance)
            # Each unordered pair occurs twice, once from either side.
            grads[kind, rows] = 2 * (weight.sum(1, keepdim=True) * x[rows] - weight @ x)
    share = float(counts[1]) / max(negatives, 1)
    counts.clamp_min_(1)
    grad = grads[0] / counts[0] + grads[1] / counts[1]
    return Truth((sums / counts).sum(), float(grad.norm()), share)


def full_truth(kernel: str, x: Tensor, labels: Tensor, margin: float) -> Truth:
    """Computes what a kernel must return for these rows, in float64.

    Args:
        kernel: ``"hardest"``, ``"triplet"`` or ``"contrastive"``.
        x: Embeddings as the contenders see them, [N, D].
        labels: Classes, [N].
        margin: Margin of the loss.

    Returns:
        The truth, on the device of the rows.
    """
    x = x.detach().double()
    if kernel == "contrastive":
        return contrastive_truth(x, labels, margin)
    return triplet_truth(x, labels, margin, kernel == "hardest")
