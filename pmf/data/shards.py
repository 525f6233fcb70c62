"""Prepared images: Arrow files at the training size, mapped into memory and read by index.

Shard i of a directory, `shard-00000i.arrow`, has one row for each position [i n, (i + 1) n) of the source, so that a
single shard can be made again. A row holds the image, its label, its key in the source, and a checksum of image and
label; or, if the picture cannot be used, the reason. The metadata records the shard's source, settings and number, and
what its pictures lost. The last shard has fewer than n rows, possibly none. `classes.txt` names the classes, one per
line, and is written last.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.data.training_data import CorruptImageError
from pmf.errors import InputError, check_path, extra, first_line, printable, reason_of, require
from pmf.pictures import MAX_SIDE, open_picture, read_file, to_rgb

with extra("data", "data: prepared images need"):
    import PIL.Image  # noqa: F401
    import pyarrow as pa
    import pyarrow.compute as pc
    import xxhash

CLASSES_FILE = "classes.txt"
COLUMNS = dict(image=pa.large_binary(), label=pa.int32(), key=pa.string(), checksum=pa.int64(), reason=pa.string())
SCHEMA = pa.schema(COLUMNS)
ENCODINGS = ("npy", "png", "jpg")
BATCH = 64
"""Number of rows gathered before they are copied into Arrow."""


@dataclass(frozen=True)
class Settings:
    """A shard's source and how it was prepared; the same for all shards of a directory."""

    source: str
    fingerprint: str
    size: int
    encoding: str
    """npy (raw bytes of uint8 [3, size, size]), png or jpg."""
    shard_images: int
    """Positions of the source per shard, the n above."""


def shard_file(directory: Path, number: int) -> Path:
    """The file of that shard."""
    return directory / f"shard-{number:06d}.arrow"


def shard_number(file: Path) -> int:
    """The number in a shard's file name. Errors: `InputError` if the name is not that of a shard."""
    number = file.stem.removeprefix("shard-")
    whole = number.isascii() and number.isdigit() and file.name == shard_file(file.parent, int(number)).name
    require(whole, f"data: {file} does not have the name of a shard, expected no other *.arrow than shard-NNNNNN.arrow")
    return int(number)


def checksum(image: bytes | pa.Buffer, label: int) -> int:
    """XXH3 of an image's bytes, seeded by its label: 63 of its 64 bits, to fit into int64."""
    return xxhash.xxh3_64_intdigest(image, seed=label) >> 1


def write_shard(file: Path, settings: Settings, rows: Iterator[dict[str, Any]], lost: Counter[str]) -> None:
    """Write the rows of a shard, atomically; `lost`, which `rows` may fill, counts what pictures lost.

    Errors: see `write_atomically`.
    """
    batches = []
    while some := list(itertools.islice(rows, BATCH)):
        batches.append(pa.RecordBatch.from_pylist(some, SCHEMA))
    table = pa.Table.from_batches(batches, SCHEMA)
    counts = dict(rows=str(len(table)), number=str(shard_number(file)), lost=json.dumps(dict(sorted(lost.items()))))
    table = table.replace_schema_metadata({"settings": json.dumps(asdict(settings)), **counts})

    def write(temporary: Path) -> None:
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    write_atomically(file, write)


