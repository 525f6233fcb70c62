"""Prepared images: Arrow files at the training size, mapped into memory and read by index.

Shard i of a directory, `shard-00000i.arrow`, has a row for each of the source's positions [i n, (i + 1) n), so that it
can be made again alone: the image, its label, its key in the source, and a checksum of image and label; or, if the
picture cannot be used, the reason. Its metadata says what it was made from and how. The last shard is shorter than n,
if need be empty. `classes.txt` names the classes, a line each; it is written last and makes the directory count.
"""

from __future__ import annotations

import io
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, first_line, require
from pmf.train.data.training_data import CorruptImageError

try:
    import pyarrow as pa
    import xxhash
except ImportError as error:
    raise InputError(f"data: prepared images need pip install 'pixel-meanflow[data]': {error}") from None

CLASSES_FILE = "classes.txt"
SCHEMA = pa.schema(
    {
        "image": pa.large_binary(),
        "label": pa.int32(),
        "key": pa.string(),
        "checksum": pa.uint64(),
        "reason": pa.string(),
    }
)


@dataclass(frozen=True)
class Settings:
    """What a shard was made from and how; all shards of a directory have the same."""

    source: str
    fingerprint: str
    size: int
    encoding: str
    """npy (bare bytes of uint8 [3, size, size]), png or jpg."""
    shard_images: int
    """Positions of the source per shard, the n above."""


@dataclass(frozen=True)
class Shard:
    """A shard, mapped into memory."""

    settings: Settings
    table: pa.Table

    def left_out(self) -> list[tuple[str, str]]:
        """Key and reason of each picture that cannot be used."""
        rows = zip(self.table["key"].to_pylist(), self.table["reason"].to_pylist(), strict=True)
        return [(key, reason) for key, reason in rows if reason is not None]

    def torn_keys(self) -> list[str]:
        """Keys of the images that are not, with their labels, what was written."""
        columns = (self.table[name].to_pylist() for name in ("label", "checksum", "key"))
        rows = zip(self.table["image"], *columns, strict=True)
        return [
            key for image, label, kept, key in rows if image.is_valid and kept != checksum(image.as_buffer(), label)
        ]


def shard_file(directory: Path, number: int) -> Path:
    """The file of that shard."""
    return directory / f"shard-{number:06d}.arrow"


def checksum(image: bytes | pa.Buffer, label: int) -> int:
    """XXH3 (64 bits) of an image's bytes, seeded by its label."""
    return xxhash.xxh3_64_intdigest(image, seed=label)


def write_shard(file: Path, settings: Settings, rows: list[dict[str, Any]]) -> None:
    """Write the rows of a shard, atomically. Errors: `InputError` on a full disk and the like."""
    metadata = {"settings": json.dumps(asdict(settings)), "rows": str(len(rows))}
    table = pa.Table.from_pylist(rows, SCHEMA.with_metadata(metadata))

    def write(temporary: Path) -> None:
        with pa.ipc.new_file(str(temporary), table.schema) as writer:
            writer.write_table(table)

    write_atomically(file, write)


def open_shard(file: Path) -> Shard:
    """Map a shard into memory. Errors: `InputError` where it is missing or torn."""
    try:
        table = pa.ipc.open_file(pa.memory_map(str(file))).read_all()
        table.validate(full=True)  # an offset that points outside would end the process
        settings = Settings(**json.loads(table.schema.metadata[b"settings"]))
        rows = int(table.schema.metadata[b"rows"])
        whole = table.schema == SCHEMA and len(table) == rows
        whole = whole and table["image"].is_valid().equals(table["reason"].is_null())
    except Exception as error:  # a flipped bit can make any of this fail
        raise InputError(f"data: {file} is missing or torn: {first_line(error)}") from error
    require(whole, f"data: {file} is torn: it does not hold what was written")
    return Shard(settings, table)


def complete_shards(directory: Path) -> list[Path]:
    """The files of a prepared directory. Errors: `InputError` if it is not prepared, not to its end, or too early."""
    earlier = sorted(directory.glob("shard-*.tar"))
    require(
        not earlier,
        f"data: {directory} was prepared by an earlier version; to convert it, run `pmf data prepare "
        f"'wds:{directory}/shard-{{000000..{len(earlier) - 1:06d}}}.tar' --out DIRECTORY` with its size and encoding",
    )
    last = max(directory.glob("shard-*.arrow"), default=None)
    require(
        last is not None and (directory / CLASSES_FILE).is_file(),
        f"data: {directory} is not complete, expected `pmf data prepare` to be run to its end",
    )
    shard = open_shard(last)
    short = len(shard.table) < shard.settings.shard_images
    require(short, f"data: {directory} lacks its last shard, expected `pmf data prepare` to be run again")
    return [shard_file(directory, number) for number in range(int(last.stem.split("-")[1]) + 1)]


class PreparedShards:
    """Training data from a directory that `pmf data prepare` filled: uint8 [3, H, W] and labels, read by index.

    Processes share the mapped files. Every image that is read is checked against its checksum.
    Errors: `InputError` where the directory is not complete, or a shard is missing or torn.
    """

    def __init__(self, directory: str | Path) -> None:
        self.directory = Path(directory)
        shards = [open_shard(file) for file in complete_shards(self.directory)]
        self.settings = shards[0].settings
        table = pa.concat_tables([shard.table for shard in shards])
        self._images, self._keys = table["image"], table["key"]
        self._labels, self._checksums = table["label"].to_numpy(), table["checksum"].to_numpy()
        self._rows = np.flatnonzero(self._images.is_valid().to_numpy())
        self.left_out = len(table) - len(self._rows)
        """How many pictures of the source could not be used."""
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
        """How many classes the source names, or one more than its largest label."""
        return len(self.classes)

    def __len__(self) -> int:
        return len(self._rows)

    def read(self, index: int) -> tuple[Tensor, int]:
        """(image, label). Errors: `CorruptImageError` names the shard and the picture's key in the source."""
        row = self._rows[index].item()
        data, label = self._images[row].as_buffer(), self._labels[row].item()
        if checksum(data, label) != self._checksums[row]:
            file = shard_file(self.directory, row // self.settings.shard_images)
            reason = "its checksum is not the one it was written with"
            raise CorruptImageError(f"{file.name}: {self._keys[row]}", reason)
        if self.settings.encoding == "npy":
            return torch.frombuffer(bytearray(data), dtype=torch.uint8).view(self.image_shape), label
        with Image.open(io.BytesIO(data)) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).contiguous(), label
