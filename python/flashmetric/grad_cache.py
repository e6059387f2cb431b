# SPDX-License-Identifier: Apache-2.0
"""Large batches through an encoder whose activations fit for a chunk only (GradCache)."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from flashmetric.checks import check_count
from flashmetric.chunked_input import ChunkedInput
from flashmetric.encoder_state import (
    Buffer,
    Encoder,
    buffers_of,
    owner_of,
    random_state,
    set_buffers,
    set_random_state,
    state_tensors,
    with_shared_buffers,
)

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

    All chunks are encoded, and their graphs dropped at once; the loss of all embeddings gives the
    gradient of each; and each chunk is encoded once more, to take its gradient further. That is one
    more forward than usual, and exact: the loss sees the whole batch.

    The second forward repeats the first. Random numbers of the CPU and of the devices are set back
    for each chunk, so dropout drops the same, and go on afterwards from where the first left them.
    Buffers, such as running statistics, are set back too, and are updated once per chunk. Layers
    that look at other rows, such as batch normalisation in training mode, see those of the chunk.
    Of an encoder that is no module, method of one or ``functools.partial`` of these, buffers are
    unknown and not set back, nor are random numbers of CUDA if its first call is what starts CUDA.
    Other things that a forward changes, such as Python's random numbers or attributes that are no
    buffers, are not set back, and no check compares the two forwards.

    Args:
        encoders: a module, or several (two towers), one per input; the same one may come twice.
            Those whose embeddings need no gradient, such as frozen ones, are run once, unless they
            share buffers with others.
        loss: takes one embedding tensor per encoder, and ``loss_arguments``: any loss of
            :mod:`flashmetric`, :class:`~flashmetric.CrossBatchMemory`, or a function. Its own
            parameters get gradients too. It is called once.
        *inputs: what each encoder takes, all rows of the batch: a tensor, a mapping, which becomes
            keyword arguments, or a tuple or list of arguments. Chunks get copies. Cut into chunks
            are tensors, along their first dimension, and arrays, lists and tuples that hold no
            tensor, such as texts, which must have an entry per row. Mappings, and lists and tuples
            that hold tensors, are looked into, and keep their type where it can be made from such
            contents. Anything else, such as a number or a string, goes to every chunk; give the
            encoder a tuple that is an option, such as an image size, by ``functools.partial``.
            Inputs may require gradients; then ``loss_arguments`` may not share their graph.
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
            tensor, or tensors or lists of different lengths; an encoder has lazy parameters; or it
            does not return a row per row. After any error buffers and random numbers are as before.

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
        Activations of one chunk, and O(N D) for embeddings and their gradients; the gradients of
        inputs that require them.

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
                f"inputs must be one per encoder, {len(self.encoders)}; got {len(inputs)} (what "
                "the loss takes, such as labels, goes by keyword)"
            )
        for number, encoder in enumerate(self.encoders):
            if any(is_lazy(tensor) for tensor in state_tensors(owner_of(encoder))):
                raise ValueError(
                    f"encoders[{number}] must be initialised; got a lazy module that has seen no "
                    "rows: call it once before"
                )
        cut = [ChunkedInput(whole, f"inputs[{number}]") for number, whole in enumerate(inputs)]
        seen = [c for whole in cut for c in whole.columns if isinstance(c, Tensor)]
        seen += [tensor for encoder in self.encoders for tensor in state_tensors(owner_of(encoder))]
        devices = {tensor.device for tensor in seen if tensor.device.type not in ("cpu", "meta")}
        chunks = [
            _Chunk(encoder, tower, whole, begin, min(begin + size, whole.rows), devices)
            for tower, (encoder, whole, size) in enumerate(
                zip(self.encoders, cut, self.chunk_size, strict=True)
            )
            for begin in range(0, max(whole.rows, 1), size)
        ]
        buffers = {id(owner): buffers_of(owner) for owner in map(owner_of, self.encoders)}
        before = random_state(devices)
        try:
            return self._run(chunks, buffers, loss_arguments)
        except BaseException:
            for found in buffers.values():
                set_buffers(found)
            set_random_state(before)
            raise

    def _run(
        self,
        chunks: list["_Chunk"],
        buffers: dict[int, list[Buffer]],
        loss_arguments: dict[str, Any],
    ) -> Tensor:
        towers = self._first_pass(chunks)
        value = self.loss(*towers, **loss_arguments)
        if not torch.is_grad_enabled():
            return value
        with _outside_autocast():
            value.backward() if self.backward is None else self.backward(value)
        learning = [chunk for chunk in chunks if towers[chunk.tower].requires_grad]
        # Others that have changed the buffers that are set back have to do so again.
        changed = with_shared_buffers({id(chunk.owner) for chunk in learning}, buffers)
        for owner in changed:
            set_buffers(buffers[owner])
        again = [c for c in chunks if towers[c.tower].requires_grad or id(c.owner) in changed]
        self._second_pass(again, towers)
        _backward_of_inputs(learning)
        return value.detach()

    def _first_pass(self, chunks: list["_Chunk"]) -> list[Tensor]:
        """The embeddings of each encoder; leaves, which require gradients if the chunks' did.

        Chunks have graphs here too: without, modules may compute something else, as those of
        ``torch.nn.TransformerEncoder`` do, and as code that asks for ``torch.is_grad_enabled()``.
        """
        parts: list[list[Tensor]] = [[] for _ in self.encoders]
        learns = [False] * len(parts)
        for chunk in chunks:
            with _synchronizing(chunk.owner, False) if torch.is_grad_enabled() else nullcontext():
                embeddings = chunk.run(self.select)
            learns[chunk.tower] |= embeddings.requires_grad
            # A view, such as of one token, would keep the output of the encoder, and the embeddings
            # their graph while the next chunk is encoded.
            parts[chunk.tower].append(embeddings.detach().clone())
            del embeddings
        return [
            torch.cat(part).requires_grad_(learn) for part, learn in zip(parts, learns, strict=True)
        ]

    def _second_pass(self, chunks: list["_Chunk"], towers: list[Tensor]) -> None:
        last = {id(chunk.owner): chunk for chunk in chunks if towers[chunk.tower].requires_grad}
        for chunk in chunks:
            tower = towers[chunk.tower]
            with _synchronizing(chunk.owner, last.get(id(chunk.owner)) is chunk):
                embeddings = chunk.run_again(self.select)
                if embeddings.requires_grad:
                    # A loss that leaves a tower out: its encoder still takes part in what ranks
                    # share.
                    gradient = torch.zeros_like(tower) if tower.grad is None else tower.grad
                    with _outside_autocast():
                        torch.autograd.backward(embeddings, gradient[chunk.begin : chunk.end])


@dataclass(eq=False)
class _Chunk:
    """Some rows of an input, with what it takes to encode them twice alike."""

    encoder: Encoder
    tower: int
    input: ChunkedInput
    begin: int
    end: int
    devices: set[torch.device]

    @property
    def owner(self) -> Encoder:
        return owner_of(self.encoder)

    def run(self, select: Callable[[Any], Tensor] | None) -> Tensor:
        self.random_state = random_state(self.devices)
        return self._encode(self._cut(), select)

    def run_again(self, select: Callable[[Any], Tensor] | None) -> Tensor:
        self.leaves = self._cut()
        now = random_state(self.devices)
        set_random_state(self.random_state)
        try:
            return self._encode(self.leaves, select)
        finally:
            set_random_state(now)

    def _cut(self) -> list[Any]:
        leaves = self.input.cut(self.begin, self.end)
        for place in self.input.learned:
            leaves[place] = leaves[place].detach().requires_grad_()
        return leaves

    def _encode(self, parts: list[Any], select: Callable[[Any], Tensor] | None) -> Tensor:
        # An encoder that works in place would give the second forward another input.
        copies = [part.clone() if isinstance(part, Tensor) else part for part in parts]
        inputs = self.input.put(copies)
        if isinstance(inputs, Mapping):
            found = self.encoder(**inputs)
        else:
            found = self.encoder(*(inputs if isinstance(inputs, (tuple, list)) else (inputs,)))
        found = found if select is None else select(found)
        if not isinstance(found, Tensor):
            raise TypeError(
                f"an encoder must return a tensor, or select find one; got {type(found).__name__}"
            )
        rows = self.end - self.begin
        if not found.ndim or len(found) != rows:
            raise ValueError(
                f"an encoder must return a row per row, {rows}; got {tuple(found.shape)}"
            )
        return found


def _backward_of_inputs(chunks: list[_Chunk]) -> None:
    """Takes the gradients of inputs that require them further, in one backward pass."""
    found = []
    for whole in {id(chunk.input): chunk.input for chunk in chunks}.values():
        for place in whole.learned:
            leaves = [chunk.leaves[place] for chunk in chunks if chunk.input is whole]
            if any(leaf.grad is not None for leaf in leaves):
                parts = [
                    torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves
                ]
                found.append((whole.columns[place], torch.cat(parts)))
    if found:
        tensors, gradients = zip(*found, strict=True)
        with _outside_autocast():
            torch.autograd.backward(tensors, gradients)


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
