"""Batches from worker processes: what ends in a worker is one error here, and the end never waits for a worker."""

from __future__ import annotations

import logging
import multiprocessing
import multiprocessing.connection
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader

from pmf.data.reading import Batch, Reader
from pmf.errors import InputError, first_line, printable
from pmf.private import ask_workers_to_end, forget_received, forget_workers, on_unsendable, timed_out, worker_processes

PREFETCH = 4
PATIENCE = 3.0
"""Seconds in which workers may end by themselves before they are killed."""
REMIND = 60
"""Seconds between warnings that no batch came."""
STUCK = 600
"""Seconds without a batch after which workers count as stuck."""
STOP_SIGNALS = (
    signal.SIGINT,
    signal.SIGTERM,
    signal.SIGHUP,
    signal.SIGQUIT,
    signal.SIGUSR1,
    signal.SIGUSR2,
    signal.SIGXCPU,
)
"""Signals that ask a run to save and stop. Slurm's --signal=USR1@60 sends SIGUSR1 60 seconds before the time limit."""
UNSENDABLE = 83
"""Exit status of a worker that could not send a batch."""
UNNAMEABLE = 84
"""Exit status of a worker that could not send one because the name of its socket, below TMPDIR, would be too long."""
SOCKETS_FOLDER = 107 - len("/pymp-12345678/listener-12345678")
"""Bytes that the path of TMPDIR may have, for a socket's name has at most 107."""
FEWER = "use fewer --workers; 0 reads in the main process"
SHARED_MEMORY = "docker run --shm-size=8g or --ipc=host gives more shared memory"
REASONS = {
    -signal.SIGKILL: f"was killed (SIGKILL), as happens when memory runs out: {FEWER}",
    -signal.SIGBUS: "was ended by SIGBUS: shared memory ran out, or a shard became shorter while it was read; "
    f"{FEWER}, {SHARED_MEMORY}, `pmf data verify` checks shards",
    UNSENDABLE: f"could not send a batch: shared memory or open files ran out; {FEWER}, {SHARED_MEMORY}, "
    "`ulimit -n` shows the limit of open files",
}
log = logging.getLogger(__name__)


class Batches:
    """The batches of these indices in order, read by `workers` processes, or by the caller if that is 0."""

    def __init__(
        self, reader: Reader, indices: Iterable[list[tuple[int, bool]]], workers: int, pin_memory: bool
    ) -> None:
        loader = DataLoader(
            reader,
            batch_sampler=indices,  # type: ignore[arg-type]
            collate_fn=_as_read,
            num_workers=workers,
            pin_memory=pin_memory,
            prefetch_factor=PREFETCH if workers else None,
            timeout=1 if workers else 0,
            worker_init_fn=_begin_worker,
            generator=torch.Generator(),  # else it would draw from the global generator
        )
        self._iterator = _begun(loader)
        self._workers = worker_processes(self._iterator)
        self._taken, self._waiting, self._stuck = 0, False, False
        self._ended = threading.Event()
        if self._workers:
            threading.Thread(target=self._watch, daemon=True).start()

    def take(self) -> Batch:
        """The next batch. Errors: `InputError`, in one line, for all that can end in a worker."""
        self._waiting = True
        forget_received()
        try:
            while True:
                try:
                    return next(self._iterator)
                except Exception as error:
                    if not (self._workers and timed_out(error)) or self._stuck:
                        unknown = f"data: {type(error).__name__}: {first_line(error)}"
                        raise InputError(self._death(error) or unknown) from error
        finally:
            self._waiting, self._taken = False, self._taken + 1

    def _watch(self) -> None:
        """Warn when a batch takes long, and kill stuck workers, for receiving from one of them may never return."""
        taken = seconds = 0
        while not self._ended.wait(1):  # counted, for while the process is suspended no time passes
            seconds = seconds + 1 if self._waiting and taken == self._taken else 0
            taken = self._taken
            if seconds and seconds % REMIND == 0:
                log.warning(_stuck(seconds))
            if seconds >= STUCK:
                self._stuck = True
                for worker in self._workers:
                    worker.kill()

    def _death(self, error: Exception) -> str | None:
        """What ended a worker, if one has ended or is about to: a crash takes time to write its report."""
        if self._stuck:
            return f"{_stuck(STUCK)}; {FEWER} and shows where it waits"
        cut = isinstance(error, EOFError | ConnectionError)  # a crashed worker's core may be written for long
        ended = multiprocessing.connection.wait([w.sentinel for w in self._workers], timeout=20 if cut else 1)
        for number, worker in enumerate(self._workers):
            if worker.sentinel in ended:
                worker.join()  # its status comes a moment after its files are closed
            if (status := worker.exitcode) is not None:
                return f"data: worker {number} {REASONS.get(status) or _reason(status)}"
        return None

    def end(self) -> None:
        """End the workers; kill those that do not end in time."""
        self._ended.set()
        workers, self._workers = self._workers, []
        if not workers:
            return
        deadline = time.monotonic() + PATIENCE
        try:
            if ask_workers_to_end(self._iterator):
                for worker in workers:
                    worker.join(max(0, deadline - time.monotonic()))
        finally:
            for worker in workers:
                worker.kill()
            for worker in workers:
                worker.join(2)


def _begun(loader: DataLoader) -> Any:
    """A data loader's iterator, whose workers ignore the stop signals from the start."""
    others = set(multiprocessing.active_children())
    before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    try:
        iterator = iter(loader)
    except OSError as error:
        for worker in set(multiprocessing.active_children()) - others:
            worker.kill()
        raise InputError(f"data: cannot start {loader.num_workers} workers: {first_line(error)}; {FEWER}") from error
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    forget_workers(iterator)  # PyTorch would raise in whatever runs when a worker dies; `take` looks after them
    return iterator


def _as_read(batch: Any) -> Any:
    return batch


def _stuck(seconds: int) -> str:
    return f"data: no batch came for {seconds} s: a worker is stuck in a read, or its storage is slow"


def _reason(status: int) -> str:
    if status == UNNAMEABLE:
        got = printable(tempfile.gettempdir())
        return (
            f"could not send a batch: TMPDIR: expected a path of at most {SOCKETS_FOLDER} bytes, for sockets, got {got}"
        )
    if status >= 0:
        return f"ended with exit status {status}: the data end the process; --workers 0 shows where"
    name = signal.Signals(-status).name
    return f"was ended by {name}: the data, or a package they use, crashed; --workers 0 shows where"


def _begin_worker(number: int) -> None:
    """Ignore the stop signals, which reach the whole process group: workers must still deliver the last batches."""
    for stop in STOP_SIGNALS:
        signal.signal(stop, signal.SIG_IGN)
    on_unsendable(_leave)
    sys.excepthook = _unless_refused
    after_parent(lambda: os._exit(1))  # even while this one is stuck in a read


def _unless_refused(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report what ended a thread that hands out batches, unless it is a reader that a stop signal called away."""
    if not issubclass(kind, EOFError | OSError):
        sys.__excepthook__(kind, error, trace)


def _leave(error: Exception, batch: object) -> None:
    os._exit(UNNAMEABLE if "AF_UNIX path too long" in str(error) else UNSENDABLE)


def after_parent(act: Callable[[], object]) -> None:
    """Call `act`, in a thread, once the process that started this one has ended."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        act()

    threading.Thread(target=watch, daemon=True).start()
