# SPDX-License-Identifier: Apache-2.0
"""Losses written as a formula on pairs: the common beginning of every loss here, and of yours."""

from collections.abc import Callable

from torch import Tensor

from flashmetric.checks import check_batch, check_distance, check_indices
from flashmetric.distances import Metric
from flashmetric.functional.all_pairs import AllPairs
from flashmetric.functional.dense_pairs import DenseListedPairs, DensePairs, recorded_matrices
from flashmetric.functional.listed_pairs import ListedPairs
from flashmetric.functional.normalize import normalize_rows
from flashmetric.functional.pairs import Pairs
from flashmetric.functional.totals import current_ranks
from flashmetric.labels import Labels
from flashmetric.ops.distance import Distance, has_unit_rows


def prepare_pairs(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    *,
    distance: Distance | Metric,
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Pairs:
    """Check the tensors of a call and bring them into the form that the kernels compare."""
    check_distance(distance, normalize)
    batch = check_batch(embeddings, labels, ref_emb, ref_labels, indices_tuple)
    if indices_tuple is not None:
        indices_tuple = check_indices(indices_tuple, embeddings, ref_emb)
    x, refs = batch.embeddings, batch.ref_emb
    if normalize:
        x, refs = normalize_rows(x), None if refs is None else normalize_rows(refs)
    anchor_scale = None
    if isinstance(distance, Metric):
        x, refs = distance.rows(x), None if refs is None else distance.rows(refs)
        anchor_scale = distance.anchor_scale(x)
        name = distance.kernel
    else:
        name = distance
    if has_unit_rows(name) and not normalize:
        x, refs = normalize_rows(x), None if refs is None else normalize_rows(refs)
    matrices = recorded_matrices()
    if indices_tuple is not None:
        if matrices is None:
            return ListedPairs(x, refs, indices_tuple, name, anchor_scale)
        listed = DenseListedPairs(x, refs, indices_tuple, name, anchor_scale)
        matrices.append(listed.matrix)
        return listed
    assert batch.labels is not None
    if matrices is not None:
        dense = DensePairs(x, batch.labels, refs, batch.ref_labels, batch.rule, name, anchor_scale)
        matrices.append(dense.matrix)
        return dense
    ranks = current_ranks()
    if ranks is not None:
        return ranks.pairs(x, batch.labels, refs, batch.ref_labels, batch.rule, name, anchor_scale)
    return AllPairs(x, batch.labels, refs, batch.ref_labels, batch.rule, name, anchor_scale)


def pair_loss(
    formula: Callable[[Pairs], Tensor],
    embeddings: Tensor,
    labels: Tensor | Labels | None = None,
    *,
    distance: Distance | Metric = "euclidean",
    normalize: bool = False,
    ref_emb: Tensor | None = None,
    ref_labels: Tensor | Labels | None = None,
    indices_tuple: tuple[Tensor, ...] | None = None,
) -> Tensor:
    r"""A loss of your own on the fused kernels.

    ``formula`` gets the pairs of the batch as a :class:`Pairs` and asks it for sums, log-sum-exps,
    extremes or lists over each anchor's positives and negatives. What it makes of them is ordinary
    PyTorch on O(N) numbers, differentiated by autograd; the N x M distances are never stored.

    Args:
        formula: turns the pairs into the loss. It should return 0, attached to the graph, where
            there are no pairs; sums over nothing are 0 and log-sum-exps over nothing are -inf.
        embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64, any strides.
        labels: class of each anchor, shape [N], int64, int32 or bool, or :class:`Labels`. May be
            None with ``indices_tuple``.
        distance: a name (see :mod:`flashmetric.distances`) or a distance with parameters. Default:
            ``"euclidean"``. "cosine", "angular" and "sqrt_cosine" normalise the rows themselves.
        normalize: scale rows to unit length first. Default: False.
        ref_emb: rows to pair the anchors with, shape [M, D]. Default: the anchors, a row being no
            pair with itself. Given references exclude no pair, whatever object they are.
        ref_labels: classes of ``ref_emb``, shape [M].
        indices_tuple: pairs (a1, p, a2, n) or triplets (a, p, n) that replace the labels, from any
            miner of this package or of pytorch-metric-learning; or a miner's result of a fixed
            size, a :class:`~flashmetric.miners.TripletIndices` or
            :class:`~flashmetric.miners.PairIndices`, whose entries that are not valid contribute
            nothing. The loss then waits for no device, unless it joins pairs to triplets or counts
            the pairs of an anchor. All losses take these.

    Returns:
        What ``formula`` returns.

    Raises:
        TypeError: an argument has the wrong type or dtype.
        ValueError: an argument has the wrong shape, device or value.

    Determinism:
        Bitwise reproducible from run to run, forward and backward; with the native library for any
        number of threads. PyTorch's own exponentials, which the PyTorch implementation and listed
        pairs use, change their last bits with the number of threads.

    Precision:
        float16 and bfloat16 rows are widened once, which is exact; distances, sums and the loss are
        float32 (float64 for float64 rows), also under autocast. Gradients are rounded once, to the
        dtype of the rows: in float16 those beyond 65504, such as of ``reduction="sum"`` over many
        pairs or behind a large loss scale, become infinite, whereupon
        ``torch.amp.GradScaler`` skips the step and lowers its scale.

    Memory:
        O((N + M) D), besides what ``formula`` lists.

    Example:
        The multi-similarity loss in a few lines:

        >>> import torch
        >>> from flashmetric.functional import Logit, pair_loss
        >>> def multi_similarity(pairs):
        ...     # cosine distance d = 1 - s, so 50 (s - 0.5) = -50 d + 25
        ...     lse = pairs.logsumexp(positive=Logit(2, -1), negative=Logit(-50, 25))
        ...     pos, neg = (torch.logaddexp(x, torch.zeros_like(x)) for x in lse[:2])
        ...     return (pos / 2 + neg / 50).mean()
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0]], requires_grad=True)
        >>> pair_loss(multi_similarity, x, torch.tensor([0, 0, 1]), distance="cosine").item()
        0.649...
    """
    pairs = prepare_pairs(
        embeddings,
        labels,
        distance=distance,
        normalize=normalize,
        ref_emb=ref_emb,
        ref_labels=ref_labels,
        indices_tuple=indices_tuple,
    )
    return formula(pairs)
