# SPDX-License-Identifier: Apache-2.0
"""A loss over the batch of all ranks, of which each rank works on its own anchors."""

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmetric.checks import check_batch, check_flag
from flashmetric.distributed.agreement import GroupRanks
from flashmetric.distributed.rows import gather_rows, gather_with_gradient
from flashmetric.functional.totals import across
from flashmetric.labels import Labels
from flashmetric.losses.base import Loss
from flashmetric.ops.labels import words

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What these look at is not a statistic of an anchor over all references.
_NEED_ALL_ROWS = ("NPairsLoss", "AngularLoss", "QuadrupletLoss")
_BOTH_WAYS = ("ContrastiveImageTextLoss",)


class _Scale(torch.autograd.Function):
    """A number with a multiple of its gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, factor: int) -> Tensor:
        """Leave the value as it is."""
        ctx.factor = factor
        return value.clone()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        """Multiply the gradient."""
        return grad * ctx.factor, None


class _Rows(NamedTuple):
    """The references of a rank, and the labels of anchors and references by their rule."""

    refs: Tensor
    labels: Tensor
    ref_labels: Tensor
    rule: str


class GatherLoss(nn.Module):
    """A loss over the rows of all ranks; made by :func:`gather_loss` and :func:`ring_loss`."""

    def __init__(
        self, loss: Loss, group: dist.ProcessGroup | None, average: bool, ring: bool
    ) -> None:
        """Wrap a loss."""
        super().__init__()
        if not isinstance(loss, Loss):
            raise TypeError(f"loss must be a loss of flashmetric, got {type(loss).__name__}")
        check_flag("average", average)
        if type(loss).__name__ in _BOTH_WAYS:
            raise ValueError(
                f"loss must look at anchors one way; {type(loss).__name__} looks both ways"
            )
        if ring and type(loss).__name__ in _NEED_ALL_ROWS:
            raise ValueError(
                f"loss must do without all rows at once in a ring; {type(loss).__name__} does not: "
                "use gather_loss"
            )
        self.loss, self.group, self.average, self.ring = loss, group, average, ring

    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
    ) -> Tensor:
        """The loss of the batch that the rows of all ranks are, the same on every rank."""
        if getattr(self.loss, "reduction", "mean") == "none":
            raise ValueError("reduction must not be 'none' for a loss over all ranks; got 'none'")
        alone, error, rows = ref_emb is None, None, None
        try:
            rows = _checked(embeddings, labels, ref_emb, ref_labels)
        except (TypeError, ValueError) as problem:
            error = problem  # told to all ranks, raised by agree()
        ranks = GroupRanks(self.group, embeddings.device)
        counts = ranks.agree("gather_loss", self._facts(embeddings, rows, alone), error)
        assert rows is not None
        with ranks.failing_together():
            ranks.counts, ranks.one_batch = [row[0] for row in counts], alone
            refs, own, of_refs, rule = rows
            every = gather_rows(of_refs, ranks.counts, self.group)
            here = slice(ranks.begin, ranks.begin + ranks.anchors)
            if alone or labels is None:
                numbers = torch.arange(len(every), device=refs.device).unsqueeze(1)
                if labels is None:
                    own, every = numbers[here][: len(embeddings)], numbers
                else:
                    # The group of a row is its number: no row is a pair with itself.
                    own = torch.cat([own, numbers[here]], 1)
                    every, rule = torch.cat([every, numbers], 1), "group:da"
            if self.ring:
                ranks.ring_labels, every = every, every[here]
            else:
                refs = gather_with_gradient(refs, ranks.counts, self.group)
            with across(ranks):
                value: Tensor = self.loss(
                    embeddings, Labels(own, rule), None, refs, Labels(every, rule)
                )
            ranks.settle()
        if not self.average:
            return value
        scaled: Tensor = _Scale.apply(value, ranks.size)  # type: ignore[no-untyped-call]
        return scaled

    def _facts(self, embeddings: Tensor, rows: _Rows | None, alone: bool) -> dict[str, int]:
        refs, labels, rule = embeddings, embeddings.new_empty((0, 0)), ""
        if rows is not None:
            refs, labels, _, rule = rows
        features = embeddings.shape[1] if embeddings.ndim == 2 else -1
        return {
            "rows": len(refs),
            "same number of features": features,
            "same dtype of embeddings": _code(embeddings.dtype),
            "same dtype of ref_emb": _code(refs.dtype),
            "same use of ref_emb": int(alone),
            "same number of words per label": labels.shape[1],
            "same loss and kind of labels": zlib.crc32(f"{self.loss!r} {rule}".encode()),
        }


def _checked(
    embeddings: Tensor,
    labels: Tensor | Labels | None,
    ref_emb: Tensor | None,
    ref_labels: Tensor | Labels | None,
) -> _Rows:
    if labels is None and (ref_emb is None or ref_labels is not None):
        raise ValueError("labels must be given unless ref_emb comes without ref_labels; got None")
    if labels is None and ref_emb is not None:
        if len(ref_emb) != len(embeddings):
            raise ValueError(
                f"ref_emb must have as many rows as embeddings, {len(embeddings)}, without labels; "
                f"got {len(ref_emb)}"
            )
        labels = ref_labels = torch.arange(len(embeddings), device=embeddings.device)
    batch = check_batch(embeddings, labels, ref_emb, ref_labels, None)
    assert batch.labels is not None
    own = words(batch.labels)
    if ref_emb is None and (batch.rule != "equal" or own.shape[1] != 1):
        raise ValueError(
            "labels must be one class per row for a loss over the rows of all ranks, unless "
            f"ref_emb is given; got rule {batch.rule!r} and {own.shape[1]} words per row"
        )
    refs = batch.embeddings if batch.ref_emb is None else batch.ref_emb
    of_refs = own if batch.ref_labels is None else words(batch.ref_labels)
    return _Rows(refs, own, of_refs, batch.rule)


def _code(dtype: torch.dtype) -> int:
    return _DTYPES.index(dtype) if dtype in _DTYPES else -1


def gather_loss(
    loss: Loss, group: dist.ProcessGroup | None = None, *, average: bool = True
) -> GatherLoss:
    """A loss of this package over the rows of all ranks.

    Equivalent on every rank to the loss of one process on the concatenated batch, value and
    gradients, but each rank sweeps only the pairs of its own anchors::

        x = torch.cat(torch.distributed.nn.all_gather(embeddings))
        y = torch.cat(...)  # labels likewise
        loss(x, y)

    Args:
        loss: a loss module with a reduction. Its options have to be the same on all ranks.
        group: the ranks; None for all of the default group.
        average: the gradient is multiplied by the number of ranks, for DistributedDataParallel and
            FSDP, which average gradients over ranks (default). False if they are added up.

    Returns:
        A module, called as ``(embeddings, labels, ref_emb, ref_labels)`` with the rows of the
        rank. Batches may differ in size, and a rank may have no positives. A row is never a pair
        with itself: rows are told apart by their number in the whole batch. With ``ref_emb`` (a
        second tower), anchors meet the references of all ranks; without labels, row i of both
        belongs together.

    Raises:
        RankError: another rank has raised an error, or ranks disagree in the number of features,
            dtypes or the loss; on every rank.
        TypeError, ValueError: as the loss; labels of several words need ``ref_emb``.

    Determinism:
        Sums go round the ranks in an order that the group fixes. The same for the same number of
        ranks.

    Memory:
        O(N D) for the rows of all ranks, and their gradients. :func:`ring_loss` never holds them.
    """
    return GatherLoss(loss, group, average, False)


def ring_loss(
    loss: Loss, group: dist.ProcessGroup | None = None, *, average: bool = True
) -> GatherLoss:
    """:func:`gather_loss` without ever gathering the references: they go round the ranks.

    Two blocks of rows are held at a time, and the next one travels while this one is computed
    with. Backward goes round again with the finished statistics, and with the gradients of each
    block. Losses over the pairs that a choice from all rows makes (N-pairs, angular, quadruplet)
    need :func:`gather_loss`. Labels are gathered, 16 bytes a row.
    """
    return GatherLoss(loss, group, average, True)
