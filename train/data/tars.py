"""Samples in tar archives in WebDataset's layout: consecutive entries whose names differ in the suffix are one sample.

The archives are read here, not by the package webdataset: it opens addresses by commands in a shell, and takes an
archive that was cut between two entries for a whole one.
"""

from __future__ import annotations

import math
import os
import re
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import fsspec

from pmf.errors import InputError, first_line, printable, require
from pmf.pictures import MAX_BYTES, SUFFIXES, is_litter
from pmf.train.data.samples import check_address

PICTURES = tuple(suffix[1:] for suffix in SUFFIXES)
SEEN = 1 << 20
"""Bytes after an archive's end that are looked at; there are zeros, at most 10 KiB in most."""
MAX_SHARDS = 1_000_000
READ = {*PICTURES, "cls", "json"}


def expand(pattern: str) -> list[str]:
    """The files and addresses that a pattern with braces names. Errors: `InputError` if one would run a command."""
    import braceexpand

    sizes = [abs(int(last) - int(first)) + 1 for first, last in re.findall(r"\{(-?\d+)\.\.(-?\d+)", pattern)]
    require(
        math.prod(sizes) <= MAX_SHARDS,
        lambda: f"source: {pattern} names {math.prod(sizes):,} shards, expected at most {MAX_SHARDS:,}",
    )
    try:
        urls = [url.removeprefix("file:") if "://" not in url else url for url in braceexpand.braceexpand(pattern)]
    except ValueError as error:
        raise InputError(f"source: cannot expand {pattern!r}: {first_line(error)}") from error
    for url in urls:
        require(not url.startswith("pipe:"), f"source: {url} would run a command, expected files or addresses")
        check_address(url)
    return urls


def is_local(url: str) -> bool:
    """Whether a file of this machine is meant."""
    return "://" not in url


def rows(urls: list[str], start: int) -> Iterator[dict[str, str | bytes]]:
    """Yield the samples from position `start` on: suffix -> bytes of the entries in READ, and the name as "key".

    Errors: `InputError` names the archive that is cut or cannot be read.
    """
    position = 0
    for url in urls:
        try:
            with _opened(url) as file:
                for row in _rows(file, start - position):
                    if position >= start:
                        yield row
                    position += 1
        except Exception as error:
            raise InputError(f"source: {printable(url)} is cut or cannot be read: {first_line(error)}") from error


def _opened(url: str) -> BinaryIO:
    return open(url, "rb") if is_local(url) else fsspec.open(url, "rb").open()


def _rows(file: BinaryIO, first: int) -> Iterator[dict[str, str | bytes]]:
    """The samples of an archive; bytes of the i-th are read only if i >= `first`."""
    seekable = file.seekable()
    row: dict[str, str | bytes] = {}
    seen = 0
    with tarfile.open(fileobj=file, mode="r:*" if seekable else "r|*") as archive:
        for member in archive:
            name = _split(member.name) if member.isfile() else None
            if name is None:
                continue
            key, suffix = name
            if row and row["key"] != key:
                yield row
                row, seen = {}, seen + 1
            row = row or {"key": key}
            require(suffix not in row, f"it holds {printable(member.name)} twice")
            if suffix in READ:
                read = seen >= first and member.size <= MAX_BYTES
                entry = archive.extractfile(member) if read else None
                row[suffix] = entry.read() if entry else b""
        if seekable:
            _check_end(archive)
    if row:
        yield row


def _check_end(archive: tarfile.TarFile) -> None:
    """Raise `InputError` unless an empty block follows the last entry, as at the end of every whole archive."""
    file = archive.fileobj
    assert file is not None
    file.seek(archive.offset)
    block = file.read(tarfile.BLOCKSIZE)
    require(block == bytes(tarfile.BLOCKSIZE), "it has no end: download or write it again")
    more = "something follows its end, as in archives written one after another into one file: expected one archive"
    require(not any(file.read(SEEN)), more)


def _split(name: str) -> tuple[str, str] | None:
    """Name and suffix of an entry, which begins at the first dot of the file's name; None for litter."""
    folder, base = os.path.split(name)
    stem, dot, suffix = base.partition(".")
    meta = stem.startswith("__") and stem.endswith("__")
    if not stem or not dot or meta or any(is_litter(part) for part in Path(name).parts if part != ".."):
        return None
    return os.path.join(folder, stem), suffix.lower()
