"""Prepared images: Arrow files at the training size, mapped into memory and read by index.

Shard i of a directory, `shard-00000i.arrow`, has one row for each position [i n, (i + 1) n) of the source, so that a
single shard can be made again. A row holds the image, its label, its key in the source, and a checksum of image and
label; or, if the picture cannot be used, the reason. The metadata records the shard's source and settings. The last
shard has fewer than n rows, possibly none. `classes.txt` names the classes, one per line, and is written last.
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.data.training_data import CorruptImageError
from pmf.errors import InputError, extra, first_line, require

with extra("data", "data: prepared images need"):
    import pyarrow as pa
    import xxhash
    from PIL import Image

CLASSES_FILE = "classes.txt"
COLUMNS = dict(image=pa.large_binary(), label=pa.int32(), key=pa.string(), checksum=pa.int64(), reason=pa.string())
SCHEMA = pa.schema(COLUMNS)
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


def write_shard(file: Path, settings: Settings, rows: Iterator[dict[str, Any]]) -> None:
    """Write the rows of a shard, atomically. Errors: see `write_atomically`."""
    batches = []
    while some := list(itertools.islice(rows, BATCH)):
        batches.append(pa.RecordBatch.from_pylist(some, SCHEMA))
    table = pa.Table.from_batches(batches, SCHEMA)
    table = table.replace_schema_metadata({"settings": json.dumps(asdict(settings)), "rows": str(len(table))})

    def write(temporary: Path) -> None:
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    write_atomically(file, write)


def open_shard(file: Path) -> pa.Table:
    """Map a shard into memory. Errors: `InputError` if it is missing or torn."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)  # else a flipped bit in an offset could crash the process
        settings_of(table)
        whole = table.schema == SCHEMA and len(table) == int(table.schema.metadata[b"rows"])
        whole = whole and table["image"].is_valid().equals(table["reason"].is_null())
    except Exception as error:  # a flipped bit can make any of this fail
        raise InputError(f"data: {file} is missing or torn: {first_line(error)}") from error
    require(whole, f"data: {file} is torn: it does not hold what was written")
    return table


def settings_of(table: pa.Table) -> Settings:
    """The settings that a shard was made with."""
    return Settings(**json.loads(table.schema.metadata[b"settings"]))


class PreparedShards:
    """Training data from a directory that `pmf data prepare` filled: uint8 [3, H, W] and labels, read by index.

    Processes share the mapped files. Every image is checked against its checksum when it is read.
    Errors: `InputError` if the directory is not complete, was prepared by an earlier version, or has missing or torn
    shards, all of which it names.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        _refuse_earlier_version(self.directory)
        begun = [shard_number(file) for file in self.directory.glob("shard-*.arrow")]
        tables, torn = [], []
        for number in range(max(begun, default=0) + 1):
            try:
                tables.append(open_shard(shard_file(self.directory, number)))
            except InputError as error:
                torn.append(str(error))
        ended = bool(begun) and (self.directory / CLASSES_FILE).exists()
        require(ended, f"data: {directory} is not complete, expected `pmf data prepare` to be run to its end")
        require(not torn, f"{'; '.join(torn)}: remove these shards and run `pmf data prepare` again")
        self.settings = settings_of(tables[0])
        short = len(tables[-1]) < self.settings.shard_images
        require(short, f"data: {directory} lacks its last shard: run `pmf data prepare` again")
        table = pa.concat_tables(tables)
        self._images, self._keys = table["image"], table["key"]
        self._labels, self._checksums = table["label"].to_numpy(), table["checksum"].to_numpy()
        self._rows = np.flatnonzero(self._images.is_valid().to_numpy())
        self.classes = tuple((self.directory / CLASSES_FILE).read_text().splitlines())
        """The classes' names."""

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

    def stored(self, index: int) -> tuple[pa.Buffer, int]:
        """(bytes, label), checked. Errors: `CorruptImageError` names the shard and the picture's key in the source."""
        row = self._rows[index].item()
        data, label = self._images[row].as_buffer(), self._labels[row].item()
        if checksum(data, label) != self._checksums[row]:
            file = shard_file(self.directory, row // self.settings.shard_images)
            reason = "its checksum is not the one it was written with"
            raise CorruptImageError(f"{file.name}: {self._keys[row]}", reason)
        return data, label

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label). Errors: see `stored`."""
        data, label = self.stored(index)
        if self.settings.encoding == "npy":
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.image_shape), label
        with Image.open(io.BytesIO(data)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous(), label


def _refuse_earlier_version(directory: Path) -> None:
    count = len(list(directory.glob("shard-*.tar")))
    pattern = f"wds:{directory}/shard-{{000000..{count - 1:06d}}}.tar"
    convert = f"`pmf data prepare '{pattern}' --out DIRECTORY` with its size and encoding converts it"
    require(count == 0, f"data: {directory} was prepared by an earlier version; {convert}")