def open_shard(file: Path) -> pa.Table:
    """Map a shard into memory. Errors: `InputError` if it is missing or torn, or is another shard by its number."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)  # else a flipped bit in an offset could crash the process
        settings = settings_of(table)
        metadata = table.schema.metadata
        whole = table.schema == SCHEMA and len(table) == int(metadata[b"rows"]) <= settings.shard_images
        whole = whole and _whole_columns(table, settings) and sum(lost_of(table).values()) >= 0
        number = int(metadata.get(b"number", shard_number(file)))  # earlier versions did not write it
    except Exception as error:  # a flipped bit can make any of this fail
        raise InputError(f"data: {file} is missing or torn: {first_line(error)}") from error
    require(whole, f"data: {file} is torn: it does not hold what was written")
    exchanged = f"data: {file} was written as shard-{number:06d}.arrow: shards were exchanged or renamed"
    require(number == shard_number(file), exchanged)
    return table


def _whole_columns(table: pa.Table, settings: Settings) -> bool:
    """Whether each row has an image of the right size and a label, or a reason."""
    there = table["image"].is_valid()
    labels = table["label"].filter(there).to_numpy()
    lengths = set(pc.unique(pc.binary_length(table["image"])).to_pylist()) - {None}
    return (
        there.equals(table["reason"].is_null())
        and all(table[name].null_count == 0 for name in ("label", "key", "checksum"))
        and labels.min(initial=0) >= 0
        and (settings.encoding != "npy" or lengths <= {3 * settings.size**2})
    )


def settings_of(table: pa.Table) -> Settings:
    """The settings that a shard was made with. Errors: `ValueError` and others if they cannot be right."""
    settings = Settings(**json.loads(table.schema.metadata[b"settings"]))
    if not (0 < settings.size <= MAX_SIDE and settings.shard_images > 0 and settings.encoding in ENCODINGS):
        raise ValueError(f"its settings are {settings}")
    return settings


def lost_of(table: pa.Table) -> Counter[str]:
    """What pictures of a shard lost, see `pmf.pictures.to_rgb`, and how many."""
    return Counter(json.loads(table.schema.metadata.get(b"lost", b"{}")))


def read_classes(file: Path, argument: str) -> tuple[str, ...]:
    """Class names from a text file, one a line. Errors: `InputError` for `argument` if the file cannot be read."""
    try:
        return tuple(read_file(file).decode("utf-8-sig").splitlines())
    except (OSError, InputError, UnicodeDecodeError) as error:
        raise InputError(f"{argument}: {printable(file)} cannot be read: {reason_of(error)}") from error


def check_classes(names: tuple[str, ...], argument: str) -> None:
    """Raise `InputError` unless all names are different, not empty and one line of UTF-8 each."""
    require(len(names) > 0, f"{argument}: expected the names of the classes, one a line, got none")
    lines: dict[str, int] = {}
    for line, name in enumerate(names, 1):
        whole = name.strip() != "" and name.splitlines() == [name] and "\0" not in name
        whole = whole and name.encode(errors="replace").decode() == name
        if not whole:
            raise InputError(f"{argument}: class {line} is called {printable(name)!r}, expected one line of UTF-8")
        same = f"{argument}: classes {lines.get(name)} and {line} are both called {name!r}, expected different names"
        require(name not in lines, same)
        lines[name] = line


def _open_all(directory: Path) -> list[pa.Table]:
    """The shards of a directory. Errors: `InputError` unless all are there and whole, and were prepared together."""
    begun = {shard_number(file) for file in directory.glob("shard-*.arrow")}
    tables, torn = [], []
    for number in range(max(begun, default=-1) + 1):
        file = shard_file(directory, number)
        try:
            require(number in begun, f"data: {file} is missing or torn: there is no such file")
            tables.append(open_shard(file))
        except InputError as error:
            torn.append(str(error))
    ended = bool(begun) and (directory / CLASSES_FILE).exists()
    require(ended, f"data: {directory} is not complete, expected `pmf data prepare` to be run to its end")
    more = f" and {len(torn) - 10} more" if len(torn) > 10 else ""
    named = f"{'; '.join(torn[:10])}{more}"
    require(not torn, f"{named}: remove these shards and run `pmf data prepare` again")
    settings = settings_of(tables[0])
    for number, table in enumerate(tables):
        file = shard_file(directory, number)
        require(settings_of(table) == settings, f"data: {file} was prepared otherwise than the shards before it")
        full = len(table) == settings.shard_images or number == len(tables) - 1
        require(
            full, f"data: {file} has {len(table)} rows, expected {settings.shard_images}: shards of others follow it"
        )
    short = len(tables[-1]) < settings.shard_images
    require(short, f"data: {directory} lacks its last shard: run `pmf data prepare` again")
    return tables


class PreparedShards:
    """Training data from a directory that `pmf data prepare` filled: uint8 [3, H, W] and labels, read by index.

    Processes share the mapped files. Every image is checked against its checksum when it is read.
    Errors: `InputError` if the directory is not complete, was prepared by an earlier version, or has missing or torn
    shards, all of which it names.
    """

    def __init__(self, directory: str | Path) -> None:
        check_path("directory", directory, "directory")
        self.directory = Path(directory)
        _refuse_earlier_version(self.directory)
        tables = _open_all(self.directory)
        self.settings = settings_of(tables[0])
        table = pa.concat_tables(tables)
        self._images, self._keys = table["image"].chunks, table["key"]
        self._starts = np.cumsum([0, *map(len, self._images)])
        self._labels, self._checksums = table["label"].to_numpy(), table["checksum"].to_numpy()
        self._rows = np.flatnonzero(table["image"].is_valid().to_numpy())
        self._sizes = _sizes(self.directory, len(tables))
        self.classes = read_classes(self.directory / CLASSES_FILE, "data")
        """The classes' names."""
        labels = 1 + int(self._labels[self._rows].max(initial=-1))
        named = f"data: {directory}: expected names of {labels} classes in {CLASSES_FILE}, got {len(self.classes)}"
        require(labels <= len(self.classes), named)

    def __reduce__(self) -> tuple[type[PreparedShards], tuple[Path]]:
        return PreparedShards, (self.directory,)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(3, size, size)."""
        return 3, self.settings.size, self.settings.size

    @property
    def num_classes(self) -> int:
        """Number of classes that the source names, or one more than its largest label."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._rows)

    @functools.cached_property
    def fingerprint(self) -> str:
        """Digest of size, encoding, class names, labels and the images' checksums."""
        digest = xxhash.xxh3_128(repr((self.settings.size, self.settings.encoding, self.classes)).encode())
        digest.update(self._labels[self._rows].data)
        digest.update(self._checksums[self._rows].data)
        return digest.hexdigest()

    def stored(self, index: int) -> tuple[pa.Buffer, int]:
        """(bytes, label), checked. Errors: `CorruptImageError` names the shard and the picture's key in the source."""
        row = self._rows[index].item()
        self._check_size(row // self.settings.shard_images)
        data, label = self._bytes(row), self._labels[row].item()
        if checksum(data, label) != self._checksums[row]:
            raise CorruptImageError(self._name(row), "its checksum is not the one it was written with")
        return data, label

    def _bytes(self, row: int) -> pa.Buffer:
        """The mapped bytes of a row's image; Arrow's own access to a row copies them."""
        number = self._starts.searchsorted(row, side="right").item() - 1
        image = self._images[number].slice(row - self._starts[number].item(), 1)
        _, offsets, images = image.buffers()
        begin, end = np.frombuffer(offsets, np.int64, 2, 8 * image.offset).tolist()
        return images.slice(begin, end - begin)

    def _check_size(self, number: int) -> None:
        """Refuse a shard that was cut since it was mapped: reading it would end the process with SIGBUS."""
        file, (inode, size) = self._sizes[number]
        try:
            now = os.stat(file)
        except OSError:  # it was removed or cannot be reached; what is mapped may still be read
            return
        if now.st_ino == inode and now.st_size < size:
            raise InputError(f"data: {file} became shorter while it was in use: run `pmf data prepare` again")

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label). Errors: see `stored`."""
        data, label = self.stored(index)
        if self.settings.encoding == "npy":
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.image_shape), label
        try:
            picture = open_picture(pa.BufferReader(data))
            require(picture.size == self.image_shape[1:], f"it has {picture.size} pixels")
            return torch.from_numpy(np.array(to_rgb(picture))).permute(2, 0, 1).contiguous(), label
        except Exception as error:  # decoders may raise anything
            raise CorruptImageError(self._name(self._rows[index].item()), first_line(error)) from error

    def _name(self, row: int) -> str:
        """The shard and the key of a row."""
        return f"{shard_file(self.directory, row // self.settings.shard_images).name}: {self._keys[row]}"


def _sizes(directory: Path, count: int) -> list[tuple[str, tuple[int, int]]]:
    """Path, inode and size of each shard."""
    files = [str(shard_file(directory, number)) for number in range(count)]
    return [(file, (state.st_ino, state.st_size)) for file in files for state in (os.stat(file),)]


def _refuse_earlier_version(directory: Path) -> None:
    count = len(list(directory.glob("shard-*.tar")))
    pattern = f"wds:{directory}/shard-{{000000..{count - 1:06d}}}.tar"
    convert = f"`pmf data prepare '{pattern}' --out DIRECTORY` with its size and encoding converts it"
    require(count == 0, f"data: {directory} was prepared by an earlier version; {convert}")
