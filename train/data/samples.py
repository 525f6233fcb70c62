"""What a source gives: labelled pictures in a fixed order, and a digest by which a changed source is noticed."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import fsspec

from pmf.errors import InputError, first_line, printable, require
from pmf.pictures import MAX_BYTES, read_file


class Sample(NamedTuple):
    """One picture of a source, still encoded. Values that the source lacks are None."""

    key: str
    picture: bytes | Path | str | None
    """Its bytes, or the file or URL that holds them."""
    label: int | None

    def read(self) -> bytes:
        """Return the picture's bytes. Errors: `InputError` if there are none, and whatever reading raises."""
        data = self.picture
        if isinstance(data, str) and "://" in data:
            check_address(data)
            with fsspec.open(data) as file:
                data = bytes(file.read(MAX_BYTES + 1))
        elif isinstance(data, Path | str):
            data = read_file(data)
        require(bool(data) and len(data or b"") <= MAX_BYTES, f"it has no bytes, or more than {MAX_BYTES:,}")
        assert isinstance(data, bytes)
        return data


def check_address(url: str) -> None:
    """Raise `InputError` if a link of an address's chain is fsspec's reference://: its templates can run code."""
    plain = not any(link.startswith("reference:") for link in url.split("::"))
    require(plain, f"{printable(url)} fills in templates, expected the address of a file")


@dataclass(frozen=True)
class Source:
    """Labelled pictures in a fixed order."""

    read_from: Callable[[int], Iterator[Sample]]
    fingerprint: str
    """Digest of names, sizes, times and classes of local files, else of row count, columns and addresses."""
    classes: tuple[str, ...] = ()
    """Class names; empty if the source does not name its classes."""
    folder: Path | None = None
    """Where its pictures lie, each in a file."""

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """Yield the pictures from position `start` on. Errors: `InputError` if reading fails."""
        try:
            yield from self.read_from(start)
        except InputError:
            raise
        except Exception as error:  # packages raise whatever their readers raise
            raise InputError(f"source: cannot be read to its end: {first_line(error)}") from error


def digest(parts: Iterable[object]) -> str:
    """SHA-256 of parts, 32 digits; names may hold any bytes."""
    whole = hashlib.sha256()
    for part in parts:
        whole.update(str(part).encode(errors="surrogateescape") + b"\0")
    return whole.hexdigest()[:32]


def listed(file: str | os.DirEntry) -> tuple[int, int]:
    """(size, time of the last change in ns) of a file, by which a change is noticed; (-1, -1) if it is missing."""
    try:
        state = os.stat(file)
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ELOOP):
            raise
        return -1, -1  # a link that leads nowhere, or to itself
    return state.st_size, state.st_mtime_ns
