# SPDX-License-Identifier: Apache-2.0
"""Supervised contrastive loss."""

from torch import Tensor

from flashmetric.checks import check_choice, check_distance
from flashmetric.distances import Metric
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit, Parameter
from flashmetric.functional.softmax_rows import (
    FORM,
    Form,
    Reduction,
    check_reduction,
    check_temperature,
    inverse_of,
    shares_of_all,
)
from flashmetric.functional.totals import count_of
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance


def sup_con_loss(
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    temperature: Parameter = 0.1,
    form: Form = "out",
    distance: Distance | Metric = "cosine",
    normalize: bool = False,
    reduction: Reduction = "mean",
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""Supervised contrastive loss: every positive against all other rows, averaged by anchor.

    Equivalent to, without the N x N matrices::

        x = torch.nn.functional.normalize(embeddings)
        s = (x @ x.T / temperature).masked_fill(torch.eye(len(x)).bool(), -torch.inf)
        positive = (labels[:, None] == labels) & ~torch.eye(len(x)).bool()
        share = s.log_softmax(1).where(positive, 0).sum(1) / positive.sum(1)
        loss = -share[positive.any(1)].mean()

    .. math::
        \ell_i^{\text{out}} = -\frac{1}{|P_i|} \sum_{p \in P_i}
            \log \frac{e^{s_{ip} / T}}{\sum_{k \ne i} e^{s_{ik} / T}}, \qquad
        \ell_i^{\text{in}} = -\log \frac{1}{|P_i|} \sum_{p \in P_i}
            \frac{e^{s_{ip} / T}}{\sum_{k \ne i} e^{s_{ik} / T}}

    Args:
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        temperature: T, above 0; a tensor of shape [] gets a gradient. Where it is learned, learn
            its logarithm: :class:`~flashmetric.losses.LearnedTemperature`. Default: 0.1.
        form: ``"out"`` (default), the mean over positives outside of the logarithm, or ``"in"``,
            inside of it, which needs half the sweeps.
        distance: the similarity s is minus the distance (with ``"cosine"``, the default, up to a
            constant that cancels).
        normalize: scale rows to unit length first. Default: False.
        reduction: ``"mean"`` (default) over the anchors with a positive, ``"sum"`` or ``"none"``.
        ref_emb: rows to pair the anchors with, shape [M, D]. Default: the anchors.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels. Repeated
            pairs count repeatedly.

    Returns:
        A scalar; with ``reduction="none"`` shape [N]. Anchors without positives are left out;
        without any, the loss is 0 and back-propagates zeros. An anchor without negatives still
        spreads its softmax over its positives.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Ties, determinism, precision and memory as for :func:`pair_loss`.

    Example:
        >>> import torch
        >>> from flashmetric.functional import sup_con_loss
        >>> x = torch.tensor([[1.0, 0.0], [1.0, 0.0], [0.0, 1.0]], requires_grad=True)
        >>> sup_con_loss(x, torch.tensor([0, 0, 1]), temperature=1.0).item()  # log(1 + 1 / e)
        0.3132...

    Source:
        P. Khosla et al.: Supervised Contrastive Learning, NeurIPS 2020.
    """
    check_sup_con_options(temperature, form, distance, normalize, reduction)
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    scale = inverse_of(temperature)
    lse = pairs.logsumexp(Logit(-scale), Logit(-scale))
    value, counted = shares_of_all(pairs, lse, scale, form, reduction)
    return value / count_of(counted).clamp(min=1) if reduction == "mean" else value


def check_sup_con_options(
    temperature: Parameter, form: str, distance: str | Metric, normalize: bool, reduction: str
) -> None:
    """Raise unless the options of :func:`sup_con_loss` are valid."""
    check_temperature(temperature)
    check_choice("form", form, FORM)
    check_distance(distance, normalize)
    check_reduction(reduction)
