# SPDX-License-Identifier: Apache-2.0
"""SoftTriple loss: a softmax classifier with several learned centres per class."""

from collections.abc import Callable

from torch import Tensor

from flashmetric.checks import check_batch, check_classes, check_number, check_positive
from flashmetric.functional.anchor_reduction import reduce_anchors
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.softmax_rows import Reduction, check_reduction
from flashmetric.labels import Labels
from flashmetric.ops import ClassCrossEntropy
from flashmetric.ops.labels import IGNORED
from flashmetric.ops.ordered_sum import ordered_sum

_class_cross_entropy: Callable[..., Tensor] = ClassCrossEntropy.apply


def soft_triple_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    centers: Tensor,
    la: float = 20.0,
    gamma: float = 0.1,
    margin: float = 0.01,
    tau: float = 0.2,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""SoftTriple loss: cross-entropy of a row's similarity to classes of several centres.

    Equivalent to, without the N x C x K products::

        x = torch.nn.functional.normalize(embeddings)
        w = torch.nn.functional.normalize(centers, dim=2)
        s = torch.einsum("nd,ckd->nck", x, w)
        of_class = ((s / gamma).softmax(2) * s).sum(2)
        own = torch.nn.functional.one_hot(labels, len(w))
        loss = torch.nn.functional.cross_entropy(la * (of_class - margin * own), labels)
        t, u = torch.triu_indices(K, K, 1)
        spread = (2 + 1e-5 - 2 * (w[:, t] * w[:, u]).sum(2)).sqrt().sum()
        loss = loss + tau * spread / (C * K * (K - 1))

    .. math::
        \ell_i = -\log \frac{e^{\lambda (S_{i y_i} - \delta)}}
            {e^{\lambda (S_{i y_i} - \delta)} + \sum_{c \ne y_i} e^{\lambda S_{ic}}}, \qquad
        S_{ic} = \sum_k \frac{e^{s_{ick} / \gamma}}{\sum_l e^{s_{icl} / \gamma}} s_{ick}

    Args:
        embeddings: rows, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each row, from 0 to C - 1, shape [N], int64, int32 or bool, or what
            :func:`flashmetric.labels.ignoring` returns.
        centers: shape [C, K, D]; learned. K centres of the same direction count as one.
        la: scale of the logits, above 0. Default: 20.
        gamma: temperature of the softmax over the centres of a class, above 0. Default: 0.1.
        margin: what the similarity to the own class is reduced by. Default: 0.01.
        tau: weight of the regulariser, which draws the centres of a class together. Default: 0.2.
        reduction: ``"mean"`` (default) over the rows with a class, ``"sum"``, or ``"none"``: the
            loss of each row without the regulariser.
        ref_emb: must be None, as for the next two: rows are compared with centres.
        ref_labels: None.
        indices_tuple: None.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Without rows it is the regulariser.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value; labels on the CPU are checked
            to be classes.

    Determinism:
        Bitwise reproducible, on the CPU for any number of threads.

    Memory:
        O((N + C K) D) besides a slab of products, which backward computes again.

    Example:
        >>> import torch
        >>> from flashmetric.functional import soft_triple_loss
        >>> x, centers = torch.eye(2, requires_grad=True), torch.eye(2).unsqueeze(1)
        >>> loss = soft_triple_loss(x, torch.arange(2), centers=centers, la=1.0, margin=0.0)
        >>> loss.item()  # log(1 + 1 / e)
        0.3132...

    Source:
        Q. Qian et al.: SoftTriple Loss: Deep Metric Learning Without Triplet Sampling, ICCV 2019;
        the small number in the root is that of the authors' code.
    """
    check_soft_triple_options(centers, la, gamma, margin, tau, reduction)
    if ref_emb is not None or ref_labels is not None or indices_tuple is not None:
        raise ValueError(
            "ref_emb, ref_labels and indices_tuple must be None: rows are compared with centers"
        )
    batch = check_batch(embeddings, labels, None, None, None)
    _check_classes(batch.labels, batch.rule, embeddings, centers)
    classes, per_class, features = centers.shape
    x = normalize_rows(embeddings)
    w = normalize_rows(centers.reshape(-1, features)).to(x.dtype).view(centers.shape)
    assert batch.labels is not None
    rows = _class_cross_entropy(x, w, batch.labels, float(la), 1 / gamma, float(margin))
    value = reduce_anchors(rows, batch.labels != IGNORED, reduction)
    if reduction == "none" or tau == 0 or per_class == 1 or classes == 0:
        return value
    return value + tau * _spread(w) / (classes * per_class * (per_class - 1))


def check_soft_triple_options(
    centers: Tensor, la: float, gamma: float, margin: float, tau: float, reduction: str
) -> None:
    """Raise unless the options of :func:`soft_triple_loss` are valid."""
    if not isinstance(centers, Tensor) or not centers.is_floating_point():
        raise TypeError("centers must be a floating-point tensor")
    if centers.ndim != 3:
        raise ValueError(
            f"centers must have shape [classes, centres, features], got {tuple(centers.shape)}"
        )
    check_positive("la", la)
    check_positive("gamma", gamma)
    check_number("margin", margin)
    check_number("tau", tau)
    check_reduction(reduction)


def _check_classes(labels: Tensor | None, rule: str, embeddings: Tensor, centers: Tensor) -> None:
    if centers.shape[2] != embeddings.shape[1]:
        raise ValueError(
            f"centers must have as many features as embeddings, {embeddings.shape[1]}; "
            f"got shape {tuple(centers.shape)}"
        )
    if centers.device != embeddings.device:
        raise ValueError(
            f"centers must have the device of embeddings, {embeddings.device}; got {centers.device}"
        )
    if labels is None or rule != "equal" or labels.ndim != 1:
        raise ValueError("labels must be the number of one class per row")
    check_classes(labels, centers.shape[0])


def _spread(w: Tensor) -> Tensor:
    """Sum of the distances of all pairs of centres of a class, [C, K, D] -> []."""
    total = w.new_zeros(())
    # Products by element, a few at a time: autocast would round a matrix product.
    for k in range(w.shape[1] - 1):
        cosine = (w[:, k : k + 1] * w[:, k + 1 :]).sum(2)
        total = total + ordered_sum((2 + 1e-5 - 2 * cosine).sqrt().flatten())
    return total
