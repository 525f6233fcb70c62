"""Output that cannot stop a command: a closed pipe or terminal, or a picture that fails, costs that output alone.

Warnings are logged; while a command runs, each is a line of its own.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import select
import sys
from collections.abc import Iterator
from typing import Any, TextIO

from pmf.errors import first_line

GONE = (errno.EPIPE, errno.EIO, errno.EBADF, errno.ENXIO)
"""What writing to a terminal or a pipe raises once its reader has gone."""
log = logging.getLogger(__name__)


class SoftStream:
    """A text stream whose writes do not fail. Once the reader has gone, what is written goes to /dev/null."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or lose, the text."""
        self._softly(lambda: self._stream.write(text))
        return len(text)

    def flush(self) -> None:
        """Flush what is written."""
        self._softly(self._stream.flush)

    def _softly(self, work: Any) -> None:
        try:
            work()
        except (ValueError, RuntimeError):  # it is closed, or a signal's handler interrupts a write
            pass
        except OSError as error:
            if error.errno in GONE:
                with contextlib.suppress(OSError, ValueError):
                    silence(self._stream)


def silence(stream: TextIO) -> None:
    """Let a stream's descriptor refer to /dev/null."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)


def silence_the_unread() -> None:
    """Silence standard output and error where their reader leaves no room, so that writing does not wait for it."""
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):  # it is closed, or no file
            if not select.select([], [stream.fileno()], [], 0)[1]:
                silence(stream)


@contextlib.contextmanager
def soft_output() -> Iterator[None]:
    """Make standard output and error soft, and let them print every name: what cannot be encoded is escaped."""
    before = sys.stdout, sys.stderr
    for stream in before:
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    soft = [SoftStream(stream or open(os.devnull, "w")) for stream in before]  # noqa: SIM115 (None if it was closed)
    sys.stdout, sys.stderr = soft  # type: ignore[assignment]
    try:
        yield
    finally:
        for stream in soft:
            stream.flush()
        sys.stdout, sys.stderr = before


class _Lines(logging.Handler):
    """Prints what is logged on standard error, a line each, above a progress bar."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        text = " ".join(record.getMessage().split())
        tqdm.write(f"pmf: {record.levelname.lower()}: {text}", file=sys.stderr)


@contextlib.contextmanager
def logged_lines() -> Iterator[None]:
    """Inside the context, print the package's warnings as lines `pmf: warning: ...`."""
    logger, handler = logging.getLogger("pmf"), _Lines(logging.WARNING)
    logger.addHandler(handler)
    try:
        yield
    finally:
        logger.removeHandler(handler)


@contextlib.contextmanager
def decoration(what: str) -> Iterator[None]:
    """Turn any failure of the `with` block, which makes `what`, into a warning of one line."""
    try:
        yield
    except Exception as error:  # pictures are drawn by packages that raise anything
        log.warning("%s failed, and the run goes on without it: %s", what, first_line(error))
