"""Work beside training: a thread for one job at a time, and copies of tensors that do not stop the device."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from pmf.private import foreach_copy_

PATIENCE = 10.0
"""Seconds that the end of the process leaves to a job."""
ALIGNMENT = 64
"""Bytes to which each staged tensor is aligned."""


class Background:
    """Runs one job at a time on a thread. A job that fails is the last one: every later call raises its error.

    The thread never keeps the process alive: its end waits for a job for `PATIENCE` seconds, then forgets it.
    """

    def __init__(self) -> None:
        self._threads: list[threading.Thread] = []
        self._error: BaseException | None = None
        # A thread that Python's shutdown finds inside PyTorch could abort the process.
        weakref.finalize(self, _join, self._threads, PATIENCE)

    def run(self, job: Callable[[], None]) -> None:
        """Start a job, once the one before it is done."""
        self.wait()
        self._threads.append(threading.Thread(target=self._run, args=(job,), name="pmf-background", daemon=True))
        self._threads[0].start()

    def wait(self) -> None:
        """Wait until the job is done; raise its error."""
        _join(self._threads)
        self._threads.clear()
        self.check()

    def check(self) -> None:
        """Raise the error of a job that has failed."""
        if self._error is not None:
            raise self._error

    def _run(self, job: Callable[[], None]) -> None:
        try:
            job()
        except BaseException as error:
            self._error = error


def _join(threads: Sequence[threading.Thread], timeout: float | None = None) -> None:
    for thread in threads:
        if thread is not threading.current_thread():  # the job, which may be the last to hold its `Background`
            thread.join(timeout)


class Staging:
    """Copies of tensors in one buffer on the host. From a GPU it is pinned and filled on a stream of its own."""

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        sizes = [-(-t.nbytes // ALIGNMENT) * ALIGNMENT for t in tensors]
        self.device = next((t.device for t in tensors if t.is_cuda), None)
        buffer = torch.empty(sum(sizes), dtype=torch.uint8, device="cpu", pin_memory=self.device is not None)
        parts = zip(buffer.split(sizes), tensors, strict=True)
        self.copies = [part[: t.nbytes].view(t.dtype).view(t.shape) for part, t in parts]
        self._stream = None if self.device is None else torch.cuda.Stream(self.device)
        self._copied: torch.cuda.Event | None = None

    def fill(self, tensors: Sequence[Tensor]) -> None:
        """Start copying these tensors, as the work that is queued on their device leaves them."""
        if self._stream is None:
            foreach_copy_(self.copies, list(tensors))
            return
        self._stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self._stream):
            foreach_copy_(self.copies, list(tensors), non_blocking=True)
            self._copied = self._stream.record_event()

    def wait(self) -> list[Tensor]:
        """The copies, once they are done."""
        if self._copied is not None:
            self._copied.synchronize()
        return self.copies

    def release(self) -> None:
        """Let the device's further work begin after the copies, so that it may overwrite the tensors."""
        if self._copied is not None:
            torch.cuda.current_stream(self.device).wait_event(self._copied)
