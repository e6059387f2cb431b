# SPDX-License-Identifier: Apache-2.0
"""Cross-batch memory: a loss of the batch against the rows of earlier batches."""

from typing import Literal, NamedTuple, get_args

import torch
import torch.distributed as dist
from torch import Tensor

from flashmetric.checks import check_batch, check_choice, check_flag
from flashmetric.indices import PairIndices
from flashmetric.labels import Labels
from flashmetric.losses.base import Loss
from flashmetric.losses.softmax import NPairsLoss
from flashmetric.miners.base import Miner
from flashmetric.ops.labels import IGNORED, class_members
from flashmetric.row_queue import Gathered, RowQueue

Compare = Literal["queue", "batch+memory", "memory"]

# Positives are rows of the class other than the anchor itself, negatives any of another class.
_NOT_ITSELF = "group:da"
_FROM_MEMORY = -1


class _Entering(NamedTuple):
    """The rows of the batch, of all ranks under ``group``."""

    rows: Tensor
    words: Tensor
    """Class of each row, int64 [N]."""
    mask: Tensor | None
    """Which of them enter the memory."""
    first: int
    """Where the rows of this rank begin."""


class CrossBatchMemory(RowQueue):
    r"""A loss whose references are the rows of the last batches, at O((N + size) D) memory.

    Equivalent to, without any list or matrix of pairs::

        queue, queue_labels = torch.cat((queue, x.detach()))[-size:], ...  # first in, first out
        pairs = all (i, j) but where queue[j] is row i of the batch itself
        loss = loss_fn(x, labels, pairs, ref_emb=queue, ref_labels=queue_labels)

    .. math::
        L = \ell\bigl(\{(x_i, q_j)\}\bigr), \qquad
        \frac{\partial L}{\partial q_j} = 0

    The rows of the memory are constants. What the rows of the batch are paired with is a choice:

    ================== ============================================ ===========================
    ``compare``        references                                   of batch b, in a full queue
    ================== ============================================ ===========================
    ``"queue"``        the queue once the batch has entered         batch b, size - N older rows
    ``"batch+memory"`` the batch, and the queue before it enters    batch b, size older rows
    ``"memory"``       the queue before the batch enters            size older rows
    ================== ============================================ ===========================

    The default is pytorch-metric-learning's definition, in value and gradient. A row is no pair
    with itself by an explicit rule: rows of the batch are numbered, and positives are rows of the
    same class and another number.

    Args:
        loss: any loss of :mod:`flashmetric.losses` that takes class labels and ``ref_emb``. That of
            N-pairs, one pair per class, takes the first positive of the first anchor that has one;
            the angular loss is taken without its N-pairs part.
        size: how many rows the memory holds.
        miner: one of :mod:`flashmetric.miners`, which chooses from the same pairs. Default: the
            loss takes them all, or does its own mining.
        compare: what the batch is paired with, see above. Default: ``"queue"``.
        batch_gradient: whether the rows of the batch have a gradient as references too, as they
            have in the loss of the batch alone; those of other ranks have none. Default: False, as
            in the paper and in pytorch-metric-learning: only the anchor of a pair learns.
        fixed_size: ask the miner for its result of a fixed size, so that it does not wait for the
            device either. Default: False.
        embedding_size: D. Default: that of the first batch, or of a state that is loaded. Give it
            where the first call is compiled or captured.
        dtype: what the memory keeps rows in; they are rounded when they enter, and compared in the
            dtype of the batch. Default: the dtype of the first batch (or of a state that is loaded)
            if D comes from there too, else PyTorch's default.
        group: process group of which every rank's rows enter, in the order of ranks, so that all
            queues stay equal. Each rank gets the loss of its own rows against those of all ranks.
            Numbers of rows may differ; reading them waits for the device. A state has to be loaded
            on every rank. Default: this rank only, under DistributedDataParallel too.

    Shape:
        See :meth:`forward`. Tensors ``embeddings`` [size, D], ``labels`` [size], ``pointer`` []
        and ``filled`` [] are in ``state_dict``: loading restores the memory exactly, into a module
        that has seen no batch too, on any device. A state that does not fit leaves it as it was.
        They are no buffers, which DistributedDataParallel would overwrite by those of rank 0.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: an argument has the wrong value.

    Differences from pytorch-metric-learning:
        Its miners see the row itself among the positives, and such pairs are taken out afterwards;
        here they never are a choice. In eval mode nothing enters. A batch may be larger than the
        memory, of which it leaves its last rows. Pointer and fill state are in ``state_dict``.

    Ties, precision and determinism as for the loss. Writing to the queue names no place twice, and
    is deterministic.

    Memory:
        O((N + size) D): the queue, and a copy of it with the batch in each step. With
        ``batch_gradient`` the backward computes the gradient of all references, and drops those of
        the memory.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss, CrossBatchMemory
        >>> loss = CrossBatchMemory(ContrastiveLoss(), size=4)
        >>> loss(torch.tensor([[0.0], [9.0]]), torch.tensor([0, 1])).item()
        0.0
        >>> loss(torch.tensor([[0.5], [7.0]]), torch.tensor([0, 1])).item()  # as batch 1 had 0, 9
        1.25
        >>> loss.labels.tolist(), loss.pointer.item(), loss.filled.item()
        ([0, 1, 0, 1], 0, 4)

    Source:
        X. Wang et al.: Cross-Batch Memory for Embedding Learning, CVPR 2020.
    """

    def __init__(
        self,
        loss: Loss,
        size: int,
        *,
        miner: Miner | None = None,
        compare: Compare = "queue",
        batch_gradient: bool = False,
        fixed_size: bool = False,
        embedding_size: int | None = None,
        dtype: torch.dtype | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Check the options and make an empty memory."""
        super().__init__(size, embedding_size=embedding_size, dtype=dtype, group=group)
        if not isinstance(loss, Loss):
            kind = f"{type(loss).__module__}.{type(loss).__qualname__}"
            raise TypeError(
                f"loss must be a loss of flashmetric itself, got {kind}; those of flashmetric.pml "
                "have a CrossBatchMemory there"
            )
        if miner is not None and not isinstance(miner, Miner):
            raise TypeError(f"miner must be a miner of flashmetric, got {type(miner).__name__}")
        check_choice("compare", compare, get_args(Compare))
        check_flag("batch_gradient", batch_gradient)
        check_flag("fixed_size", fixed_size)
        self.loss = loss
        self.miner = miner
        self.compare = compare
        self.batch_gradient = batch_gradient
        self.fixed_size = fixed_size

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels,
        indices_tuple: tuple[Tensor, ...] | None = None,
        enqueue_mask: Tensor | None = None,
    ) -> Tensor:
        """The loss of the batch against the memory; afterwards the batch enters it.

        A call that raises leaves the memory as it was.

        Args:
            embeddings: anchors, shape [N, D], float32, float16, bfloat16 or float64. A row of which
                a squared distance overflows makes this loss NaN, and enters without a label.
            labels: class of each anchor, shape [N]; or :func:`flashmetric.labels.ignoring` of
                those, of which the ignored take places in the memory without being compared.
            indices_tuple: pairs or triplets in place of all of them and of the miner's. Positives
                and negatives are numbers of references: 0 to N - 1 are the rows of the batch, so
                that a miner's result on the batch alone fits; N + k is place k of the queue. Under
                ``group`` the rows of all ranks, in the order of ranks, come before the queue.
            enqueue_mask: which rows enter the memory, bool, shape [N]. As in
                pytorch-metric-learning the others are the anchors, and those that enter the
                references of the batch. Default: all rows are anchors, and enter.

        Returns:
            What the loss returns.

        Raises:
            TypeError: an argument has the wrong type or dtype.
            ValueError: an argument has the wrong shape, device or value; ``enqueue_mask`` comes
                with ``indices_tuple``; or labels are of several classes per row or have groups.
            RankError: under ``group``, another rank has raised an error in this call, or ranks
                differ in features, dtypes, training mode or the state of their queues.
        """
        mask = enqueue_mask
        if self.group is None:
            words = self._check(embeddings, labels, indices_tuple, mask)
            entering = _Entering(embeddings.detach(), words, mask, 0)
            value = self._value(embeddings, words, indices_tuple, mask, entering)
        else:
            gathered = Gathered(
                self,
                embeddings,
                mask is not None,
                lambda: self._check(embeddings, labels, indices_tuple, mask),
            )
            with gathered.ranks.failing_together():
                words = gathered.checked
                entering = _Entering(
                    gathered(embeddings.detach()),
                    gathered(words),
                    None if mask is None else gathered(mask.byte()).bool(),
                    gathered.ranks.begin,
                )
                value = self._value(embeddings, words, indices_tuple, mask, entering)
        if self.training:
            self.enqueue(entering.rows, entering.words, entering.mask)
        return value

    def _value(
        self,
        embeddings: Tensor,
        words: Tensor,
        indices_tuple: tuple[Tensor, ...] | None,
        enqueue_mask: Tensor | None,
        entering: _Entering,
    ) -> Tensor:
        anchors = words if enqueue_mask is None else words.masked_fill(enqueue_mask, IGNORED)
        rows, classes, mask, first = entering
        refs = rows
        if self.batch_gradient:
            refs = torch.cat((rows[:first], embeddings, rows[first + len(embeddings) :]))
        refs = torch.cat((refs, self.held(rows)))
        numbers = torch.arange(len(rows), device=rows.device)
        own = numbers[first : first + len(embeddings)]
        ids = torch.nn.functional.pad(numbers, (0, self.size), value=_FROM_MEMORY)
        compared = self._compared(classes, mask)
        of_anchors = Labels(torch.stack((anchors, own), 1), _NOT_ITSELF)
        of_refs = Labels(torch.stack((compared, ids), 1), _NOT_ITSELF)
        if indices_tuple is None and self.miner is not None:
            indices_tuple = self.miner(
                embeddings, of_anchors, refs, of_refs, fixed_size=self.fixed_size
            )
        elif indices_tuple is None and isinstance(self.loss, NPairsLoss):
            indices_tuple = _first_positives(anchors, own, compared)
        if indices_tuple is None:
            value: Tensor = self.loss(embeddings, of_anchors, None, refs, of_refs)
        else:
            # The pairs say it: of the labels only the classes matter.
            value = self.loss(embeddings, anchors, indices_tuple, refs, compared)
        return value

    def _compared(self, words: Tensor, mask: Tensor | None) -> Tensor:
        """Labels of the batch and of the queue, where references that do not count have none."""
        memory = self.labels.to(words.device)
        if mask is not None:
            words = words.masked_fill(~mask, IGNORED)
        if self.compare == "memory":
            return torch.cat((torch.full_like(words, IGNORED), memory))
        if self.compare == "batch+memory":
            return torch.cat((words, memory))
        # Of the rows that enter, those that stay; of the queue, those that they do not overwrite.
        count: Tensor | int = len(words)
        position = torch.arange(len(words), device=words.device)
        if mask is not None:
            count, position = mask.sum(), mask.cumsum(0) - 1
        words = words.masked_fill(position < count - self.size, IGNORED)
        return torch.cat((words, memory.masked_fill(self.places(words.device) < count, IGNORED)))

    def _check(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels,
        indices_tuple: tuple[Tensor, ...] | None,
        mask: Tensor | None,
    ) -> Tensor:
        """One class per row, int64 [N]."""
        batch = check_batch(embeddings, labels, None, None, None)
        words = batch.labels
        assert words is not None
        self.check_features("embeddings", embeddings)
        if batch.rule != "equal" or words.ndim > 1:
            raise ValueError(
                "labels must be one class per row: a memory keeps no others, nor tells a row from "
                f"itself by them; got rule {batch.rule!r} on {words[0:1].numel()} word(s)"
            )
        if mask is None:
            return words
        if indices_tuple is not None:
            raise ValueError("enqueue_mask must be None with indices_tuple; got both")
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool:
            raise TypeError("enqueue_mask must be a bool tensor")
        if mask.shape != words.shape or mask.device != words.device:
            raise ValueError(
                f"enqueue_mask must have shape {tuple(words.shape)} and be on {words.device}; "
                f"got {tuple(mask.shape)} on {mask.device}"
            )
        return words

    def extra_repr(self) -> str:
        """Options, as the constructor takes them."""
        options = {"compare": "queue", "batch_gradient": False, "fixed_size": False}
        shown = (
            f"{name}={getattr(self, name)!r}"
            for name, default in options.items()
            if getattr(self, name) != default
        )
        return ", ".join((super().extra_repr(), *shown))


def _first_positives(anchors: Tensor, own: Tensor, refs: Tensor) -> PairIndices:
    """For each anchor the first reference of its class but itself; no negatives."""
    members = class_members(anchors, refs, 2)
    chosen = torch.where(members[:, 0] == own, members[:, 1], members[:, 0])
    rows, none = torch.arange(len(anchors), device=anchors.device), anchors[:0]
    return PairIndices(rows, chosen, none, none, chosen >= 0, none.bool())
