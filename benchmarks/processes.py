"""Work in a process of its own, so that a crash, a hang or a full memory costs that work alone."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from typing import Any

from pmf.benchmarks.ledger import Record
from pmf.errors import first_line

Work = Callable[..., Iterable[Record]]


def failed(error: Exception | str) -> Record:
    """A record of what could not be measured, and why."""
    reason = error if isinstance(error, str) else f"{type(error).__name__}: {first_line(error)[:300]}"
    return {"status": "failed", "error": reason}


def isolated(work: Work, seconds: float, *arguments: Any) -> Iterator[Record]:
    """What `work(*arguments)` yields, as it comes; a last record says why where it does not end within its time.

    The process is forked from a server that has imported PyTorch and never touches the GPU: it starts at once.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([work.__module__])
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_send, args=(work, arguments, sender), daemon=False)
    deadline = time.monotonic() + seconds
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, deadline - time.monotonic())):
            yield receiver.recv()
        yield failed(f"did not finish in {seconds:.0f} s")
    except EOFError:
        process.join()
        if process.exitcode != 0:
            yield failed(f"the process ended with code {process.exitcode}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what it started too: compilers have workers
        process.kill()
        process.join()


def _send(work: Work, arguments: tuple, sender: Connection) -> None:
    os.setpgrp()
    try:
        for record in work(*arguments):
            sender.send(record)
    except Exception as error:
        sender.send(failed(error))
