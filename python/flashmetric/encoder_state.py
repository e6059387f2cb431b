# SPDX-License-Identifier: Apache-2.0
"""What the forward of an encoder reads and changes beside its input: buffers, random numbers."""

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

Encoder = Callable[..., Any]
Buffer = tuple[nn.Module, str, Tensor | None, Tensor | None]


def owner_of(encoder: Encoder) -> Encoder:
    """The module that a method or a ``functools.partial`` is of, or else the encoder itself."""
    found: Any = encoder
    while isinstance(found, functools.partial):
        found = found.func
    found = getattr(found, "__self__", found)
    return found if isinstance(found, nn.Module) else encoder


def state_tensors(encoder: Encoder) -> list[Tensor]:
    """Parameters and buffers; none if it is no module."""
    return [*encoder.parameters(), *encoder.buffers()] if isinstance(encoder, nn.Module) else []


def buffers_of(encoder: Encoder) -> list[Buffer]:
    """Where each buffer is, the tensor itself, and its contents."""
    return [
        (module, name, buffer, None if buffer is None else buffer.detach().clone())
        for module in (encoder.modules() if isinstance(encoder, nn.Module) else ())
        for name, buffer in module._buffers.items()
    ]


def with_shared_buffers(owners: set[int], buffers: dict[int, list[Buffer]]) -> set[int]:
    """Those of these owners that have buffers, and all whose buffers are, or share, theirs.

    Args:
        owners: ids of owners.
        buffers: what :func:`buffers_of` found, by the id of the owner.
    """
    # A module may replace a tensor, and two may hold the same one.
    marks: dict[int, set[tuple[object, ...]]] = {
        owner: {(id(module), name) for module, name, _, _ in found}
        | {(id(buffer),) for _, _, buffer, _ in found if buffer is not None}
        for owner, found in buffers.items()
    }
    changed = {owner for owner in owners if marks[owner]}
    while more := {
        owner
        for owner in marks.keys() - changed
        if any(not marks[owner].isdisjoint(marks[other]) for other in changed)
    }:
        changed |= more
    return changed


def set_buffers(buffers: list[Buffer]) -> None:
    """Put tensors and contents back to where :func:`buffers_of` found them."""
    for module, name, buffer, contents in buffers:
        if module._buffers[name] is not buffer:
            setattr(module, name, buffer)
        if buffer is not None and contents is not None:
            with torch.no_grad():
                buffer.copy_(contents)


def random_state(devices: set[torch.device]) -> dict[torch.device, Tensor]:
    """Of the CPU, of these devices, and, if it is in use, of all of CUDA.

    An encoder that is no module may move its inputs to any device.
    """
    if torch.cuda.is_initialized():
        devices = devices | {
            torch.device("cuda", index) for index in range(torch.cuda.device_count())
        }
    states = {d: torch.get_device_module(d).get_rng_state(d) for d in devices}
    return {torch.device("cpu"): torch.get_rng_state(), **states}


def set_random_state(states: dict[torch.device, Tensor]) -> None:
    """Go back to what :func:`random_state` found."""
    for device, state in states.items():
        if device.type == "cpu":
            torch.set_rng_state(state)
        else:
            torch.get_device_module(device).set_rng_state(state, device)
