# SPDX-License-Identifier: Apache-2.0
"""A loss over the batch of all ranks, of which each rank works on its own anchors."""

import zlib
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from flashmetric.checks import check_batch, check_flag
from flashmetric.distributed.agreement import GroupRanks, check_served
from flashmetric.distributed.rows import gather_rows, gather_with_gradient
from flashmetric.functional.totals import across
from flashmetric.group_module import GroupModule
from flashmetric.labels import Labels
from flashmetric.losses.base import Loss
from flashmetric.losses.pair_loss import PairLoss
from flashmetric.losses.soft_triple import SoftTripletLoss
from flashmetric.losses.softmax import ContrastiveImageTextLoss
from flashmetric.miners.base import Miner
from flashmetric.ops.labels import words

_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)
# What these look at is not a statistic of an anchor over all references: they choose among the
# anchors of all ranks, which a rank has only where they are the references.
_CHOOSE_FROM_ALL = ("NPairsLoss", "QuadrupletLoss")
_NEED_ALL_ROWS = ("NPairsLoss", "AngularLoss", "QuadrupletLoss")


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


class GatherLoss(GroupModule):
    """A loss over the rows of all ranks; made by :func:`gather_loss` and :func:`ring_loss`."""

    def __init__(
        self,
        loss: Loss,
        group: dist.ProcessGroup | None,
        average: bool,
        ring: bool,
        miner: Miner | None = None,
    ) -> None:
        """Wrap a loss."""
        super().__init__()
        _check_loss(loss)
        if getattr(loss, "reduction", "mean") == "none":
            raise ValueError("reduction must not be 'none' for a loss over all ranks; got 'none'")
        check_flag("average", average)
        if miner is not None and not isinstance(miner, Miner):
            raise TypeError(f"miner must be a miner of flashmetric, got {type(miner).__name__}")
        if miner is not None and type(loss).__name__ in _CHOOSE_FROM_ALL:
            raise ValueError(
                f"miner must be None for {type(loss).__name__}, which chooses among the anchors of "
                "all ranks itself"
            )
        if ring and (type(loss).__name__ in _NEED_ALL_ROWS or getattr(loss, "swap", False)):
            raise ValueError(
                f"loss must do without all rows at once in a ring; {loss!r} does not: "
                "use gather_loss"
            )
        self.loss, self.miner = loss, miner
        self.group, self.average, self.ring = group, average, ring

    # A compiler would not see that totals are those of all ranks, and take the own ones.
    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def forward(
        self,
        embeddings: Tensor,
        labels: Tensor | Labels | None = None,
        ref_emb: Tensor | None = None,
        ref_labels: Tensor | Labels | None = None,
    ) -> Tensor:
        """The loss of the batch that the rows of all ranks are, the same on every rank."""
        group, alone, error, rows = self.joined_group(), ref_emb is None, None, None
        try:
            rows = _checked(embeddings, labels, ref_emb, ref_labels)
            self._check_served(rows, alone)
        except Exception as problem:  # noqa: BLE001 - told to all ranks, raised by agree()
            error = problem
        device = embeddings.device if isinstance(embeddings, Tensor) else torch.device("cpu")
        ranks = GroupRanks(group, device)
        facts = self._facts(embeddings, rows, alone, labels is not None)
        counts = ranks.agree("gather_loss", facts, error)
        assert rows is not None
        with ranks.failing_together():
            ranks.counts, ranks.one_batch = [row[0] for row in counts], alone
            refs, own, of_refs, rule = rows
            every = gather_rows(of_refs, ranks.counts, group, ranks.settle)
            here = slice(ranks.begin, ranks.begin + ranks.anchors)
            numbers = torch.arange(len(every), device=refs.device).unsqueeze(1)
            if labels is None:
                own, every = numbers[here][: len(embeddings)], numbers
            classes = Labels(own, rule), Labels(every, rule)
            if alone:
                # The group of a row is its number: no row is a pair with itself.
                own = torch.cat([own, numbers[here]], 1)
                every, rule = torch.cat([every, numbers], 1), "group:da"
            if self.ring:
                ranks.ring_labels, every = every, every[here]
            else:
                refs = gather_with_gradient(refs, ranks.counts, group, ranks.settle)
            given, chosen = (Labels(own, rule), Labels(every, rule)), None
            if self.miner is not None:
                chosen = self.miner(embeddings, given[0], refs, given[1])
                # The pairs tell a row from itself: losses that ask for one class see no more.
                given = classes
            # Also a loss that was compiled by itself.
            with across(ranks), torch.compiler.set_stance("force_eager"):
                value: Tensor = self.loss(embeddings, given[0], chosen, refs, given[1])
            if self.average:
                value = _Scale.apply(value, ranks.size)  # type: ignore[no-untyped-call]
        return value

    def _check_served(self, rows: _Rows, alone: bool) -> None:
        """Raise unless this loss and group can do with these rows."""
        check_served(rows.refs, self.group)
        if not alone and type(self.loss).__name__ in _CHOOSE_FROM_ALL:
            raise ValueError(
                f"ref_emb must be None for {type(self.loss).__name__} over all ranks, which "
                f"chooses among the anchors of all; got shape {tuple(rows.refs.shape)}"
            )
        if alone and _has_numbers_per_class(self.loss):
            raise ValueError(
                f"loss must not have a margin or beta per class without ref_emb; got {self.loss!r}"
            )
        one_class = rows.rule == "equal" and rows.labels.shape[1] == 1
        out = isinstance(self.loss, ContrastiveImageTextLoss) and self.loss.form == "out"
        if self.ring and out and not one_class:
            raise ValueError(
                "labels must be one class per row for ContrastiveImageTextLoss of form 'out' in a "
                "ring: use form 'in' or gather_loss"
            )

    def _facts(
        self, embeddings: Tensor, rows: _Rows | None, alone: bool, labelled: bool
    ) -> dict[str, int]:
        """What the ranks compare; of a rank with an error nobody reads it."""
        names = (
            "rows",
            "same number of features",
            "same dtype of embeddings",
            "same type of device",
            "same use of ref_emb",
            "same use of labels",
            "same form (0 gather_loss, 1 ring_loss)",
            "same average",
            "same need of gradients (requires_grad of rows and of each parameter, no_grad)",
            "same number of words per label",
            "same loss and kind of labels",
        )
        if rows is None:
            return dict.fromkeys(names, 0)
        learned = (*self.loss.parameters(), *self.loss.buffers())
        grads = [t.requires_grad for t in (embeddings, rows.refs, *learned)]
        options = f"{self.loss!r} {self.miner!r} {rows.rule}"
        values = (
            len(rows.refs),
            embeddings.shape[1],
            _DTYPES.index(embeddings.dtype),
            zlib.crc32(rows.refs.device.type.encode()),
            int(alone),
            int(labelled),
            int(self.ring),
            int(self.average),
            zlib.crc32(bytes(grads)) if torch.is_grad_enabled() and any(grads) else 0,
            rows.labels.shape[1],
            zlib.crc32(options.encode()),
        )
        return dict(zip(names, values, strict=True))


