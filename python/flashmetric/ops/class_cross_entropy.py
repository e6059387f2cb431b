# SPDX-License-Identifier: Apache-2.0
"""Cross-entropy of rows over classes of several centres each, in slabs of classes."""

from typing import Any

import torch
from torch import Tensor

from flashmetric._library import library
from flashmetric.ops.distance import full_precision, slabs
from flashmetric.ops.first_order import first_order_only
from flashmetric.ops.labels import IGNORED
from flashmetric.ops.ordered_sum import add_product

# Ops, so that a compiled graph holds for any number of rows: how many slabs there are depends on
# it, and a compiler unrolls their loop.
_GIVEN = "Tensor x, Tensor centers, Tensor labels, float la, float inverse, float margin"
library.define(f"class_cross_entropy({_GIVEN}) -> (Tensor loss, Tensor lse)")
library.define(
    f"class_cross_entropy_backward(Tensor grad, Tensor lse, {_GIVEN})"
    " -> (Tensor grad_x, Tensor grad_centers)"
)


def _products(x: Tensor, w: Tensor, inverse: float) -> tuple[Tensor, Tensor, Tensor]:
    """Products [N, c, K] with the centres of some classes, their softmax, and its mean [N, c]."""
    s = x.new_zeros((x.shape[0], w.shape[0] * w.shape[1]))
    s = add_product(s, x, w.flatten(0, 1).T).unflatten(1, w.shape[:2])
    share = (s * inverse).softmax(2)
    return s, share, (share * s).sum(2)


def _logits(
    similarity: Tensor, labels: Tensor, begin: int, la: float, margin: float
) -> tuple[Tensor, Tensor]:
    """Logits [N, c] of the classes from ``begin`` on, and which are those of the own class."""
    numbers = torch.arange(begin, begin + similarity.shape[1], device=labels.device)
    own = labels.unsqueeze(1) == numbers
    return la * torch.where(own, similarity - margin, similarity), own


@full_precision
def class_cross_entropy_fallback(
    x: Tensor, centers: Tensor, labels: Tensor, la: float, inverse: float, margin: float
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::class_cross_entropy``.

    Args:
        x: unit rows, [N, D].
        centers: unit rows of their dtype, [C, K, D].
        labels: class of each row, int64 [N].
        la: scale of the logits.
        inverse: one over the temperature of the softmax over a class's centres.
        margin: what the similarity to the own class is reduced by.

    Returns:
        Cross-entropy [N], 0 for ignored rows, and the log-sum-exp of the logits [N].
    """
    lse, own_logit = x.new_full(labels.shape, -torch.inf), x.new_zeros(labels.shape)
    for part in slabs(centers.shape[0], x.shape[0] * centers.shape[1]):
        similarity = _products(x, centers[part], inverse)[2]
        logits, own = _logits(similarity, labels, part.start, la, margin)
        lse = torch.logaddexp(lse, logits.logsumexp(1))
        own_logit += logits.where(own, 0).sum(1)
    return (lse - own_logit).masked_fill(labels == IGNORED, 0), lse


@full_precision
def class_cross_entropy_backward_fallback(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    centers: Tensor,
    labels: Tensor,
    la: float,
    inverse: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    """PyTorch implementation of ``flashmetric::class_cross_entropy_backward``.

    Returns:
        Gradients of ``(grad * loss).sum()`` in rows and centres, from the same products once more.
    """
    grad_x, grad_w = (
        torch.zeros_like(side, memory_format=torch.contiguous_format) for side in (x, centers)
    )
    factor = (la * grad).masked_fill(labels == IGNORED, 0).unsqueeze(1)
    for part in slabs(centers.shape[0], x.shape[0] * centers.shape[1]):
        s, share, similarity = _products(x, centers[part], inverse)
        logits, own = _logits(similarity, labels, part.start, la, margin)
        slope = ((logits - lse.unsqueeze(1)).exp() - own.to(x.dtype)) * factor
        # The mean changes with a product by its share, and as the shares move.
        slope = share * (1 + inverse * (s - similarity.unsqueeze(2))) * slope.unsqueeze(2)
        slope = slope.flatten(1)
        add_product(grad_x, slope, centers[part].flatten(0, 1))
        add_product(grad_w[part].flatten(0, 1), slope.T, x)
    return grad_x, grad_w


library.impl("class_cross_entropy", class_cross_entropy_fallback, "CompositeExplicitAutograd")
library.impl(
    "class_cross_entropy_backward",
    class_cross_entropy_backward_fallback,
    "CompositeExplicitAutograd",
)
class_cross_entropy = torch.ops.flashmetric.class_cross_entropy.default
class_cross_entropy_backward = torch.ops.flashmetric.class_cross_entropy_backward.default


@torch.library.register_fake("flashmetric::class_cross_entropy", lib=library)
def _class_cross_entropy_fake(
    x: Tensor, centers: Tensor, labels: Tensor, la: float, inverse: float, margin: float
) -> tuple[Tensor, Tensor]:
    return x.new_empty(labels.shape), x.new_empty(labels.shape)


@torch.library.register_fake("flashmetric::class_cross_entropy_backward", lib=library)
def _class_cross_entropy_backward_fake(
    grad: Tensor,
    lse: Tensor,
    x: Tensor,
    centers: Tensor,
    labels: Tensor,
    la: float,
    inverse: float,
    margin: float,
) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), centers.new_empty(centers.shape)


class ClassCrossEntropy(torch.autograd.Function):
    """Differentiable ``flashmetric::class_cross_entropy``, with the arguments of that op."""

    @staticmethod
    def forward(ctx: Any, *args: Any) -> Tensor:
        """Cross-entropy of every row; saves the arguments and a number per row."""
        x, centers, labels, *ctx.options = args
        loss: Tensor
        loss, lse = class_cross_entropy(*args)
        ctx.save_for_backward(lse, x, centers, labels)
        return loss

    @staticmethod
    @first_order_only
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Compute the products again and weigh rows and centres by them."""
        grad_x, grad_centers = class_cross_entropy_backward(grad, *ctx.saved_tensors, *ctx.options)
        return grad_x, grad_centers, None, None, None, None
