# SPDX-License-Identifier: Apache-2.0
"""How much every pair of a batch weighs in the gradient of a loss."""

from collections.abc import Callable

import torch
from torch import Tensor

from flashmetric.functional.dense_pairs import dense
from flashmetric.labels import Labels


def pair_weights(
    loss: Callable[..., Tensor],
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
    signed: bool = False,
) -> Tensor:
    r"""Weights by which a loss pulls and pushes each pair: general pair weighting.

    .. math:: w_{ij} = \left\lvert \partial L / \partial d_{ij} \right\rvert

    Every loss on pairs acts on the embeddings through these weights alone; to look at them shows
    which pairs a loss learns from. For distances that are a constant minus a similarity, such as
    "cosine", they are the derivatives in the similarity too.

    Args:
        loss: a loss of this package, a :class:`PairLoss`, or a function of theirs with options
            bound. Losses per anchor are added up.
        embeddings: anchors, shape [N, D].
        labels: see :func:`pair_loss`.
        ref_emb: see there.
        ref_labels: see there.
        indices_tuple: see there. The weight of a pair that is listed repeatedly is the sum.
        signed: the derivatives themselves: above 0 for pairs that are pulled together, below 0 for
            pairs that are pushed apart. Default: False.

    Returns:
        Weights, shape [N, M], of anchor i and reference j; in a self-batch (i, j) and (j, i) are
        two pairs. float32, or float64 for float64 embeddings. No gradients. Of a loss that forms
        rows of its own, such as n-pairs, those are the rows.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value, or the loss is not one on the
            pairs of one set of rows.

    Memory:
        O(N M D): to look at a batch, not for training.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss, pair_weights
        >>> x = torch.tensor([[0.0], [0.5], [1.25]])
        >>> pair_weights(ContrastiveLoss(reduction="sum"), x, torch.tensor([0, 0, 1]))
        tensor([[0., 1., 0.],
                [1., 0., 1.],
                [0., 1., 0.]])

    Source:
        X. Wang et al.: Multi-Similarity Loss with General Pair Weighting for Deep Metric Learning,
        CVPR 2019.
    """
    options = {"ref_emb": ref_emb, "ref_labels": ref_labels, "indices_tuple": indices_tuple}
    given = {name: value for name, value in options.items() if value is not None}
    with torch.enable_grad(), dense() as matrices:
        total = loss(embeddings, labels, **given).sum()
    if len(matrices) != 1:
        raise ValueError(
            "loss must compare one set of pairs by flashmetric.functional.pair_loss, "
            f"got one that compares {len(matrices)}"
        )
    weights = torch.zeros_like(matrices[0])
    if total.requires_grad:
        grad = torch.autograd.grad(total, matrices, allow_unused=True)[0]
        weights = weights if grad is None else grad
    return weights if signed else weights.abs()
