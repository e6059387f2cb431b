# SPDX-License-Identifier: Apache-2.0
"""One process per contender and case, and the parent's handle on it.

A fresh process gives honest memory figures, lets the fallback and the native library run side by
side, and turns a crash or an exhausted memory into one line of the report. Processes of a case
stay alive together, and the parent asks one of them at a time for a block of calls.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from importlib.metadata import version
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from bench.cases import Case, draw
from bench.contenders import Contender, Loss, find
from bench.measure import allowance, cap_memory, extra_memory, time_calls

FORWARD, STEP = "forward", "forward+backward"
WARM_UP_ROWS = 64


@dataclass(frozen=True)
class Task:
    """What a worker process is told.

    Attributes:
        contender: Name of the contender.
        case: The case whose data it draws.
        margin: Margin of the loss.
        threads: Threads for PyTorch.
        memory: Most bytes it may use; None for 90 % of what is free.
    """

    contender: str
    case: Case
    margin: float
    threads: int
    memory: int | None = None


class Failure(Exception):
    """Why a contender has no figures, in the words of the report."""


@dataclass
class Problem:
    """State of a worker: the loss, its data and the last result."""

    loss: Loss
    x: Tensor
    labels: Tensor
    result: Tensor | None = None

    def reset(self) -> None:
        """Drops the last result and gradient, so that the next call allocates its own."""
        self.result = None
        self.x.grad = None

    def forward(self) -> None:
        """Evaluates the loss without recording a graph."""
        with torch.no_grad():
            self.result = self.loss(self.x, self.labels)

    def step(self) -> None:
        """Evaluates the loss and its gradient."""
        self.result = self.loss(self.x, self.labels)
        self.result.backward()

    def call(self, mode: str) -> Callable[[], None]:
        """Returns the function that a mode times."""
        return self.forward if mode == FORWARD else self.step


def preload(contenders: Iterable[Contender]) -> None:
    """Has the process that workers are forked from import what they need, once.

    A process per contender then costs milliseconds. The library is left out, because its
    environment differs per contender; modules that are missing are passed over.

    Args:
        contenders: Those of the run. To be called before the first worker starts.
    """
    modules = ["bench.worker", *(name for c in contenders for name in c.preload)]
    multiprocessing.get_context("forkserver").set_forkserver_preload(modules)


def build(task: Task, contender: Contender) -> Problem:
    """Draws the data, makes the loss and runs it once where that loads code or compiles."""
    loss = contender.build[task.case.kernel](task.margin)
    x, labels = draw(task.case)
    # The warm-up pages in code and starts threads; at a small size its buffers do not hide
    # what the first real call allocates. A compiled loss needs its own size.
    rows = min(max(WARM_UP_ROWS, 2 * task.case.per_class), task.case.n)
    warm_x, warm_labels = draw(task.case if contender.compiled else replace(task.case, n=rows))
    problem = Problem(loss, warm_x.requires_grad_(contender.differentiable), warm_labels)
    modes = (FORWARD, STEP) if contender.differentiable else (FORWARD,)
    if task.case.kernel == "hardest":
        modes = (FORWARD,)
    for mode in modes:
        problem.reset()
        problem.call(mode)()
    problem.reset()
    return Problem(loss, x.requires_grad_(STEP in modes), labels)


class Operators(TorchDispatchMode):
    """Notes which of the package's operators are called."""

    def __init__(self) -> None:
        """Starts with none."""
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):  # noqa: D105
        if function.namespace == "flashmetric":
            self.names.append(function._opname)
        return function(*args, **(kwargs or {}))


def values(problem: Problem, contender: Contender, mode: str) -> dict:
    """Result and gradient for the gate."""
    recorder = Operators()
    # A compiled contender does not run under such a mode.
    with contextlib.nullcontext() if contender.compiled else recorder:
        problem.call(mode)()
    grad = None if problem.x.grad is None else problem.x.grad.tolist()
    names = [name for name in dict.fromkeys(recorder.names) if not name.startswith("_")]
    reply = {"result": problem.result.tolist(), "grad": grad, "operators": names}
    if name := contender.package:
        reply["package"] = f"{name} {version(name)}, torch {torch.__version__}"
    return reply


