# SPDX-License-Identifier: Apache-2.0
"""Processes of a Gloo group that stay for several cases: to start one takes seconds."""

import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

# Seconds for one case on a busy machine.
_PATIENCE = 200


def _serve(rank: int, world: int, store: str, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world, init_method=f"file://{store}")
    while True:
        case, given = pipe.recv()
        try:
            case(rank, world, *given)
        except BaseException:  # noqa: BLE001 - whatever it is, the test shows it
            pipe.send(traceback.format_exc())
        else:
            pipe.send("")


class Ranks:
    """A group of processes. After a failure it is closed: others may wait in a collective."""

    def __init__(self, world: int, folder: Path) -> None:
        """Start them; they meet in a file in ``folder``."""
        self.world, self.closed = world, False
        context = mp.get_context("spawn")
        self._pipes, self._processes = [], []
        for rank in range(world):
            here, there = context.Pipe()
            given = (rank, world, str(folder / f"store{world}"), there)
            self._pipes.append(here)
            self._processes.append(context.Process(target=_serve, args=given, daemon=True))
            self._processes[-1].start()

    def run(self, case: Callable[..., Any], *given: Any) -> None:
        """Run ``case(rank, world, *given)`` in all of them; fails as the first of them does."""
        for pipe in self._pipes:
            pipe.send((case, given))
        waiting = dict(zip(self._pipes, range(self.world), strict=True))
        while waiting:
            # Not one after the other: those that wait for a failed one answer late, or never.
            answered = wait(list(waiting), _PATIENCE)
            errors = [f"rank {waiting[pipe]}: {pipe.recv()}" for pipe in answered]
            errors = [error for error in errors if not error.endswith(": ")]
            if errors or not answered:
                self.close()
                raise AssertionError("".join(errors) or f"no answer of ranks {[*waiting.values()]}")
            for pipe in answered:
                waiting.pop(pipe)

    def close(self) -> None:
        """End the processes, which have nothing to put away."""
        self.closed = True
        for process in self._processes:
            process.kill()
            process.join()
