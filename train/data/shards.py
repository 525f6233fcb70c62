"""Prepared shards: WebDataset tar files at the training size, each with an index for random access.

A directory holds `dataset.json`, and for each shard `shard-000000.tar` and `shard-000000.npz`: per image its offset
and size in the tar file, label and CRC-32, its key in the source, and what was left out and why. Shard i holds the
source's positions [i n, (i + 1) n), so that any shard can be made again alone.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, require
from pmf.train.data.crop import decode
from pmf.train.data.interface import CorruptImageError

MANIFEST = "dataset.json"
FORMAT = 1
OPEN_FILES = 32


@dataclass(frozen=True)
class Manifest:
    """What `dataset.json` says."""

    source: str
    fingerprint: str
    size: int
    encoding: str
    shard_images: int
    classes: tuple[str, ...] | None = None
    """The classes' names; from the first picture to the last they may be unknown."""
    images: tuple[int, ...] | None = None
    """Images per shard; None until all shards are there."""
    skipped: int = 0
    format: int = FORMAT

    def write(self, directory: Path) -> None:
        """Put it into the directory, atomically."""
        text = json.dumps(vars(self), indent=1) + "\n"
        write_atomically(directory / MANIFEST, lambda temporary: temporary.write_text(text))


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a prepared directory. Errors: `InputError` where there is none, or not a readable one."""
    file = directory / MANIFEST
    require(file.is_file(), f"data: {directory} holds no prepared shards ({MANIFEST})")
    try:
        values = json.loads(file.read_text())
        values |= {name: values[name] and tuple(values[name]) for name in ("classes", "images")}
        manifest = Manifest(**values)
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f"data: {file} is not readable: {error}") from error
    require(manifest.format == FORMAT, f"data: {file} has format {manifest.format}, expected {FORMAT}")
    return manifest


def shard_file(directory: Path, number: int) -> Path:
    """The tar file of that shard; its index has the suffix .npz."""
    return directory / f"shard-{number:06d}.tar"


class ShardWriter:
    """Collects one shard in memory and writes it: the tar file, then its index, which makes it count."""

    def __init__(self, encoding: str) -> None:
        self.encoding = encoding
        self.entries: list[tuple[int, bytes, int]] = []
        self.keys: list[str] = []
        self.skipped: list[tuple[str, str]] = []

    def add(self, position: int, key: str, data: bytes, label: int) -> None:
        """An image; its entry is named by its position in the source."""
        self.entries.append((position, data, label))
        self.keys.append(key)

    def skip(self, key: str, reason: str) -> None:
        """A picture that is left out."""
        self.skipped.append((key, reason))

    def write(self, file: Path) -> None:
        """Write both files, atomically. Errors: `InputError` on a full disk and the like."""
        rows: list[tuple[int, int, int, int]] = []
        write_atomically(file, lambda temporary: rows.extend(self._write_tar(temporary)))
        arrays: dict[str, Any] = dict(
            rows=np.array(rows, np.int64).reshape(-1, 4),
            keys=np.frombuffer(json.dumps(self.keys).encode(), np.uint8),
            skipped=np.frombuffer(json.dumps(self.skipped).encode(), np.uint8),
            bytes=np.int64(file.stat().st_size),
        )
        write_atomically(file.with_suffix(".npz"), lambda temporary: np.savez_compressed(temporary, **arrays))

    def _write_tar(self, path: Path) -> Iterator[tuple[int, int, int, int]]:
        """Write the entries, without owner or time; yields offset, size, label and CRC-32 of each image."""
        with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
            for position, data, label in self.entries:
                # An entry is a header of one block, then its bytes.
                yield tar.offset + tarfile.BLOCKSIZE, len(data), label, zlib.crc32(data)
                for suffix, content in ((self.encoding, data), ("cls", str(label).encode())):
                    entry = tarfile.TarInfo(f"{position:09d}.{suffix}")
                    entry.size, entry.mode = len(content), 0o644
                    tar.addfile(entry, io.BytesIO(content))


@dataclass(frozen=True)
class ShardIndex:
    """The index of one shard."""

    rows: np.ndarray
    """int64 [images, 4]: offset, size, label, CRC-32."""
    keys: list[str]
    skipped: list[tuple[str, str]]
    bytes: int
    """Size of the tar file."""


def read_index(file: Path) -> ShardIndex:
    """The index of the shard in `file`. Errors: `InputError` where it is missing or torn."""
    try:
        with np.load(file.with_suffix(".npz")) as index:
            keys, skipped = (json.loads(index[name].tobytes()) for name in ("keys", "skipped"))
            return ShardIndex(index["rows"], keys, [tuple(pair) for pair in skipped], int(index["bytes"]))
    except Exception as error:  # a torn archive can make its reader fail in any way
        raise InputError(f"data: {file.with_suffix('.npz')} is missing or torn ({type(error).__name__})") from error


class PreparedShards:
    """Training data from a directory that `pmf data prepare` filled: uint8 [3, H, W] and labels, read by index.

    Every process opens shards for itself, a few at a time, and reads with positioned reads; what is read is checked
    against its CRC-32. Errors: `InputError` where the directory is not complete.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        self.manifest = read_manifest(self.directory)
        require(
            self.manifest.images is not None,
            f"data: {directory} is not complete, expected `pmf data prepare {self.manifest.source}` to be run to its "
            "end",
        )
        files = [shard_file(self.directory, number) for number in range(len(self.manifest.images))]
        indices = [read_index(file) for file in files]
        for file, index in zip(files, indices, strict=True):
            size = file.stat().st_size if file.is_file() else 0
            require(size == index.bytes, f"data: {file} is missing or torn: {size} bytes, expected {index.bytes}")
        self._rows = np.concatenate([index.rows for index in indices])
        self._ends = np.cumsum([len(index.rows) for index in indices])
        self._open: dict[int, int] = {}

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.manifest.size, self.manifest.size

    @property
    def classes(self) -> tuple[str, ...]:
        """The classes' names."""
        return self.manifest.classes

    @property
    def num_classes(self) -> int:
        """How many classes the source names, or one more than its largest label."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label). Errors: `CorruptImageError` names the shard and the picture's key in the source."""
        offset, size, label, checksum = self._rows[index].tolist()
        shard = int(np.searchsorted(self._ends, index, side="right"))
        data = bytearray(size)
        try:
            got = os.preadv(self._descriptor(shard), [data], offset)
        except OSError as error:
            raise self._corrupt(shard, index, str(error.strerror)) from error
        if got != size or zlib.crc32(data) != checksum:
            raise self._corrupt(shard, index, "its checksum is not the one it was written with")
        if self.manifest.encoding != "npy":
            return torch.from_numpy(decode(data)), label
        pixels = int(np.prod(self.image_shape))
        return torch.frombuffer(data, dtype=torch.uint8, offset=size - pixels).view(self.image_shape), label

    def _corrupt(self, shard: int, index: int, reason: str) -> CorruptImageError:
        file = shard_file(self.directory, shard)
        first = self._ends[shard - 1] if shard else 0
        return CorruptImageError(f"{file.name}: {read_index(file).keys[index - first]}", reason)

    def _descriptor(self, shard: int) -> int:
        if shard not in self._open:
            if len(self._open) == OPEN_FILES:
                os.close(self._open.pop(next(iter(self._open))))
            self._open[shard] = os.open(shard_file(self.directory, shard), os.O_RDONLY)
        return self._open[shard]

    def __getstate__(self) -> dict:
        return vars(self) | {"_open": {}}

    def __del__(self) -> None:
        for descriptor in vars(self).get("_open", {}).values():
            os.close(descriptor)
