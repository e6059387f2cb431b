# SPDX-License-Identifier: Apache-2.0
"""A process per contender, as in ``bench.worker``, for sessions instead of bare losses."""

import gc
import multiprocessing
import pkgutil
import time
import warnings
from dataclasses import dataclass
from multiprocessing.connection import Connection

import torch

from bench import worker
from bench.clients.session import Options, Session
from bench.measure import allowance, cap_memory, extra_memory

# What the processes are forked from; see that module.
PRELOAD = "bench.clients.preload"


@dataclass(frozen=True)
class Task:
    """What a worker process is told.

    Attributes:
        builder: ``module:function`` that makes the session.
        options: Its arguments.
        threads: Threads for PyTorch.
        memory: Most bytes the process may use beyond its start; None for 90 % of what is free.
    """

    builder: str
    options: Options
    threads: int
    memory: int | None = None


def preload() -> None:
    """Has the process that workers are forked from import the libraries, once."""
    multiprocessing.get_context("forkserver").set_forkserver_preload([PRELOAD])


def answer(session: Session, order: str, count: int) -> dict:
    """Carries out one order of the parent.

    Args:
        session: The contender.
        order: ``"time"``, ``"memory"`` or ``"values"``.
        count: Number of steps to time.

    Returns:
        Losses of the steps taken and seconds of each; extra bytes, or the gradient.
    """
    losses: list[float] = []
    seconds: list[float] = []

    def step() -> None:
        start = time.perf_counter()
        losses.append(session.step())
        seconds.append(time.perf_counter() - start)

    reply: dict = {"losses": losses, "seconds": seconds}
    if order == "memory":
        measured = extra_memory(step)
        if measured is None:
            step()
        return reply | {"extra": measured and measured[0]}
    for _ in range(count):
        step()
    return reply | ({"gradient": session.gradient().tolist()} if order == "values" else {})


def serve(connection: Connection, task: Task) -> None:
    """Runs in the worker: makes the session and obeys until the parent hangs up."""
    torch.set_num_threads(task.threads)
    # Libraries warn about their own use of each other, once per process.
    warnings.simplefilter("ignore")
    try:
        # Libraries map much more than they use, so they are loaded before there is a limit.
        builder = pkgutil.resolve_name(task.builder)
        cap_memory(allowance(task.memory))
        session = builder(**task.options)
        gc.freeze()
        connection.send({"ready": True})
        while (message := connection.recv()) is not None:
            connection.send(answer(session, *message))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        connection.send({"failure": worker.explain(error)})


class Worker(worker.Worker):
    """The parent's handle on such a process."""

    def __init__(self, task: Task) -> None:
        """Starts the process.

        Args:
            task: What it runs.
        """
        self.task = task
        context = multiprocessing.get_context("forkserver")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=serve, args=(theirs, task), daemon=True)
        self.process.start()
        theirs.close()

    def order(self, order: str, count: int = 1, limit: float = 600.0) -> dict:
        """Sends an order and waits for its reply; raises Failure as ``wait`` does."""
        try:
            self.connection.send((order, count))
        except (BrokenPipeError, ConnectionError) as error:
            raise worker.Failure(self.death()) from error
        return self.wait(limit)
