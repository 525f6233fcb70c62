"""One evaluation at a time may compute and read the same features."""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pmf.errors import InputError
from pmf.train.distributed import World

PAUSE = 0.2
"""Seconds between attempts."""


@contextlib.contextmanager
def alone(file: Path, world: World, stopping: Callable[[], bool]) -> Iterator[bool]:
    """Hold a lock file, which all processes of this evaluation share; give False if it stopped before it got it.

    Other evaluations that want the file wait, also on other machines of a shared file system. The lock of a process
    that dies is free. Errors: `InputError` if the file cannot be written.
    """
    handle: int | None = None

    def acquire() -> bool:
        nonlocal handle
        handle = _acquired(file, stopping)
        return handle is not None

    held = world.main_first(acquire)
    try:
        yield held
    finally:
        if handle is not None:
            file.unlink(missing_ok=True)  # while it is held: who waits for it then looks for a new one
            os.close(handle)


def _acquired(file: Path, stopping: Callable[[], bool]) -> int | None:
    told = False
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        while not stopping():
            handle = os.open(file, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
            if _locked(handle):
                with contextlib.suppress(FileNotFoundError):  # its last holder has removed it
                    if os.path.samestat(os.fstat(handle), file.stat()):
                        return handle
            elif not told:
                print(f"pmf: another evaluation computes {file.name}; waiting for it", file=sys.stderr, flush=True)
                told = True
            os.close(handle)
            time.sleep(PAUSE)
    except OSError as error:
        raise InputError(f"out: cannot write {file}: {error.strerror}") from error
    return None


def _locked(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:  # a file system without locks
        return True
    return True