def _check_loss(loss: object) -> None:
    kind = type(loss)
    name = f"{kind.__module__}.{kind.__qualname__}"
    if not isinstance(loss, Loss) or not kind.__module__.startswith("flashmetric."):
        raise TypeError(f"loss must be a loss of flashmetric itself, got {name}")
    if isinstance(loss, PairLoss):
        raise TypeError(
            "loss must be a loss of flashmetric other than PairLoss, whose formula sees the "
            "anchors of one rank only"
        )
    if isinstance(loss, SoftTripletLoss):
        raise TypeError(
            "loss must compare rows with rows; SoftTripletLoss has centres of its own: use it "
            "as it is on each rank"
        )


def _has_numbers_per_class(loss: Loss) -> bool:
    scalar = {"margin": 1, "beta": 0}
    values = ((getattr(loss, name, None), most) for name, most in scalar.items())
    return any(isinstance(value, Tensor) and value.ndim > most for value, most in values)


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


def gather_loss(
    loss: Loss,
    group: dist.ProcessGroup | None = None,
    *,
    average: bool = True,
    miner: Miner | None = None,
) -> GatherLoss:
    """A loss of this package over the rows of all ranks.

    Equivalent on every rank to the loss of one process on the concatenated batch, value and
    gradients, but each rank sweeps only the pairs of its own anchors::

        x = torch.cat(torch.distributed.nn.all_gather(embeddings))
        y = torch.cat(...)  # labels likewise
        loss(x, y)

    Args:
        loss: a loss module of this package with a reduction, but no :class:`~flashmetric.PairLoss`
            and no :class:`~flashmetric.SoftTripletLoss`. Its options have to be the same on all
            ranks. A margin or beta per class needs ``ref_emb``; N-pairs and quadruplets, which
            choose among the anchors of all ranks, take none.
        group: the ranks; None for all of the default group.
        average: the gradient is multiplied by the number of ranks, for DistributedDataParallel and
            FSDP2, which average gradients over ranks (default). False if they are added up. This
            goes for parameters of the loss, such as a learned temperature, too: wrap the result in
            DistributedDataParallel, or average their gradients after backward.
        miner: one of :mod:`flashmetric.miners`: each rank chooses, for its own anchors, from the
            rows of all ranks. Not for N-pairs and quadruplets. Default: the loss takes all pairs,
            or does its own mining.

    Returns:
        A module, called as ``(embeddings, labels, ref_emb, ref_labels)`` with the rows of the
        rank. Batches may differ in size, and a rank may have no positives. A row is never a pair
        with itself: rows are told apart by their number in the whole batch. With ``ref_emb`` (a
        second tower), anchors meet the references of all ranks; without labels, row i of both
        belongs together.

    Raises:
        RankError: another rank has raised an error in this call, or ranks disagree in the number of
            features, dtypes, device type, use of labels and references, label rule, need of
            gradients, ``average``, or the loss, its form and its options; on every rank.
            What happens outside of this call, in the encoder or in ``backward()``, is not told:
            the others wait until that process ends, or for the timeout of the group.
        TypeError, ValueError: as the loss; labels of several words need ``ref_emb``.

    Compilation:
        ``torch.compile`` leaves the call out of its graphs; the rest of a step may be compiled.

    Determinism:
        Sums go round the ranks in an order that the group fixes. The same for the same number of
        ranks.

    Memory:
        O(N D) for the rows of all ranks, and their gradients. :func:`ring_loss` never holds them.
    """
    return GatherLoss(loss, group, average, False, miner)


def ring_loss(
    loss: Loss, group: dist.ProcessGroup | None = None, *, average: bool = True
) -> GatherLoss:
    """:func:`gather_loss` without ever gathering the references: they go round the ranks.

    Two blocks of rows are held at a time, and the next one travels while this one is computed
    with. Backward goes round again with the finished statistics, and with the gradients of each
    block. Losses over the pairs that a choice from all rows makes (N-pairs, angular, quadruplet),
    ``swap=True``, and miners, need :func:`gather_loss`. Labels are gathered, 16 bytes a row.
    """
    return GatherLoss(loss, group, average, True)
