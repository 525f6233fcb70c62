"""Stop requests: Ctrl-C, a closed terminal, SIGTERM and others ask the loop to save and stop after its current step.

What runs for longer asks `stop_together` between its parts.
"""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from pmf.data.workers import STOP_SIGNALS
from pmf.train.distributed import World
from pmf.train.terminal import silence_the_unread


class Stopped(Exception):  # noqa: N818 (it is no error)
    """A stop was asked for, of any process; every process raises it. What is computed is kept."""


def never() -> bool:
    """Nothing asks for a stop."""
    return False


def stop_together(world: World, stopping: Callable[[], bool]) -> None:
    """Raise `Stopped` in every process if `stopping` holds in any. Every process must call."""
    if stopping is never:
        return
    asked = torch.tensor(int(stopping()))
    if world.size > 1:
        dist.all_reduce(asked, dist.ReduceOp.MAX, group=world.group)
    if asked.item():
        raise Stopped


class StopWaiting(BaseException):
    """Ends a wait for images that a stop signal made pointless. Code that reads images does not catch it."""


class StopRequest:
    """While entered, a stop signal sets `requested`, and says so at once if `told`. Further ones change nothing.

    A signal that is ignored on entry, as a hangup under nohup or Ctrl-C in a script's background, stays ignored.
    """

    def __init__(self, told: bool = True) -> None:
        self.requested, self.told, self.waiting = False, told, False

    def __enter__(self) -> StopRequest:
        numbers = [number for number in STOP_SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._request) for number in numbers}
        return self

    def is_requested(self) -> bool:
        """Whether a stop signal has come."""
        return self.requested

    def _request(self, number: int, frame: object) -> None:
        now = "is still about to save" if self.requested else "saves and stops after the step it is in"
        self.requested = True
        silence_the_unread()  # a run that waits for its reader would not stop
        if self.told:
            end = f"kill -9 {os.getpid()} ends it unsaved"
            print(f"\n{signal.Signals(number).name}: the run {now} ({end})", file=sys.stderr, flush=True)
        if self.waiting:
            raise StopWaiting

    @contextmanager
    def ends_waiting(self) -> Iterator[None]:
        """A context that a stop signal, before or inside it, leaves at once by `StopWaiting`."""
        self.waiting = True
        try:
            if self.requested:
                raise StopWaiting
            yield
        finally:
            self.waiting = False

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
