# SPDX-License-Identifier: Apache-2.0
"""The process that owns the GPU, and the parent's handle on it.

A faulty kernel ends a CUDA context for good, so all calls run in a process of their own: when one
dies, the parent notes who was running, starts another, and goes on with the others.
"""

import os
import signal
import socket
import subprocess
import sys
import traceback
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from bench.gpu.harness import Bench, Failure


class Death(Failure):
    """The same, when the process that owned the device went with it."""


def explain(error: BaseException) -> str:
    """Puts an exception into the words of the report."""
    text = " ".join(str(error).split())
    if isinstance(error, Failure):
        return text
    if isinstance(error, ImportError):
        return f"not installed ({text[:160]})"
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "out of memory"
    return f"failed ({type(error).__name__}: {text[:240]})"


def answer(bench: Bench, order: str, arguments: tuple[Any, ...]) -> tuple[str, Any]:
    """Carries out one order: ("done", result), ("failure", why) or ("fatal", why)."""
    try:
        return "done", getattr(bench, order)(*arguments)
    except Exception as error:
        reason = explain(error)
        if reason.startswith("failed"):
            traceback.print_exc()
        traceback.clear_frames(error.__traceback__)  # they hold the tensors of the call
    if arguments and isinstance(arguments[0], str):
        bench.problems.pop(arguments[0], None)
    try:
        bench.device.synchronize()
        bench.device.release()
    except Exception as error:
        return "fatal", f"{reason}; the device is lost ({explain(error)})"
    # A failed capture leaves the allocator in a state that nobody promises to be sound.
    return "fatal" if order == "replay" else "failure", reason


def serve(connection: Connection, dry_run: bool) -> None:
    """Obeys the parent until it hangs up."""
    # A time limit or Ctrl-C ends the whole group of processes: the parent decides what is kept.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    # No pool of compiling processes: it would inherit the signals and outlive this one.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    try:
        bench = Bench(dry_run)
    except Exception as error:
        connection.send(("fatal", explain(error)))
        return
    connection.send(("done", None))
    while True:
        try:
            message = connection.recv()
        except EOFError:
            return
        if message is None:
            return
        reply = answer(bench, *message)
        connection.send(reply)
        if reply[0] == "fatal":
            return


class Worker:
    """The parent's handle on the process."""

    def __init__(self, dry_run: bool, limit: float = 120.0) -> None:
        """Starts the process; raises Death if it does not come up."""
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "bench.gpu.worker", str(theirs.fileno())]
            self.process = subprocess.Popen(
                [*command, *(["--dry-run"] if dry_run else [])],
                cwd=Path(__file__).resolve().parents[2],
                pass_fds=(theirs.fileno(),),
            )
        self.connection = Connection(ours.detach())
        self._reply(limit)

    def ask(self, order: str, *arguments: Any, limit: float = 60.0) -> Any:
        """Has a method of ``Bench`` called.

        Args:
            order: Name of the method.
            *arguments: Its arguments.
            limit: Seconds to wait.

        Returns:
            What it returned.

        Raises:
            Failure: It failed, and the process lives.
            Death: The process is gone.
        """
        try:
            self.connection.send((order, arguments))
        except OSError as error:
            raise Death(self._ending()) from error
        return self._reply(limit)

    def _reply(self, limit: float) -> Any:
        try:
            if not self.connection.poll(limit):
                self.close()
                raise Death(f"no answer within {limit:.0f} s")
            kind, value = self.connection.recv()
        except (EOFError, OSError) as error:
            raise Death(self._ending()) from error
        if kind == "done":
            return value
        if kind == "fatal":
            self.close()
            raise Death(value)
        raise Failure(value)

    def _ending(self) -> str:
        try:
            code = self.process.wait(10)
        except subprocess.TimeoutExpired:
            code = None
        self.close()
        return f"failed (its process ended with exit code {code})"

    def close(self) -> None:
        """Ends the process."""
        try:
            self.connection.send(None)
        except OSError:
            pass
        self.connection.close()
        try:
            self.process.wait(5)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(30)


def main() -> None:
    """Entry of the process: serves on an inherited socket."""
    # What is sent unpickles as classes of `bench.gpu.worker`, which is not this `__main__`.
    from bench.gpu.worker import serve as serve_orders

    with Connection(int(sys.argv[1])) as parent:
        serve_orders(parent, "--dry-run" in sys.argv[2:])


if __name__ == "__main__":
    main()
