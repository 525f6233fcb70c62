"""One writer at a time in a directory: a lock that the system releases when its owner ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path

from pmf.errors import InputError

LOCK_FILE = ".lock"
log = logging.getLogger(__name__)
_held: set[Path] = set()


@contextlib.contextmanager
def locked(directory: Path, argument: str) -> Iterator[None]:
    """Keep other processes that lock this directory out of it inside the context; create it if it is missing.

    Contexts in one process may be nested. The lock is POSIX's: workers do not inherit it, and it works across machines
    on storage that supports it; elsewhere a warning says that nothing is locked. Errors: `InputError` names `argument`
    and the owner if another process holds the lock, or the reason if the directory cannot be written.
    """
    path = directory.resolve() / LOCK_FILE
    if path in _held:
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        file, owner = _acquired(path, f"{argument}: {directory}"), os.getpid()
    except OSError as error:
        raise InputError(f"{argument}: cannot write {directory}: {error.strerror}") from None
    _held.add(path)
    try:
        yield
    finally:
        if os.getpid() == owner:  # and not a worker, forked inside the context
            _held.discard(path)
            path.unlink(missing_ok=True)  # before it is released, so that nobody else's is removed
            os.close(file)


def _acquired(path: Path, what: str) -> int:
    """A descriptor that holds the lock. Closing it, or any other of the same file, releases it."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"
            os.close(file)
            raise InputError(f"{what} is in use by {owner}, expected it to have ended or another directory") from None
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start two runs in it", what, error.strerror)
        if _is_still(path, file):
            break
        os.close(file)  # its owner removed it after we had opened it
    os.truncate(file, 0)
    now = datetime.now().isoformat(" ", "seconds")
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode(), 0)
    return file


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
