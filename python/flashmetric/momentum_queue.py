# SPDX-License-Identifier: Apache-2.0
"""Momentum contrast: a key encoder that follows slowly, and a queue of its keys as negatives."""

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmetric.checks import check_flag, check_number, check_rows
from flashmetric.distances import Metric
from flashmetric.functional.anchor_reduction import reduce_anchors
from flashmetric.functional.pair_loss import prepare_pairs
from flashmetric.functional.pairs import Logit
from flashmetric.functional.softmax_rows import Reduction, inverse_of, negative_log_share
from flashmetric.labels import Labels
from flashmetric.losses.softmax import InfoNCELoss
from flashmetric.losses.temperature import LearnedTemperature
from flashmetric.ops.distance import Distance
from flashmetric.ops.labels import IGNORED
from flashmetric.row_queue import Gathered, RowQueue

_OF_BATCH, _OF_QUEUE = 0, 1


class MomentumQueue(RowQueue):
    r"""InfoNCE of queries and keys with a queue of earlier keys as negatives (MoCo).

    Equivalent to, without the N x size matrix::

        q, k = F.normalize(queries), F.normalize(keys.detach())
        logits = torch.cat(((q * k).sum(1, keepdim=True), q @ F.normalize(queue).T), 1)
        loss = F.cross_entropy(logits / temperature, torch.zeros(len(q), dtype=torch.int64))
        queue = torch.cat((queue, k))[-size:]  # first in, first out

    .. math::
        \ell_i = -\log \frac{e^{s(q_i, k_i) / T}}{e^{s(q_i, k_i) / T} + \sum_j e^{s(q_i, m_j) / T}},
        \qquad \theta_k \leftarrow m\, \theta_k + (1 - m)\, \theta_q

    Keys are constants. Every key of the queue is a negative, as in the paper, also one of the same
    image. The first loss is 0, since there are no negatives yet, unless ``batch_negatives``.

    Args:
        size: how many keys the queue holds.
        temperature: T, what similarities are divided by; a :class:`LearnedTemperature` is learned.
        momentum: m of :meth:`update`, from 0 to 1. Default: 0.999.
        batch_negatives: whether the other keys of the batch are negatives too. Default: False.
        distance: a name or a distance with parameters; similarities are minus the distance.
        normalize: scale rows to unit length first. "cosine", the default, does so itself.
        reduction: ``"mean"``, ``"sum"`` or ``"none"``.
        embedding_size: D. Default: that of the first batch, or of a state that is loaded.
        dtype: what the queue keeps keys in; see :class:`CrossBatchMemory`.
        group: process group of which every rank's keys enter, in the order of ranks, so that all
            queues stay equal. Numbers of keys may differ; reading them waits for the device. A
            state has to be loaded on every rank. Default: this rank only.

    Shape:
        See :meth:`forward`. Tensors ``embeddings`` [size, D], ``labels`` [size] (0, or -2**63 where
        there is no key), ``pointer`` [] and ``filled`` [] are in ``state_dict``, but are no
        buffers, which DistributedDataParallel would overwrite by those of rank 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value.

    Ties, precision and determinism as for :func:`flashmetric.functional.info_nce_loss`.

    Memory:
        O((N + size) D): the queue, and a copy of it with the batch's keys in each step.

    Example:
        >>> import torch
        >>> from flashmetric import MomentumQueue
        >>> loss = MomentumQueue(4, temperature=1.0)
        >>> x = torch.eye(2)
        >>> loss(x, x).item()  # no negatives yet
        0.0
        >>> loss(x, x).item()  # log((e + e + 1) / e)
        0.8619...

    Source:
        K. He et al.: Momentum Contrast for Unsupervised Visual Representation Learning, CVPR 2020.
    """

    def __init__(
        self,
        size: int,
        *,
        temperature: float | Tensor | LearnedTemperature = 0.07,
        momentum: float = 0.999,
        batch_negatives: bool = False,
        distance: Distance | Metric = "cosine",
        normalize: bool = False,
        reduction: Reduction = "mean",
        embedding_size: int | None = None,
        dtype: torch.dtype | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Check the options and make an empty queue."""
        super().__init__(size, embedding_size=embedding_size, dtype=dtype, group=group)
        _check_momentum(momentum)
        check_flag("batch_negatives", batch_negatives)
        self.loss = InfoNCELoss(
            temperature, distance=distance, normalize=normalize, reduction=reduction
        )
        self.momentum = momentum
        self.batch_negatives = batch_negatives

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        """The loss of the batch; afterwards its keys enter the queue, in training mode.

        A call that raises leaves the queue as it was.

        Args:
            queries: shape [N, D], float32, float16, bfloat16 or float64.
            keys: the other views, row i that of query i, shape [N, D]; no gradient goes there.
                A key of which a squared distance overflows makes this loss NaN, and no other.

        Returns:
            A scalar; with ``reduction="none"`` shape [N].

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape, device or dtype.
            RankError: under ``group`` in training mode, another rank has raised an error in this
                call, or ranks differ in features, dtypes or the state of their queues.
        """
        if self.group is None or not self.training:
            self._check(queries, keys)
            entering = keys.detach()
            value = self._value(queries, entering)
        else:
            gathered = Gathered(self, keys, False, lambda: self._check(queries, keys))
            with gathered.ranks.failing_together():
                # First: nobody waits for the keys of a rank whose loss has failed.
                entering = gathered(keys.detach())
                value = self._value(queries, keys.detach())
        if self.training:
            labels = torch.zeros(len(entering), dtype=torch.int64, device=entering.device)
            self.enqueue(entering, labels)
        return value

    def _check(self, queries: Tensor, keys: Tensor) -> None:
        check_rows("queries", queries)
        check_rows("keys", keys)
        if keys.shape != queries.shape:
            raise ValueError(
                f"keys must have the shape of queries, {tuple(queries.shape)}; "
                f"got {tuple(keys.shape)}"
            )
        for what in ("dtype", "device"):
            expected, got = getattr(queries, what), getattr(keys, what)
            if got != expected:
                raise ValueError(f"keys must have the {what} of queries, {expected}; got {got}")
        self.check_features("queries", queries)

    def _value(self, queries: Tensor, keys: Tensor) -> Tensor:
        numbers = torch.arange(len(keys), device=keys.device)
        # Negatives are of the other group: not the other keys of the batch, unless any are taken.
        rule = "group:aa" if self.batch_negatives else "group:ad"
        filled = self.labels.to(keys.device)
        classes = torch.cat((numbers, filled.masked_fill(filled != IGNORED, -1)))
        groups = torch.full_like(classes, _OF_QUEUE)
        groups[: len(keys)] = _OF_BATCH
        of_queries = torch.stack((numbers, torch.full_like(numbers, _OF_BATCH)), 1)
        options = self.loss._arguments()
        pairs = prepare_pairs(
            queries,
            Labels(of_queries, rule),
            distance=options["distance"],
            normalize=options["normalize"],
            ref_emb=torch.cat((keys, self.held(keys))),
            ref_labels=Labels(torch.stack((classes, groups), 1), rule),
            indices_tuple=None,
        )
        # The log-sum-exp over one positive is its logit: a single sweep finds everything.
        logit = Logit(-inverse_of(options["temperature"]))
        rows, counted = negative_log_share(pairs.logsumexp(logit, logit))
        return reduce_anchors(rows, counted, options["reduction"])

    @torch.no_grad()
    def update(
        self, query_encoder: nn.Module, key_encoder: nn.Module, momentum: float | None = None
    ) -> None:
        """Let the key encoder follow: m times its parameters plus 1 - m times the query encoder's.

        Buffers, such as running statistics, stay as they are: each encoder has its own. Start with
        ``key_encoder = copy.deepcopy(query_encoder).requires_grad_(False)``; with ``.float()`` if
        the query encoder is in half precision, in which steps of 1 - m are lost to rounding.

        Args:
            query_encoder: the encoder that learns; wrapped for many processes or not.
            key_encoder: the one that follows, with the same parameters, in float32 or float64.
            momentum: m of this step, for schedules. Default: that of the constructor.

        Raises:
            TypeError: ``momentum`` is no number, or the key encoder is in half precision and m
                neither 0 nor 1.
            ValueError: ``momentum`` is not from 0 to 1, or the parameters differ in number, shape
                or device. The key encoder is then as it was.
        """
        momentum = self.momentum if momentum is None else momentum
        _check_momentum(momentum)
        new = [parameter.detach() for parameter in query_encoder.parameters()]
        old = [parameter.detach() for parameter in key_encoder.parameters()]
        if [(p.shape, p.device) for p in new] != [(p.shape, p.device) for p in old]:
            raise ValueError(
                "key_encoder must have the parameters of query_encoder, in number, shape and "
                "device; got others"
            )
        half = [p.dtype for p in old if p.dtype in (torch.float16, torch.bfloat16)]
        if half and 0 < momentum < 1:
            raise TypeError(
                f"key_encoder must be in float32 or float64, got {half[0]}, which is too coarse to "
                "follow slowly: keep key_encoder.float(), whatever query_encoder is in"
            )
        if [p.dtype for p in new] == [p.dtype for p in old]:
            if old:
                torch._foreach_lerp_(old, new, 1 - momentum)
            return
        for followed, following in zip(new, old, strict=True):
            # One at a time, which is all that is ever held twice.
            following.lerp_(followed.to(following.dtype), 1 - momentum)

    def extra_repr(self) -> str:
        """Options, as the constructor takes them."""
        shown = [super().extra_repr(), f"momentum={self.momentum}"]
        return ", ".join(shown + ["batch_negatives=True"] * self.batch_negatives)


def _check_momentum(momentum: object) -> None:
    check_number("momentum", momentum)
    if not 0 <= momentum <= 1:  # type: ignore[operator]
        raise ValueError(f"momentum must be from 0 to 1, got {momentum}")
