# SPDX-License-Identifier: Apache-2.0
"""A first-in-first-out queue of labelled rows, all of whose state is in ``state_dict``."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from flashmetric.checks import EMBEDDING_DTYPES, check_count
from flashmetric.ops.distance import accumulate_dtype
from flashmetric.ops.labels import IGNORED


class RowQueue(nn.Module):
    """The last ``size`` rows that entered, with a label each; the base of the memory modules.

    Shapes never change and no step waits for the device: a place that holds no row carries the
    label that is in no pair. ``pointer`` is the place where the next row goes, which holds the
    oldest row once the queue is full.

    Args:
        size: how many rows the queue holds.
        embedding_size: D. Default: that of the first batch, or of a state that is loaded.
        dtype: what rows are kept in. Default: that of the first batch (or of a state that is
            loaded) if D comes from there too, else PyTorch's default.
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
        self, size: int, *, embedding_size: int | None = None, dtype: torch.dtype | None = None
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
        rows = torch.zeros((size, embedding_size or 0), dtype=dtype)
        self.register_buffer("embeddings", rows)
        self.register_buffer("labels", torch.full((size,), IGNORED))
        self.register_buffer("pointer", torch.zeros((), dtype=torch.int64))
        self.register_buffer("filled", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def reset(self) -> None:
        """Empty the queue; D, dtype and device stay."""
        self.embeddings.zero_()
        self.labels.fill_(IGNORED)
        self.pointer.zero_()
        self.filled.zero_()

    def held(self, like: Tensor) -> Tensor:
        """The rows of the queue in the dtype and on the device of ``like``; changes nothing."""
        features, rows = like.shape[1], self.embeddings
        if not rows.shape[1]:
            return like.new_zeros((self.size, features))
        if rows.shape[1] != features:
            raise ValueError(
                f"embeddings must have {rows.shape[1]} features, as the rows of the memory have; "
                f"got shape {tuple(like.shape)}"
            )
        return rows.to(like.device, like.dtype)

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
            dtype = rows.dtype if self.dtype is None else self.dtype
            self.embeddings = rows.new_zeros((self.size, rows.shape[1]), dtype=dtype)
        if self.pointer.device != rows.device:
            for name in ("embeddings", "labels", "pointer", "filled"):
                setattr(self, name, getattr(self, name).to(rows.device))

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        saved = state_dict.get(f"{prefix}embeddings")
        # D and dtype that no argument has fixed are those of the state.
        if self.embedding_size is None and isinstance(saved, Tensor) and saved.ndim == 2:
            dtype = saved.dtype if self.dtype is None else self.dtype
            shape = (self.size, saved.shape[1])
            self.embeddings = torch.zeros(shape, dtype=dtype, device=self.embeddings.device)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)

    def extra_repr(self) -> str:
        """Options, as the constructor takes them."""
        options = {"embedding_size": self.embedding_size, "dtype": self.dtype}
        shown = (f"{name}={value}" for name, value in options.items() if value is not None)
        return ", ".join((f"size={self.size}", *shown))


class Gathered:
    """The rows of all ranks in the order of ranks, each rank with any number of rows.

    Reads the numbers of rows on the host, and so waits for the device.
    """

    def __init__(self, count: int, device: torch.device, group: "dist.ProcessGroup") -> None:
        """Exchange how many rows each rank has."""
        self.group = group
        mine = torch.tensor([count], device=device)
        counts = [torch.zeros_like(mine) for _ in range(dist.get_world_size(group))]
        dist.all_gather(counts, mine, group=group)
        self.counts = [int(other) for other in counts]
        self.first = sum(self.counts[: dist.get_rank(group)])
        """Where this rank's rows begin."""

    @torch.no_grad()
    def __call__(self, values: Tensor) -> Tensor:
        """Values of all ranks' rows, without gradient."""
        # Not above: torch may have been built without what it imports.
        from flashmetric.distributed.rows import gather_rows

        return gather_rows(values, self.counts, self.group)
