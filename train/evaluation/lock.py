"""One evaluation at a time may compute and read the same features."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pmf.errors import InputError
from pmf.train.directory_lock import Lock, acquire
from pmf.train.distributed import World

PAUSE = 0.2
"""Seconds between attempts."""


@contextlib.contextmanager
def alone(file: Path, world: World, stopping: Callable[[], bool]) -> Iterator[bool]:
    """Hold a lock file, which all processes of this evaluation share; give False if it stopped before it got it.

    Other evaluations that want the file wait, also on other machines of a shared file system. The lock of a process
    that dies is free. Errors: `InputError` if the file cannot be written.
    """
    lock: Lock | None = None

    def wait() -> bool:
        nonlocal lock
        lock = _waited_for(file, stopping)
        return lock is not None

    held = world.main_first(wait)
    try:
        yield held
    finally:
        if lock is not None:
            lock.release()


def _waited_for(file: Path, stopping: Callable[[], bool]) -> Lock | None:
    told = False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while not stopping():
            lock = acquire(file)
            if isinstance(lock, Lock):
                return lock
            if not told:
                print(f"pmf: {lock} computes {file.name}; waiting for it", file=sys.stderr, flush=True)
                told = True
            time.sleep(PAUSE)
    except OSError as error:
        raise InputError(f"out: cannot write {file}: {error.strerror}") from error
    return None