def answer(problem: Problem, contender: Contender, order: str, mode: str, count: int) -> dict:
    """Carries out one order of the parent."""
    call = problem.call(mode)
    if order == "time":
        return {"seconds": time_calls(call, problem.reset, count)}
    problem.reset()
    if order == "values":
        return values(problem, contender, mode)
    measured = extra_memory(call)
    if measured is None:
        call()
        reply = {"extra": None, "seconds": time_calls(call, problem.reset, 1)[0]}
    else:
        reply = {"extra": measured[0], "seconds": measured[1]}
    if problem.result.numel() == 1:
        reply["loss"] = float(problem.result.detach())
        reply["grad_norm"] = float(problem.x.grad.norm()) if mode == STEP else None
    problem.reset()
    return reply


def serve(connection: Connection, task: Task) -> None:
    """Runs in the worker: prepares the contender and obeys until the parent hangs up."""
    contender = find(task.contender)
    warnings.filterwarnings("ignore", module=r"torch\._inductor")
    # Before the library is imported: it reads these once.
    os.environ.update(contender.env)
    torch.set_num_threads(task.threads)
    try:
        cap_memory(allowance(task.memory))
        problem = build(task, contender)
        # The collection before each block of calls then skips the objects of loaded modules.
        gc.freeze()
        connection.send({"ready": True})
        while True:
            message = connection.recv()
            if message is None:
                return
            connection.send(answer(problem, contender, *message))
    except (EOFError, KeyboardInterrupt):
        return
    except BaseException as error:
        connection.send({"failure": explain(error)})


def explain(error: BaseException) -> str:
    """Puts an exception of a contender into the words of the report."""
    text = " ".join(str(error).split())
    if isinstance(error, ImportError):
        return f"not installed ({text[:120]})"
    if isinstance(error, MemoryError) or "can't allocate memory" in text:
        return "out of memory"
    return f"failed ({type(error).__name__}: {text[:160]})"


class Worker:
    """The parent's handle on a worker process."""

    def __init__(self, task: Task, interpreter: str | None = None) -> None:
        """Starts the process.

        Args:
            task: What it runs.
            interpreter: Another Python to run it with.
        """
        self.task = task
        if interpreter is None:
            context = multiprocessing.get_context("forkserver")
            self.connection, theirs = context.Pipe()
            self.process = context.Process(target=serve, args=(theirs, task), daemon=True)
            self.process.start()
            theirs.close()
            return
        root = str(Path(__file__).resolve().parents[1])
        ours, theirs = socket.socketpair()
        with theirs:
            self.process = subprocess.Popen(
                [interpreter, "-m", "bench.worker", str(theirs.fileno())],
                env=os.environ | {"PYTHONPATH": root},
                cwd=root,
                pass_fds=(theirs.fileno(),),
            )
        self.connection = Connection(ours.detach())
        self.connection.send(task)

    def wait(self, limit: float) -> dict:
        """Receives the next reply.

        Args:
            limit: Seconds to wait.

        Returns:
            The reply.

        Raises:
            Failure: The contender failed, died, or took longer than the limit.
        """
        try:
            if not self.connection.poll(limit):
                self.process.kill()
                raise Failure(f"skipped (no answer within {limit:.0f} s)")
            reply = self.connection.recv()
        except (EOFError, ConnectionError) as error:
            raise Failure(self.death()) from error
        if "failure" in reply:
            raise Failure(reply["failure"])
        return reply

    def ask(self, order: str, mode: str, count: int = 1, limit: float = 600.0) -> dict:
        """Sends an order and waits for its reply; raises Failure like wait()."""
        try:
            self.connection.send((order, mode, count))
        except (BrokenPipeError, ConnectionError) as error:
            raise Failure(self.death()) from error
        return self.wait(limit)

    def death(self) -> str:
        """Says how the process ended."""
        if isinstance(self.process, subprocess.Popen):
            code = self.process.wait(10)
        else:
            self.process.join(10)
            code = self.process.exitcode
        if code == -signal.SIGKILL:
            return "out of memory (killed by the system)"
        return f"failed (its process ended with exit code {code})"

    def close(self) -> None:
        """Ends the process."""
        try:
            self.connection.send(None)
        except (BrokenPipeError, ConnectionError, OSError):
            pass
        self.connection.close()
        if isinstance(self.process, subprocess.Popen):
            try:
                self.process.wait(5)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait(5)
            return
        self.process.join(5)
        if self.process.is_alive():
            self.process.kill()
            self.process.join(5)


def main() -> None:
    """Entry of a worker under another interpreter: serves on an inherited socket."""
    # The task unpickles as a class of `bench.worker`, which is not this `__main__`.
    from bench.worker import serve as serve_task

    with Connection(int(sys.argv[1])) as parent:
        serve_task(parent, parent.recv())


if __name__ == "__main__":
    main()
