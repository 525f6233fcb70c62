"""`pmf data prepare` and `pmf data verify`: pictures of a source, centre-cropped once into shards."""

from __future__ import annotations

import io
import itertools
import logging
import os
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Literal

import fsspec
import numpy as np
import tyro
from PIL import Image
from tqdm import tqdm

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, first_line, require
from pmf.train.data.shards import (
    CLASSES_FILE,
    PreparedShards,
    Settings,
    Shard,
    checksum,
    complete_shards,
    open_shard,
    shard_file,
    write_shard,
)
from pmf.train.data.sources import Sample, Source, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """Centre-crop every picture of a source once into Arrow shards; run again, it continues."""

    source: tyro.conf.Positional[str]
    """folder:PATH (a directory per class), hf:NAME or hf:PATH?split=train&image=image&label=label, wds:PATTERN."""
    out: Path
    """Directory of the shards."""
    size: int = 256
    """Side of the images, in pixels."""
    encoding: Literal["npy", "png", "jpg"] = "npy"
    """How images are stored: npy is raw bytes, read without decoding; png is lossless too, about 0.6 of the size and
    far slower to read; jpg has quality 95, about 0.2 of the size, and is not lossless."""
    shard_images: int = 2048
    """Pictures of the source per shard."""
    max_corrupt: int = 100
    """Pictures that may be left out; one more is an error."""
    classes: Path | None = None
    """A file that names the classes, a line each in order of their labels (default: what the source says)."""
    workers: int = os.cpu_count() or 1
    """Threads that read, decode, crop and encode."""
    verify: bool = False
    """Read every shard back when all are written."""

    def __post_init__(self) -> None:
        for name in ("size", "shard_images"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("max_corrupt", "workers"):
            require(getattr(self, name) >= 0, f"{name}: expected a number >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class VerifyConfig:
    """Read every shard of a prepared directory back, and name those that are torn."""

    directory: tyro.conf.Positional[Path]
    """What `pmf data prepare` filled."""


def prepare(config: PrepareConfig) -> PreparedShards:
    """Fill the directory, or what is missing in it; the result does not depend on interruptions or workers.

    Errors: `InputError` where the directory holds something else, the source fails or changed, or more than
    `max_corrupt` pictures cannot be used (the first in excess is named).
    """
    source = open_source(config.source)
    classes = tuple(config.classes.read_text().splitlines()) if config.classes else source.classes
    left_out: list[tuple[str, str]] = []
    labels = 0
    with tqdm(desc="preparing", unit="image") as bar:
        for shard in _shards(config, source):
            bar.update(len(shard.table))
            left_out += shard.left_out()
            labels = max(labels, 1 + shard.table["label"].to_numpy().max(initial=-1))
            for key, reason in left_out[config.max_corrupt :]:
                excess = f"expected at most {config.max_corrupt} unusable pictures, the last is {key}: {reason}"
                raise InputError(f"source: {excess}")
    require(labels > 0, f"source: {config.source} gave no usable picture")
    classes = classes or tuple(map(str, range(labels)))
    require(labels <= len(classes), f"classes: expected names of {labels} classes, got {len(classes)}")
    for key, reason in left_out:
        print(f"left out {key}: {reason}", file=sys.stderr)
    text = "".join(f"{name}\n" for name in classes)
    write_atomically(config.out / CLASSES_FILE, lambda temporary: temporary.write_text(text))
    return PreparedShards(config.out)


def _shards(config: PrepareConfig, source: Source) -> Iterator[Shard]:
    """All shards in order, after making those that are not there whole."""
    count = config.shard_images
    settings = Settings(config.source, source.fingerprint, config.size, config.encoding, count)
    there = _begun(config.out, settings)
    samples: Iterator[Sample] = iter(())
    reached = -1
    with ThreadPool(max(1, config.workers)) as pool:
        for number in itertools.count():
            file = shard_file(config.out, number)
            if file not in there:
                samples = samples if reached == number else source.samples(number * count)
                convert = partial(_row, config.size, config.encoding)
                write_shard(file, settings, list(pool.imap(convert, itertools.islice(samples, count))))
                there[file], reached = open_shard(file), number + 1
            yield there[file]
            if len(there[file].table) < count:
                return


def _begun(directory: Path, settings: Settings) -> dict[Path, Shard]:
    """The whole shards that an earlier run left. Errors: it had other settings, or the directory holds other things."""
    files = [file for file in directory.glob("*") if not file.name.startswith(".") and file.name != CLASSES_FILE]
    others = [file for file in files if not file.match("shard-*.arrow")]
    require(not others, f"out: {directory} is not empty and holds no prepared shards, expected another --out")
    there = {}
    for file in files:
        try:
            there[file] = open_shard(file)
        except InputError as error:
            log.warning("%s; it is made again", error)
    for shard in there.values():
        changed = f"source: {settings.source} has changed since {directory} was begun"
        for name, now in asdict(settings).items():
            before = getattr(shard.settings, name)
            other = f"{name}: {directory} was begun with {before}, got {now}; expected another --out"
            require(before == now, changed if name == "fingerprint" else other)
    return there


def _row(size: int, encoding: str, sample: Sample) -> dict[str, Any]:
    """The row of a shard that a picture becomes."""
    key, picture, label = sample
    try:
        require(label is not None and label >= 0, "it has no label")
        image = _image(picture, size, encoding)
    except Exception as error:  # decoders fail in any way on torn files
        return dict(image=None, label=-1, key=key, checksum=0, reason=first_line(error))
    return dict(image=image, label=label, key=key, checksum=checksum(image, label), reason=None)


def _image(picture: bytes | str | None, size: int, encoding: str) -> bytes:
    """The square of a picture, encoded: npy (bare bytes of uint8 [3, size, size]), png, or jpg at quality 95.

    A jpg that has the size already keeps its bytes.
    """
    if isinstance(picture, str):
        with fsspec.open(picture) as file:
            picture = file.read()
    require(bool(picture), "it has no bytes")
    if picture.startswith(b"\x93NUMPY"):
        opened = Image.fromarray(np.load(io.BytesIO(picture)).transpose(1, 2, 0))
    else:
        opened = Image.open(io.BytesIO(picture))
    square, buffer = centre_crop(opened, size), io.BytesIO()
    if encoding == "npy":
        return np.asarray(square).transpose(2, 0, 1).tobytes()
    if encoding == "png":
        square.save(buffer, "PNG", compress_level=1)
    elif (opened.format, opened.mode, opened.size) == ("JPEG", "RGB", (size, size)):
        return picture
    else:
        square.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central square of a picture at `size` x `size` pixels, RGB.

    As ADM prepares ImageNet, which published statistics rest on: halve with a box filter while the short side is
    at least twice `size`, bring the short side to `size` with a bicubic filter, cut out the middle. The
    orientation that a camera may have noted is not applied.
    """
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def verify(directory: Path) -> tuple[int, list[str]]:
    """(images, what is wrong): every image of every shard, with its label, against its checksum.

    Errors: `InputError` where the directory is not complete.
    """
    images, wrong = 0, []
    for file in tqdm(complete_shards(directory), desc="verifying", unit="shard"):
        try:
            shard = open_shard(file)
            images += len(shard.table) - shard.table["image"].null_count
            torn = shard.torn_keys()
            require(not torn, f"data: {file} is torn at {', '.join(torn)}")
        except InputError as error:
            wrong.append(str(error))
    return images, wrong


def command(arguments: list[str]) -> None:
    """`pmf data prepare ...` or `pmf data verify DIRECTORY`."""
    kinds = {"prepare": PrepareConfig, "verify": VerifyConfig}
    config = tyro.extras.subcommand_cli_from_dict(kinds, prog="pmf data", args=arguments)
    if isinstance(config, VerifyConfig):
        _verify(config.directory)
        return
    data = prepare(config)
    left_out = f"{data.left_out or 'none'} left out"
    print(f"{config.out}: {len(data)} images of {data.num_classes} classes at {config.size} px; {left_out}")
    if config.verify:
        _verify(config.out)


def _verify(directory: Path) -> None:
    images, wrong = verify(directory)
    require(not wrong, f"{'; '.join(wrong)}: remove these shards and run `pmf data prepare` again")
    print(f"{directory}: {images} images verified")
