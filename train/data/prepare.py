"""`pmf data prepare` and `pmf data verify`: pictures of a source, centre-cropped once into shards."""

from __future__ import annotations

import io
import itertools
import logging
import multiprocessing
import os
import signal
import sys
import tarfile
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import tyro
from PIL import Image
from tqdm import tqdm

from pmf.errors import InputError, require
from pmf.train.data.crop import centre_crop, encode
from pmf.train.data.shards import (
    MANIFEST,
    Manifest,
    PreparedShards,
    ShardIndex,
    ShardWriter,
    read_index,
    read_manifest,
    shard_file,
)
from pmf.train.data.sources import Sample, Source, open_source

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class PrepareConfig:
    """Centre-crop every picture of a source once into WebDataset shards; run again, it continues."""

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
    """Processes that decode, crop and encode (0: none beside this one)."""
    verify: bool = False
    """Read every shard back when all are written."""

    def __post_init__(self) -> None:
        for name in ("size", "shard_images"):
            require(getattr(self, name) > 0, f"{name}: expected a positive number, got {getattr(self, name)}")
        for name in ("max_corrupt", "workers"):
            require(getattr(self, name) >= 0, f"{name}: expected a number >= 0, got {getattr(self, name)}")


@dataclass(frozen=True)
class VerifyConfig:
    """Read every shard of a prepared directory back: entries, sizes, labels, checksums."""

    directory: tyro.conf.Positional[Path]
    """What `pmf data prepare` filled."""


def prepare(config: PrepareConfig) -> PreparedShards:
    """Fill the directory, or what is missing in it; the result does not depend on interruptions or workers.

    Errors: `InputError` where the directory holds something else, the source fails or changed, or more than
    `max_corrupt` pictures cannot be used (the last one is named).
    """
    with _Mapper(config.workers) as mapper:  # before the source starts threads that a fork would not survive
        source = open_source(config.source)
        manifest = _manifest(config, source)
        if manifest.images is None:
            manifest.write(config.out)
        found = _write_shards(config, source, mapper, manifest.images)
    labels = [int(index.rows[:, 2].max()) for index in found if len(index.rows)]
    require(bool(labels), f"source: {config.source} gave no usable picture")
    classes = manifest.classes or tuple(str(label) for label in range(max(labels) + 1))
    _report(found, max(labels), classes)
    images, skipped = tuple(len(index.rows) for index in found), sum(len(index.skipped) for index in found)
    replace(manifest, classes=classes, images=images, skipped=skipped).write(config.out)
    return PreparedShards(config.out)


def _report(found: list[ShardIndex], largest: int, classes: tuple[str, ...]) -> None:
    require(largest < len(classes), f"classes: expected a name for every label up to {largest}, got {len(classes)}")
    for key, reason in (pair for index in found for pair in index.skipped):
        print(f"left out {key}: {reason}", file=sys.stderr)


def _manifest(config: PrepareConfig, source: Source) -> Manifest:
    """What this run will write; the same as an earlier run's in that directory, or an error."""
    classes = tuple(config.classes.read_text().splitlines()) if config.classes else source.classes
    new = Manifest(
        config.source, source.fingerprint, config.size, config.encoding, config.shard_images, classes or None
    )
    if not (config.out / MANIFEST).exists():
        empty = not config.out.exists() or not any(config.out.iterdir())
        require(empty, f"out: {config.out} is not empty and holds no prepared shards, expected another --out")
        return new
    old = read_manifest(config.out)
    for name in ("source", "size", "encoding", "shard_images"):
        before, now = getattr(old, name), getattr(new, name)
        require(before == now, f"{name}: {config.out} was begun with {before}, got {now}; expected another --out")
    require(old.fingerprint == new.fingerprint, f"source: {config.source} has changed since {config.out} was begun")
    return replace(new, images=old.images)


def _write_shards(
    config: PrepareConfig, source: Source, mapper: Callable, known: tuple[int, ...] | None
) -> list[ShardIndex]:
    """The indices of all shards, after writing those that are not there whole; `known`: images of each, if known."""
    there = {n: index for n in _numbers(config.out) if (index := _whole(config.out, n)) is not None}
    first = next(n for n in itertools.count() if n not in there)
    found = [there[n] for n in range(first)]
    samples, taken = source.samples(first * config.shard_images), 1
    with tqdm(desc="preparing", unit="image", initial=first * config.shard_images) as bar:
        while taken and (known is None or len(found) < len(known)):
            number = len(found)
            chunk = itertools.islice(samples, config.shard_images)
            if number in there:
                taken = sum(1 for _ in chunk)
            else:
                left = config.max_corrupt - sum(len(index.skipped) for index in found)
                taken = _write_shard(config, mapper, chunk, number, left)
            bar.update(taken)
            if taken:
                found.append(there.get(number) or read_index(shard_file(config.out, number)))
    return found


