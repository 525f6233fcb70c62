"""Atomic writes: a file is either complete or absent."""

from __future__ import annotations

import errno
import os
import shutil
import stat
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from safetensors import SafetensorError

from pmf.errors import InputError, check_path, reason_of

FAILURES = (OSError, RuntimeError, ValueError, SafetensorError)
"""What the writers of files raise: Python's own, PyTorch's, pillow's and safetensors'."""
PROBE = 1 << 20
"""Bytes to ask of a file system that failed, to learn why."""
PATIENCE = 5.0
"""Seconds in which a pipe's reader may open it."""


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, then move the temporary file to `path` in one step.

    A file that exists keeps its permissions; a symbolic link stays, and the file that it points to is replaced; a
    device or a pipe receives the bytes. Errors: `InputError` when `path` cannot be written (a directory, a read-only
    file, no permission, a full disk); the old file is then unchanged.
    """
    check_path("path", path)
    path = Path(path)
    try:
        mode = _mode(path)
        if mode is not None and not stat.S_ISREG(mode):
            _copy_into(path, write)
            return
        target = _target(path)
        handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name[:50]}.", suffix=target.suffix[:9])
    except FAILURES as error:
        raise _unwritable(path, error) from error
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        temporary.chmod(_default_mode() if mode is None else stat.S_IMODE(mode))  # mkstemp: for the owner only
        os.replace(temporary, target)
    except FAILURES as error:
        raise _unwritable(path, error, temporary) from error
    finally:
        temporary.unlink(missing_ok=True)


def require_writable(path: str | Path, argument: str) -> None:
    """Raise the `InputError` of `write_atomically` before the work whose result is to be written; it names `argument`.

    The directories above `path` are created, as writing would.
    """
    path = Path(path)
    try:
        mode = _mode(path)
        if mode is None or stat.S_ISREG(mode):
            tempfile.TemporaryFile(dir=_target(path).parent).close()
    except FAILURES as error:
        raise _unwritable(path, error, argument=argument) from error


def torn_files(directory: Path, name: str) -> list[Path]:
    """The temporary files that killed processes left in a directory, of files of this name, which may be a pattern."""
    return list(directory.glob(f".{name}.????????{Path(name).suffix[:9]}"))


def _mode(path: Path) -> int | None:
    """The mode of what is at `path`, links followed; None if nothing is. Errors: OSError if it must not be replaced."""
    try:
        mode = path.stat().st_mode
    except FileNotFoundError:
        return None
    if stat.S_ISDIR(mode):
        raise IsADirectoryError("it is a directory, expected the name of a file")
    if not mode & 0o222:
        raise PermissionError("it is read-only")
    return mode


def _target(path: Path) -> Path:
    """The file to replace, links followed, in a directory that exists from now on."""
    target = Path(os.path.realpath(path))
    target.parent.mkdir(parents=True, exist_ok=True)
    return target


def _copy_into(path: Path, write: Callable[[Path], object]) -> None:
    """Write a temporary file elsewhere and copy it into the device or pipe."""
    with tempfile.TemporaryDirectory(prefix="pmf-") as folder:
        temporary = Path(folder) / f"content{path.suffix[:9]}"
        write(temporary)
        with open(temporary, "rb") as content, _receiver(path) as device:
            shutil.copyfileobj(content, device)


def _receiver(path: Path) -> BinaryIO:
    """A device or a pipe, opened for writing. Errors: `OSError`, also if nobody reads the pipe in time."""
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            handle = os.open(path, os.O_WRONLY | os.O_NONBLOCK)  # else opening a pipe would wait for its reader
            break
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            if time.monotonic() > deadline:
                raise OSError(errno.ENXIO, "it is a pipe that nobody reads") from error
        time.sleep(0.05)
    os.set_blocking(handle, True)
    return open(handle, "wb")


def _default_mode() -> int:
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _unwritable(path: Path, error: BaseException, temporary: Path | None = None, argument: str = "path") -> InputError:
    """The error for `path`. Libraries may not say that the disk is full: then the file system is asked for more."""
    reason = reason_of(error)
    if temporary is not None and not getattr(error, "errno", None) and hasattr(os, "posix_fallocate"):
        try:
            with open(temporary, "ab") as file:
                os.posix_fallocate(file.fileno(), file.tell(), PROBE)
        except OSError as why:
            reason = reason_of(why)
    return InputError(f"{argument}: cannot write {path}: {reason}")
