# SPDX-License-Identifier: Apache-2.0
"""A first-in-first-out queue of labelled rows, all of whose state is in ``state_dict``."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flashmetric.checks import EMBEDDING_DTYPES, check_count
from flashmetric.group_module import GroupModule
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import IGNORED

_STATE = ("embeddings", "labels", "pointer", "filled")
_FACTS = (
    "rows",
    "same number of features",
    "same dtype of embeddings",
    "same dtype of the rows held",
    "same use of enqueue_mask",
    "same training mode",
    "same size",
    "same place of the next row",
    "same number of rows held",
)


class RowQueue(GroupModule):
    """The last ``size`` rows that entered, with a label each; the base of the memory modules.

    Shapes never change and no step waits for the device: a place that holds no row carries the
    label that is in no pair. ``pointer`` is the place where the next row goes, which holds the
    oldest row once the queue is full.

    The four tensors are in ``state_dict``, and follow ``.to()`` and its like, but are no buffers:
    DistributedDataParallel overwrites the buffers of all ranks by those of rank 0 in each step.

    Args:
        size: how many rows the queue holds.
        embedding_size: D. Default: that of the first batch, or of a state that is loaded.
        dtype: what rows are kept in. Default: that of the first batch (or of a state that is
            loaded) if D comes from there too, else PyTorch's default.
        group: process group whose ranks all enter their rows; its module does that.
    """

    embeddings: Tensor
    """Rows, shape [size, D]; [size, 0] as long as D is not known."""
    labels: Tensor
    """Class of each row, int64, shape [size]; -2**63 where there is none."""
    pointer: Tensor
    """Place of the next row, int64, shape []."""
    filled: Tensor
    """How many places hold a row, int64, shape []."""

    def __init__(
        self,
        size: int,
        *,
        embedding_size: int | None = None,
        dtype: torch.dtype | None = None,
        group: "dist.ProcessGroup | None" = None,
    ) -> None:
        """Check the options and make an empty queue."""
        super().__init__()
        check_count("size", size)
        if embedding_size is not None:
            check_count("embedding_size", embedding_size)
        if dtype is not None and dtype not in EMBEDDING_DTYPES:
            raise TypeError(f"dtype must be float32, float16, bfloat16 or float64; got {dtype!r}")
        self.size = size
        self.embedding_size = embedding_size
        self.dtype = dtype
        self.group = group
        # Tensors made in inference mode could not be written to outside of it.
        with torch.inference_mode(False):
            self.embeddings = torch.zeros((size, embedding_size or 0), dtype=dtype)
            self.labels = torch.full((size,), IGNORED)
            self.pointer = torch.zeros((), dtype=torch.int64)
            self.filled = torch.zeros((), dtype=torch.int64)

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue; D, dtype and device stay."""
        self.embeddings.zero_()
        self.labels.fill_(IGNORED)
        self.pointer.zero_()
        self.filled.zero_()

    def held(self, like: Tensor) -> Tensor:
        """The rows of the queue in the dtype and on the device of ``like``; changes nothing."""
        if not self.embeddings.shape[1]:
            return like.new_zeros((self.size, like.shape[1]))
        return self.embeddings.to(like.device, like.dtype)

    def held_dtype(self, dtype: torch.dtype) -> torch.dtype:
        """What the queue keeps rows of ``dtype`` in."""
        if self.embeddings.shape[1]:
            return self.embeddings.dtype
        return dtype if self.dtype is None else self.dtype

    def check_features(self, name: str, rows: Tensor) -> None:
        """Raise unless the rows have as many features as those of the queue."""
        features = self.embeddings.shape[1]
        if features and rows.shape[1] != features:
            raise ValueError(
                f"{name} must have {features} features, as the rows of the memory have; "
                f"got shape {tuple(rows.shape)}"
            )

    def places(self, device: torch.device) -> Tensor:
        """Age order of the places, [size]: 0 is overwritten first."""
        places = torch.arange(self.size, device=device)
        return (places - self.pointer.to(device)).remainder(self.size)

    @torch.no_grad()
    def enqueue(self, rows: Tensor, labels: Tensor, mask: Tensor | None = None) -> None:
        """Append rows, oldest first, in place of the oldest ones of the queue.

        Args:
            rows: shape [N, D]. Rows of which a squared distance is not finite enter as rows without
                a label, so that one overflow does not spoil the steps to come.
            labels: class of each row, shape [N].
            mask: which rows enter, bool, shape [N]. Default: all.
        """
        self._follow(rows)
        rows = rows.to(self.embeddings.dtype)
        wide = rows.to(accumulate_dtype(rows.dtype))
        finite = (4 * wide.square().sum(1)).isfinite()
        labels = labels.masked_fill(~finite, IGNORED)
        rows = rows.masked_fill(~finite.unsqueeze(1), 0)
        count, written = len(rows), min(len(rows), self.size)
        step = torch.arange(written, device=rows.device)
        entering: Tensor | int = count
        if mask is None:
            rows, labels = rows[count - written :], labels[count - written :]
            places = (self.pointer + (count - written) + step).remainder(self.size)
        else:
            # Those that enter first, in their order; of these, the last that the queue can hold.
            # A step beyond them writes back what its place holds: shapes do not depend on the mask.
            entering = mask.sum()
            order = (~mask).long().argsort(stable=True)
            position = (entering - self.size).clamp(min=0) + step
            chosen = order[position]
            places = (self.pointer + position).remainder(self.size)
            enters = position < entering
            rows = torch.where(enters.unsqueeze(1), rows[chosen], self.embeddings[places])
            labels = torch.where(enters, labels[chosen], self.labels[places])
        self.embeddings.index_copy_(0, places, rows)
        self.labels.index_copy_(0, places, labels)
        self.pointer.add_(entering).remainder_(self.size)
        self.filled.add_(entering).clamp_(max=self.size)

    def _follow(self, rows: Tensor) -> None:
        """Be where the rows are, and take D and dtype from the first ones."""
        if not self.embeddings.shape[1]:
            self._allocate(rows.shape[1], rows.dtype, rows.device)
        if self.pointer.device != rows.device:
            with torch.inference_mode(False):
                for name in _STATE:
                    setattr(self, name, getattr(self, name).to(rows.device))

    def _allocate(self, features: int, dtype: torch.dtype, device: torch.device) -> None:
        dtype = dtype if self.dtype is None else self.dtype
        with torch.inference_mode(False):
            self.embeddings = torch.zeros((self.size, features), dtype=dtype, device=device)

    @contextmanager
    def _as_buffers(self) -> Iterator[None]:
        """The four tensors are buffers for as long as PyTorch's own code handles them."""
        self._buffers.update((name, self.__dict__.pop(name)) for name in _STATE)
        try:
            yield
        finally:
            self.__dict__.update((name, self._buffers.pop(name)) for name in _STATE)

    def named_buffers(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, Tensor]]:
        """Names and tensors of buffers; without ``recurse`` those of the state too.

        So ``torch.distributed.checkpoint`` and FSDP, which ask each module for its own, find them,
        and DistributedDataParallel, which asks the model for all, does not.
        """
        yield from super().named_buffers(prefix, recurse, remove_duplicate)
        if not recurse:
            dot = "." if prefix else ""
            yield from ((f"{prefix}{dot}{name}", getattr(self, name)) for name in _STATE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "RowQueue":
        with self._as_buffers():
            super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        return self

    def _save_to_state_dict(
        self, destination: dict[str, Any], prefix: str, keep_vars: bool
    ) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _STATE:
            value = getattr(self, name)
            destination[prefix + name] = value if keep_vars else value.detach()

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        missing = [prefix + name for name in _STATE if prefix + name not in state_dict]
        saved: list[Any] = [state_dict.get(prefix + name) for name in _STATE]
        misfit = "" if missing else self._misfit(saved)
        if missing or misfit:
            # All or nothing: rows under the labels of others are wrong without any sign of it. What
            # the queue holds stands in for the state.
            state_dict = {**state_dict, **{prefix + name: getattr(self, name) for name in _STATE}}
            error_msgs += [f"{misfit} for {prefix}embeddings; the queue is as it was"] * bool(
                misfit
            )
            missing_keys += missing if strict else []
        else:
            # With assign=True a parameter would become one of this module, and learn.
            values = (value.detach() for value in saved)
            names = (prefix + name for name in _STATE)
            state_dict = {**state_dict, **dict(zip(names, values, strict=True))}
            if self.embedding_size is None:
                # D and dtype that no argument has fixed are those of the state.
                self._allocate(saved[0].shape[1], saved[0].dtype, self.embeddings.device)
        with self._as_buffers():
            super()._load_from_state_dict(
                state_dict,
                prefix,
                local_metadata,
                strict,
                missing_keys,
                unexpected_keys,
                error_msgs,
            )

    def _misfit(self, saved: list[Any]) -> str:
        """What keeps this state from being loaded; empty if nothing does."""
        rows, *others = saved
        if not all(isinstance(value, Tensor) for value in saved):
            return "state of another kind: all values must be tensors"
        features = "D" if self.embedding_size is None else self.embedding_size
        fits = rows.ndim == 2 and features in ("D", rows.shape[1]) and len(rows) == self.size
        shapes = [tuple(value.shape) for value in saved]
        if not fits or shapes[1:] != [(self.size,), (), ()]:
            return (
                f"size mismatch: {', '.join(_STATE)} must have shapes [{self.size}, {features}], "
                f"[{self.size}], [], []; got {shapes}"
            )
        if rows.dtype not in EMBEDDING_DTYPES or {v.dtype for v in others} != {torch.int64}:
            return (
                "dtype mismatch: embeddings must be floating-point rows, and "
                f"{', '.join(_STATE[1:])} int64; got {[value.dtype for value in saved]}"
            )
        if any(value.is_meta for value in saved):
            return ""
        pointer, filled = (int(value) for value in saved[2:])
        if not (0 <= pointer < self.size and 0 <= filled <= self.size):
            return (
                f"values out of range: pointer must be from 0 to {self.size - 1} and filled from 0 "
                f"to {self.size}; got {pointer} and {filled}"
            )
        return ""

    def extra_repr(self) -> str:
        """Options, as the constructor takes them."""
        options = {"embedding_size": self.embedding_size, "dtype": self.dtype}
        shown = (f"{name}={value}" for name, value in options.items() if value is not None)
        return ", ".join((f"size={self.size}", *shown))


class Gathered:
    """The rows of all ranks in the order of ranks, each rank with any number of rows.

    Ranks agree first, and fail together. Reads numbers on the host, and so waits for the device.
    """

    def __init__(
        self, queue: RowQueue, rows: Tensor, masked: bool, check: Callable[[], Any]
    ) -> None:
        """Check the arguments of this rank by ``check``, and that those of all fit together."""
        # Not above: torch may have been built without what it imports.
        from flashmetric.distributed.agreement import GroupRanks, check_served

        group = queue.joined_group()
        facts = dict.fromkeys(_FACTS, 0)
        error: Exception | None = None
        try:
            self.checked = check()
            """What ``check`` has returned."""
            check_served(rows, group)
            values = (
                len(rows),
                rows.shape[1],
                EMBEDDING_DTYPES.index(rows.dtype),
                EMBEDDING_DTYPES.index(queue.held_dtype(rows.dtype)),
                int(masked),
                int(queue.training),
                queue.size,
                int(queue.pointer),
                int(queue.filled),
            )
            facts = dict(zip(_FACTS, values, strict=True))
        except Exception as problem:  # noqa: BLE001 - told to all ranks, raised by agree()
            error = problem
        device = rows.device if isinstance(rows, Tensor) else torch.device("cpu")
        self.ranks = GroupRanks(group, device)
        table = self.ranks.agree(type(queue).__name__, facts, error)
        self.ranks.counts = [row[0] for row in table]

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        """Values of all ranks' rows, without gradient."""
        from flashmetric.distributed.rows import gather_rows

        return gather_rows(values, self.ranks.counts, self.ranks.group, self.ranks.settle)
