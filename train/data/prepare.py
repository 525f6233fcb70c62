"""`pmf data prepare` centre-crops the pictures of a source, once, into shards; `pmf data verify` checks the shards."""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from pmf.atomic_files import write_atomically
from pmf.data import CorruptImageError, shards
from pmf.data.shards import PreparedShards, Settings
from pmf.errors import InputError, first_line, require
from pmf.images import centre_crop
from pmf.train.data.sources import Sample, Source, open_source

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """The source, and the format of the shards."""

    source: tyro.conf.Positional[str]
    """folder:PATH (a directory per class), hf:NAME or hf:PATH?split=train&image=image&label=label, wds:PATTERN."""
    out: Path
    """Directory of the shards."""
    size: int = 256
    """Side of the images, in pixels."""
    encoding: Literal["npy", "png", "jpg"] = "npy"
    """Format of stored images. npy: raw bytes, read without decoding;
    png: lossless, about 0.6 of the size, far slower to read; jpg: quality 95, lossy, about 0.2 of the size."""
    shard_images: int = 2048
    """Pictures of the source per shard."""
    max_corrupt: int = 100
    """Number of unusable pictures that may be left out; one more is an error."""
    classes: Path | None = None
    """File of class names, one a line in the order of the labels (default: the names in the source)."""
    workers: int = os.cpu_count() or 1
    """Threads that read, decode, crop and encode."""
    verify: bool = False
    """Read all shards back once they are written."""

    def __post_init__(self) -> None:
        for name in ("size", "shard_images"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("max_corrupt", "workers"):
            require(getattr(self, name) >= 0, f"{name}: expected a number >= 0, got {getattr(self, name)}")


def command(arguments: list[str]) -> None:
    """Run `pmf data prepare ...` or `pmf data verify DIRECTORY`."""
    commands: dict[str, Callable[..., object]] = {"prepare": prepare, "verify": verify}
    tyro.extras.subcommand_cli_from_dict(commands, prog="pmf data", args=arguments)


def prepare(config: tyro.conf.OmitArgPrefixes[PrepareConfig]) -> PreparedShards:
    """Centre-crop every picture of a source, once, into Arrow shards. Run it again to resume it."""
    source = open_source(config.source)
    classes = tuple(config.classes.read_text().splitlines()) if config.classes else source.classes
    left_out = labels = 0
    for shard in _shards(config, source):
        for key, reason in zip(shard["key"].to_pylist(), shard["reason"].to_pylist(), strict=True):
            if reason is not None:
                print(f"left out {key}: {reason}", file=sys.stderr)
                left_out += 1
                excess = f"expected at most {config.max_corrupt} unusable pictures, the last is {key}: {reason}"
                require(left_out <= config.max_corrupt, f"source: {excess}")
        labels = max(labels, 1 + int(shard["label"].to_numpy().max(initial=-1)))
    require(labels > 0, f"source: {config.source} gave no usable picture")
    classes = classes or tuple(map(str, range(labels)))
    require(labels <= len(classes), f"classes: expected names of {labels} classes, got {len(classes)}")
    text = "".join(f"{name}\n" for name in classes)
    write_atomically(config.out / shards.CLASSES_FILE, lambda temporary: temporary.write_text(text))
    data = PreparedShards(config.out)
    lost = f"{left_out or 'none'} left out"
    print(f"{config.out}: {len(data)} images of {len(classes)} classes at {config.size} px; {lost}")
    if config.verify:
        verify(config.out)
    return data


def _shards(config: PrepareConfig, source: Source) -> Iterator[pa.Table]:
    """Yield all shards in order and make the missing ones; neither interruptions nor workers change their content."""
    count = config.shard_images
    settings = Settings(config.source, source.fingerprint, config.size, config.encoding, count)
    there = _begun(config.out, settings)
    convert = partial(_row, config.size, config.encoding)
    samples: Iterator[Sample] = iter(())
    reached = -1
    with ThreadPool(max(1, config.workers)) as pool, tqdm(desc="preparing", unit="image") as bar:
        for number in itertools.count():
            file = shards.shard_file(config.out, number)
            if file not in there:
                samples = samples if reached == number else source.samples(number * count)
                shards.write_shard(file, settings, pool.imap(convert, itertools.islice(samples, count)))
                there[file], reached = shards.open_shard(file), number + 1
            bar.update(len(there[file]))
            yield there[file]
            if len(there[file]) < count:
                return


def _begun(directory: Path, settings: Settings) -> dict[Path, pa.Table]:
    """The complete shards of an earlier run. Errors: its settings or source differ, or other files are there."""
    files = [file for file in directory.glob("*") if not file.name.startswith(".")]
    others = [file for file in files if file.name != shards.CLASSES_FILE and not file.match("shard-*.arrow")]
    require(not others, f"out: {directory} is not empty and holds no prepared shards, expected another --out")
    there = {}
    for file in directory.glob("shard-*.arrow"):
        try:
            there[file] = shards.open_shard(file)
        except InputError as error:
            log.warning("%s; making it again", error)
    for shard in there.values():
        for name, now in asdict(settings).items():
            before = getattr(shards.settings_of(shard), name)
            changed = f"source: {settings.source} has changed since {directory} was begun"
            other = f"{name}: {directory} was begun with {before}, got {now}; expected another --out"
            require(before == now, changed if name == "fingerprint" else other)
    return there


def _row(size: int, encoding: str, sample: Sample) -> dict[str, Any]:
    """A picture's row in a shard; an unusable picture's row holds the reason instead of the image."""
    try:
        label = -1 if sample.label is None else sample.label
        require(label >= 0, "it has no label")
        image = _square(sample.read(), size, encoding)
    except Exception as error:  # decoders may raise anything on torn files
        return dict(image=None, label=-1, key=sample.key, checksum=0, reason=first_line(error))
    kept = shards.checksum(image, label)
    return dict(image=image, label=label, key=sample.key, checksum=kept, reason=None)


def _square(data: bytes, size: int, encoding: str) -> bytes:
    """Centre-crop and encode a picture: npy (bare bytes of uint8 [3, size, size]), png, or jpg at quality 95.

    An RGB jpg that already has the size keeps its bytes.
    """
    if data.startswith(b"\x93NUMPY"):
        picture = Image.fromarray(np.load(io.BytesIO(data)).transpose(1, 2, 0))
    else:
        picture = Image.open(io.BytesIO(data))
    square, buffer = centre_crop(picture, size), io.BytesIO()
    if encoding == "npy":
        return np.asarray(square).transpose(2, 0, 1).tobytes()
    if encoding == "jpg" and (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (size, size)):
        return data
    if encoding == "jpg":
        square.save(buffer, "JPEG", quality=95, subsampling=0)
    else:
        square.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def verify(directory: tyro.conf.Positional[Path]) -> None:
    """Read back every shard of a prepared directory and name the torn ones.

    Args:
        directory: Directory that `pmf data prepare` filled.
    """
    data, torn = PreparedShards(directory), []
    for index in tqdm(range(len(data)), desc="verifying", unit="image"):
        try:
            data.stored(index)
        except CorruptImageError as error:
            torn.append(str(error))
    require(not torn, f"data: torn: {'; '.join(torn)}: remove these shards and run `pmf data prepare` again")
    print(f"{directory}: {len(data)} images verified")
