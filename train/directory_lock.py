"""One writer at a time: locks that the system releases when their owner ends, however it ends."""

from __future__ import annotations

import contextlib
import fcntl
import logging
import os
import socket
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pmf.errors import InputError

LOCK_FILE = ".lock"
log = logging.getLogger(__name__)
_held: dict[Path, Lock] = {}
_turn = threading.Lock()


@dataclass(frozen=True)
class Lock:
    """A lock file that this process holds."""

    path: Path
    file: int
    owner: int

    def release(self) -> None:
        """Remove the file and release it. A worker forked from the owner does neither."""
        if os.getpid() == self.owner:
            del _held[self.path]
            with contextlib.suppress(OSError):
                if _is_still(self.path, self.file):
                    self.path.unlink()  # before it is released, so that nobody else's is removed
            os.close(self.file)


@contextlib.contextmanager
def locked(directory: Path, argument: str) -> Iterator[None]:
    """Keep other processes that lock this directory out of it inside the context; create it if it is missing.

    Contexts in one process may be nested. The lock is POSIX's: workers do not inherit it, and it works across machines
    on storage that supports it; elsewhere a warning says that nothing is locked. Errors: `InputError` names `argument`
    and the owner if another process holds the lock, or the reason if the directory cannot be written.
    """
    path = directory.resolve() / LOCK_FILE
    if path in _held and _held[path].owner == os.getpid():
        yield
        return
    try:
        directory.mkdir(parents=True, exist_ok=True)
        lock = acquire(path)
    except OSError as error:
        reason = "it is a file, expected a directory" if os.path.isfile(directory) else error.strerror
        raise InputError(f"{argument}: cannot write {error.filename or path}: {reason}") from None
    if not isinstance(lock, Lock):
        raise InputError(f"{argument}: {directory} is in use by {lock}, expected it to have ended or another directory")
    try:
        yield
    finally:
        lock.release()


def acquire(path: Path) -> Lock | str:
    """Lock this file for one owner in this process, or return a description of the process that holds it.

    Closing any descriptor of the file releases the lock, so nothing else may open it. Errors: `OSError`.
    """
    path = path.parent.resolve() / path.name
    with _turn:  # POSIX's locks do not keep one thread from another
        own = _held.get(path)
        if own is not None and own.owner == os.getpid():
            return _description(own.file)
        lock = _acquired(path)
        if isinstance(lock, Lock):
            _held[path] = lock
        return lock


def _acquired(path: Path) -> Lock | str:
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)  # a link may lead to anyone's file
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = _description(file)
            os.close(file)
            return owner
        except OSError as error:
            log.warning("%s cannot be locked (%s): do not start two commands on it", path, error.strerror)
        if _is_still(path, file):
            break
        os.close(file)  # its owner removed it after we had opened it
    os.truncate(file, 0)
    now = datetime.now().isoformat(" ", "seconds")
    os.pwrite(file, f"process {os.getpid()} on {socket.gethostname()}, since {now}\n".encode(), 0)
    return Lock(path, file, os.getpid())


def _description(file: int) -> str:
    """What the owner of a lock wrote into its file."""
    return os.pread(file, 1000, 0).decode(errors="replace").strip() or "another process"


def _is_still(path: Path, file: int) -> bool:
    try:
        return os.path.samestat(path.stat(), os.fstat(file))
    except FileNotFoundError:
        return False