def _write_shard(config: PrepareConfig, mapper: Callable, chunk: Iterator[Sample], number: int, left: int) -> int:
    """Write one shard, unless the source has ended. Returns how many pictures it was made from."""
    writer, position = ShardWriter(config.encoding), number * config.shard_images
    for sample_key, label, data, reason in mapper(partial(_convert, config.size, config.encoding), chunk):
        if reason is None:
            writer.add(position, sample_key, data, label)
        else:
            log.warning("left out %s: %s", sample_key, reason)
            writer.skip(sample_key, reason)
            require(
                len(writer.skipped) <= left,
                f"source: expected at most {config.max_corrupt} unusable pictures, the last is {sample_key}: {reason}",
            )
        position += 1
    taken = position - number * config.shard_images
    if taken:
        writer.write(shard_file(config.out, number))
    return taken


def _convert(size: int, encoding: str, sample: Sample) -> tuple[str, int | None, bytes, str | None]:
    """(key, label, entry, why it cannot be used)."""
    if sample.label is None or sample.label < 0:
        return sample.key, None, b"", "it has no label"
    if not sample.data:
        return sample.key, None, b"", "it has no bytes"
    try:
        with Image.open(io.BytesIO(sample.data)) as picture:
            return sample.key, sample.label, encode(centre_crop(picture, size), encoding), None
    except Exception as error:  # decoders fail in any way on torn files
        return sample.key, None, b"", (str(error).strip().splitlines() or [type(error).__name__])[0]


class _Mapper:
    """An ordered map over processes, or the plain one; a context."""

    def __init__(self, workers: int) -> None:
        self.pool = multiprocessing.Pool(workers, _leave_interrupts) if workers else None

    def __enter__(self) -> Callable[[Callable, Iterable], Iterator]:
        return map if self.pool is None else partial(self.pool.imap, chunksize=8)

    def __exit__(self, *exception) -> None:
        if self.pool is not None:
            self.pool.terminate()


def _leave_interrupts() -> None:
    """Ctrl-C is for the process that writes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def _numbers(directory: Path) -> list[int]:
    return sorted(int(file.stem.split("-")[1]) for file in directory.glob("shard-*.npz"))


def _whole(directory: Path, number: int) -> ShardIndex | None:
    """The index of a shard that is there in full length, else None."""
    file = shard_file(directory, number)
    try:
        index = read_index(file)
        return index if file.stat().st_size == index.bytes else None
    except (InputError, OSError) as error:
        log.warning("%s is made again: %s", file, error)
        return None


def verify(directory: Path) -> tuple[int, list[str]]:
    """(images, what is wrong): every entry of every shard against the index, in name, size, label and checksum.

    Errors: `InputError` where the directory is not complete.
    """
    manifest, wrong = read_manifest(directory), []
    require(manifest.images is not None, f"data: {directory} is not complete, expected `pmf data prepare` to end")
    for number, images in enumerate(tqdm(manifest.images, desc="verifying", unit="shard")):
        file = shard_file(directory, number)
        try:
            index = read_index(file)
            require(len(index.rows) == images, f"data: {file} has {len(index.rows)} images, expected {images}")
            _verify_shard(file, index)
        except (InputError, OSError, tarfile.TarError) as error:
            wrong.append(str(error) if file.name in str(error) else f"data: {file}: {error}")
    return sum(manifest.images), wrong


def _verify_shard(file: Path, index: ShardIndex) -> None:
    require(file.stat().st_size == index.bytes, f"data: {file} is torn: expected {index.bytes} bytes")
    with tarfile.open(file) as tar:
        entries = tar.getmembers()
        require(len(entries) == 2 * len(index.rows), f"data: {file} holds {len(entries)} entries")
        for key, row, image, label in zip(index.keys, index.rows.tolist(), entries[::2], entries[1::2], strict=True):
            data = tar.extractfile(image).read()
            found = [image.offset_data, image.size, int(tar.extractfile(label).read()), zlib.crc32(data)]
            require(found == row, f"data: {file} is torn at {image.name} ({key})")


def command(arguments: list[str]) -> None:
    """`pmf data prepare ...` or `pmf data verify DIRECTORY`."""
    name, rest = (arguments or ["--help"])[0], arguments[1:]
    if name in ("-h", "--help"):
        print("usage: pmf data prepare SOURCE --out DIRECTORY [options]\n       pmf data verify DIRECTORY")
    elif name == "prepare":
        _prepare(tyro.cli(PrepareConfig, prog="pmf data prepare", args=rest))
    else:
        require(name == "verify", f"data: expected prepare or verify, got {name!r}")
        _verify(tyro.cli(VerifyConfig, prog="pmf data verify", args=rest).directory)


def _prepare(config: PrepareConfig) -> None:
    data = prepare(config)
    left_out = f"{data.manifest.skipped} left out" if data.manifest.skipped else "none left out"
    print(f"{config.out}: {len(data)} images of {data.num_classes} classes at {config.size} px; {left_out}")
    if config.verify:
        _verify(config.out)


def _verify(directory: Path) -> None:
    images, wrong = verify(directory)
    require(not wrong, f"{'; '.join(wrong)}: remove the shard's .npz and run `pmf data prepare` again")
    print(f"{directory}: {images} images verified")
