# SPDX-License-Identifier: Apache-2.0
"""Large batches through an encoder whose activations fit for a chunk only (GradCache)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import get_device_states, set_device_states

from flashmetric.checks import check_count

Encoder = Callable[..., Any]
Backward = Callable[[Tensor], object]


def grad_cache(
    encoders: Encoder | Sequence[Encoder],
    loss: Callable[..., Tensor],
    *inputs: Any,
    chunk_size: int | Sequence[int],
    select: Callable[[Any], Tensor] | None = None,
    backward: Backward | None = None,
    **loss_arguments: Any,
) -> Tensor:
    r"""Gradients of a loss of the whole batch, with the activations of one chunk at a time.

    Equivalent to, up to rounding::

        value = loss(encoder(inputs), **loss_arguments)
        value.backward()

    .. math::
        \frac{\partial L}{\partial \theta} = \sum_{\text{chunks } c}
        \frac{\partial L}{\partial x_c}\, \frac{\partial x_c}{\partial \theta}

    All chunks are encoded without a graph, the loss of all embeddings gives the gradient of each,
    and each chunk is encoded once more, now with a graph, to take its gradient further. That is one
    more forward than usual, and exact: the loss sees the whole batch.

    The second forward repeats the first. Random numbers of the CPU and of the devices are set back
    for each chunk, so dropout drops the same, and go on afterwards from where the first left them.
    Buffers, such as running statistics, are set back too, and are updated once per chunk. Layers
    that look at other rows, such as batch normalisation in training mode, see those of the chunk.

    Args:
        encoders: a module, or several (two towers), one per input; the same one may come twice.
            Frozen ones are run once.
        loss: takes one embedding tensor per encoder, and ``loss_arguments``: any loss of
            :mod:`flashmetric`, :class:`~flashmetric.CrossBatchMemory`, or a function. Its own
            parameters get gradients too. It is called once.
        *inputs: what each encoder takes, all rows of the batch: a tensor, a mapping, which becomes
            keyword arguments, or a tuple or list of arguments. Tensors in it are cut along their
            first dimension, others go to every chunk.
        chunk_size: rows per chunk, for all encoders or for each.
        select: finds the embeddings [rows, D] in what an encoder returns. Default: it returns them.
        backward: called with the loss in place of its ``backward()``, such as
            ``lambda value: scaler.scale(value).backward()`` or ``accelerator.backward``.
        **loss_arguments: what else the loss takes, such as ``labels``.

    Returns:
        The loss, detached. Gradients are accumulated in ``.grad``. Where gradients are off, only
        the loss is computed.

    Raises:
        TypeError: an argument has the wrong type, or an encoder returns no tensor.
        ValueError: there are not as many inputs or chunk sizes as encoders; an input holds no
            tensor, or tensors of different lengths; or an encoder does not return a row per row.

    Mixed precision:
        Call it inside ``torch.autocast`` as the model itself; backward passes run outside, as
        PyTorch recommends. With a ``GradScaler`` see ``backward``.

    Many processes:
        Modules with ``no_sync()`` (DDP, FSDP) or ``set_requires_gradient_sync()`` (FSDP2)
        communicate at their last chunk only. Every rank needs the same number of encoders, not of
        chunks, unless the module itself communicates in its forward. The loss sees the rows of
        this rank, unless it gathers.

    Determinism:
        As the encoder's. Gradients of chunks are added in order.

    Memory:
        Activations of one chunk, and O(N D) for embeddings and their gradients.

    Example:
        >>> import torch
        >>> from flashmetric import ContrastiveLoss, grad_cache
        >>> encoder = torch.nn.Linear(3, 2)
        >>> x, labels = torch.randn(8, 3), torch.arange(8) % 2
        >>> value = grad_cache(encoder, ContrastiveLoss(), x, chunk_size=4, labels=labels)
        >>> torch.allclose(value, ContrastiveLoss()(encoder(x), labels))
        True

    Source:
        L. Gao, Y. Zhang, J. Han, J. Callan: Scaling Deep Contrastive Learning Batch Size under
        Memory Limited Setup, RepL4NLP 2021.
    """
    cache = GradCache(encoders, loss, chunk_size, select=select, backward=backward)
    return cache(*inputs, **loss_arguments)


class GradCache:
    """What :func:`grad_cache` does, with the encoders and the loss given once.

    It holds no state and is no module: save and move encoders and loss themselves.

    Args:
        encoders: see :func:`grad_cache`, as for what follows.
        loss: takes one embedding tensor per encoder.
        chunk_size: rows per chunk.
        select: finds the embeddings in what an encoder returns.
        backward: called in place of the loss's ``backward()``.

    Raises:
        TypeError: an argument has the wrong type.
        ValueError: there are not as many chunk sizes as encoders, or one is not above 0.

    Example:
        Two towers, whose rows belong together:

        >>> import torch
        >>> from flashmetric import GradCache, InfoNCELoss
        >>> towers = torch.nn.Linear(3, 2), torch.nn.Linear(4, 2)
        >>> loss = InfoNCELoss()
        >>> step = GradCache(towers, lambda x, y: loss(x, ref_emb=y), chunk_size=(2, 4))
        >>> value = step(torch.randn(8, 3), torch.randn(8, 4))
        >>> towers[0].weight.grad.shape
        torch.Size([2, 3])
    """

    def __init__(
        self,
        encoders: Encoder | Sequence[Encoder],
        loss: Callable[..., Tensor],
        chunk_size: int | Sequence[int],
        *,
        select: Callable[[Any], Tensor] | None = None,
        backward: Backward | None = None,
    ) -> None:
        """Check and store the options."""
        if isinstance(encoders, (tuple, list, nn.ModuleList)):
            self.encoders: tuple[Any, ...] = tuple(encoders)
        else:
            self.encoders = (encoders,)
        named = {"loss": loss, "select": select, "backward": backward}
        named |= {f"encoders[{i}]": encoder for i, encoder in enumerate(self.encoders)}
        for name, value in named.items():
            if not callable(value) and (value is not None or name not in ("select", "backward")):
                raise TypeError(f"{name} must be callable, got {type(value).__name__}")
        if not self.encoders:
            raise ValueError("encoders must hold one at least; got none")
        if isinstance(chunk_size, (tuple, list)):
            sizes = tuple(chunk_size)
        else:
            sizes = (chunk_size,) * len(self.encoders)
        for size in sizes:
            check_count("chunk_size", size)
        if len(sizes) != len(self.encoders):
            raise ValueError(
                f"chunk_size must be one number, or one per encoder, {len(self.encoders)}; "
                f"got {len(sizes)}"
            )
        self.loss = loss
        self.chunk_size = sizes
        self.select = select
        self.backward = backward

    def __call__(self, *inputs: Any, **loss_arguments: Any) -> Tensor:
        """See :func:`grad_cache`."""
        if len(inputs) != len(self.encoders):
            raise ValueError(
                f"inputs must be one per encoder, {len(self.encoders)}; got {len(inputs)}"
            )
        chunks = [
            _Chunk(encoder, number, part, rows)
            for number, (encoder, whole, size) in enumerate(
                zip(self.encoders, inputs, self.chunk_size, strict=True)
            )
            for part, rows in _parts(whole, size, f"inputs[{number}]")
        ]
        buffers = self._buffers()
        with torch.no_grad():
            parts = [chunk.run(self.select) for chunk in chunks]
        # In case autocast keeps weights that it has cast without a graph: they have no gradient.
        # PyTorch 2.13 keeps none, as tests/test_grad_cache.py sees.
        torch.clear_autocast_cache()
        towers = [
            torch.cat([part for c, part in zip(chunks, parts, strict=True) if c.tower == tower])
            for tower in range(len(self.encoders))
        ]
        del parts
        if not torch.is_grad_enabled():
            return self.loss(*towers, **loss_arguments)
        for tower, encoder in zip(towers, self.encoders, strict=True):
            tower.requires_grad_(_learns(encoder))
        value = self.loss(*towers, **loss_arguments)
        with _outside_autocast():
            value.backward() if self.backward is None else self.backward(value)
        self._second_pass(chunks, towers, buffers)
        return value.detach()

    def _second_pass(
        self, chunks: list["_Chunk"], towers: list[Tensor], buffers: list[tuple[Tensor, Tensor]]
    ) -> None:
        with torch.no_grad():
            for buffer, before in buffers:
                buffer.copy_(before)
        again = [chunk for chunk in chunks if towers[chunk.tower].requires_grad]
        last = {id(chunk.encoder): chunk for chunk in again}
        gradients = [
            iter(_gradient(tower).split([c.rows for c in chunks if c.tower == number]))
            if tower.requires_grad
            else iter(())
            for number, tower in enumerate(towers)
        ]
        for chunk in again:
            gradient = next(gradients[chunk.tower])
            with _synchronizing(chunk.encoder, last[id(chunk.encoder)] is chunk):
                embeddings = chunk.run_again(self.select)
                if embeddings.requires_grad:
                    with _outside_autocast():
                        torch.autograd.backward(embeddings, gradient)

    def _buffers(self) -> list[tuple[Tensor, Tensor]]:
        """Buffers of the encoders that are run twice, and copies."""
        if not torch.is_grad_enabled():
            return []
        modules = (e for e in self.encoders if isinstance(e, nn.Module) and _learns(e))
        found = {id(buffer): buffer for module in modules for buffer in module.buffers()}
        return [(buffer, buffer.detach().clone()) for buffer in found.values()]


class _Chunk:
    """Some rows of an input, with what it takes to encode them twice alike."""

    def __init__(self, encoder: Encoder, tower: int, inputs: Any, rows: int) -> None:
        self.encoder, self.tower, self.inputs, self.rows = encoder, tower, inputs, rows

    def run(self, select: Callable[[Any], Tensor] | None) -> Tensor:
        self.cpu_state = torch.get_rng_state()
        self.device_states = get_device_states(*self._tensors())
        return self._encode(select)

    def run_again(self, select: Callable[[Any], Tensor] | None) -> Tensor:
        devices, states = self.device_states
        kind = next((t.device.type for t in self._tensors() if t.device.type != "cpu"), "cuda")
        with torch.random.fork_rng(devices, device_type=kind):
            torch.set_rng_state(self.cpu_state)
            set_device_states(devices, states, device_type=kind)
            return self._encode(select)

    def _tensors(self) -> Iterator[Tensor]:
        yield from _tensors(self.inputs)
        if isinstance(self.encoder, nn.Module):
            yield from self.encoder.parameters()

    def _encode(self, select: Callable[[Any], Tensor] | None) -> Tensor:
        inputs = self.inputs
        if isinstance(inputs, Mapping):
            found = self.encoder(**inputs)
        else:
            found = self.encoder(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        found = found if select is None else select(found)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"an encoder must return a tensor, or select find one; got {type(found).__name__}"
            )
        if not found.ndim or len(found) != self.rows:
            raise ValueError(
                f"an encoder must return a row per row, {self.rows}; got {tuple(found.shape)}"
            )
        return found


def _parts(whole: Any, size: int, name: str) -> Iterator[tuple[Any, int]]:
    """Chunks of at most ``size`` rows, at least one, and their numbers of rows."""
    tensors = list(_tensors(whole))
    if not tensors:
        raise ValueError(f"{name} must hold a tensor, got {type(whole).__name__}")
    lengths = {len(t) if t.ndim else 0 for t in tensors}
    if len(lengths) != 1:
        raise ValueError(f"{name} must hold tensors of one length, got {sorted(lengths)}")
    (rows,) = lengths
    for begin in range(0, max(rows, 1), size):
        yield _slice(whole, begin, begin + size), min(size, rows - begin)


def _tensors(inputs: Any) -> Iterator[Tensor]:
    if isinstance(inputs, Tensor):
        yield inputs
    elif isinstance(inputs, (Mapping, tuple, list)):
        for value in inputs.values() if isinstance(inputs, Mapping) else inputs:
            yield from _tensors(value)


def _slice(inputs: Any, begin: int, end: int) -> Any:
    if isinstance(inputs, Tensor):
        return inputs[begin:end]
    if isinstance(inputs, Mapping):
        return {key: _slice(value, begin, end) for key, value in inputs.items()}
    if isinstance(inputs, (tuple, list)):
        return [_slice(value, begin, end) for value in inputs]
    return inputs


def _learns(encoder: Encoder) -> bool:
    """Whether to run it with a graph; of what is no module nothing is known."""
    return not isinstance(encoder, nn.Module) or any(p.requires_grad for p in encoder.parameters())


def _gradient(tower: Tensor) -> Tensor:
    # A loss that leaves a tower out: its encoder still takes part in what ranks do together.
    return torch.zeros_like(tower) if tower.grad is None else tower.grad


@contextmanager
def _outside_autocast() -> Iterator[None]:
    with ExitStack() as stack:
        for device in ("cpu", "cuda"):
            if torch.is_autocast_enabled(device):
                stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextmanager
def _synchronizing(encoder: Encoder, last: bool) -> Iterator[None]:
    """Let gradients be exchanged between processes at the last chunk only."""
    switch = getattr(encoder, "set_requires_gradient_sync", None)
    no_sync = getattr(encoder, "no_sync", None)
    quiet: AbstractContextManager[Any] = nullcontext()
    if switch is not None:
        switch(last)
    elif no_sync is not None and not last:
        quiet = no_sync()
    try:
        with quiet:
            yield
    finally:
        if switch is not None:
            switch(True)
