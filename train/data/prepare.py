"""`pmf data prepare` centre-crops the pictures of a source, once, into shards; `pmf data verify` checks the shards."""

from __future__ import annotations

import contextlib
import errno
import io
import itertools
import logging
import os
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.pool import AsyncResult, ThreadPool
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import tyro
from tqdm import tqdm

from pmf.atomic_files import torn_files, write_atomically
from pmf.data import CorruptImageError, shards
from pmf.data.shards import PreparedShards, Settings
from pmf.errors import InputError, first_line, printable, require
from pmf.fields import check_fields
from pmf.images import centre_crop
from pmf.pictures import MAX_SIDE, leads_up, opened
from pmf.train.config import require_at_least
from pmf.train.data.samples import Sample, Source, digest
from pmf.train.data.sources import open_source
from pmf.train.directory_lock import locked
from pmf.train.options import refuse_repeated

if TYPE_CHECKING:
    import pyarrow as pa

log = logging.getLogger(__name__)

FORMAT = "2"
"""Version of `Settings.fingerprint`: 2:source:classes."""
MAX_CLASSES = 1_000_000
MAX_THREADS = 1024
MACHINE = (
    *(errno.EIO, errno.ESTALE, errno.ENOTCONN, errno.ETIMEDOUT, errno.EMFILE, errno.ENFILE, errno.ENOMEM),
    *(errno.ECONNRESET, errno.ECONNREFUSED, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.ENODEV, errno.ENXIO),
)
"""Errors of a machine, its disks and its network, which say nothing of a picture."""


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

    prefix: ClassVar[str] = ""

    def __post_init__(self) -> None:
        check_fields(self)
        require_at_least(self, 1, "size", "shard_images")
        require(self.size <= MAX_SIDE, f"size: expected at most {MAX_SIDE}, got {self.size}")
        require_at_least(self, 0, "max_corrupt", "workers")
        require(self.workers <= MAX_THREADS, f"workers: expected at most {MAX_THREADS}, got {self.workers}")


def command(arguments: list[str]) -> None:
    """Run `pmf data prepare ...` or `pmf data verify DIRECTORY`."""
    commands: dict[str, Callable[..., object]] = {"prepare": prepare, "verify": verify}
    if arguments[:1] == ["prepare"]:
        refuse_repeated(PrepareConfig, arguments[1:])
    try:
        tyro.extras.subcommand_cli_from_dict(commands, prog="pmf data", args=arguments)
    except KeyboardInterrupt:
        print("pmf: interrupted; run the same command again to go on", file=sys.stderr)
        sys.exit(130)


def prepare(config: tyro.conf.OmitArgPrefixes[PrepareConfig]) -> PreparedShards:
    """Centre-crop every picture of a source, once, into Arrow shards. Run it again to resume it."""
    source = open_source(config.source)
    _check_outside(config.out, source.folder)
    names = _class_names(config, source)
    preparation = _Preparation(config, source, names)
    with locked(config.out, "out"):
        _fill(config, names, preparation)
    data = PreparedShards(config.out)
    lost = f"{preparation.left_out or 'none'} left out"
    print(f"{printable(config.out)}: {len(data)} images of {data.num_classes} classes at {config.size} px; {lost}")
    for kind, count in sorted(preparation.lost.items()):
        print(f"{count} pictures {kind}")
    if config.verify:
        verify(config.out)
    return data


def _check_outside(out: Path, folder: Path | None) -> None:
    """Raise `InputError` if shards would lie in the source's folder: the next run would count theirs as a class."""
    if folder is None:
        return
    plain = Path(os.path.abspath(out))
    places = (os.path.realpath(out), os.path.join(os.path.realpath(plain.parent), plain.name))  # a link counts too
    require(
        not leads_up(os.path.realpath(folder), places),
        lambda: f"out: {printable(out)} lies inside the source {printable(folder)}: expected a folder outside of it",
    )


def _fill(config: PrepareConfig, names: tuple[str, ...], preparation: _Preparation) -> None:
    """Make the missing shards, then write the classes' names."""
    labels = 0
    for shard in preparation.shards():
        labels = max(labels, 1 + int(shard["label"].to_numpy().max(initial=-1)))
        require(not names or labels <= len(names), f"classes: expected names of {labels} classes, got {len(names)}")
    require(labels > 0, f"source: {config.source} gave no usable picture")
    _write_classes(config.out, names or tuple(map(str, range(labels))))


def _class_names(config: PrepareConfig, source: Source) -> tuple[str, ...]:
    """The classes' names, from --classes or the source; none if labels are to be their names."""
    names = source.classes
    if config.classes is not None:
        names = shards.read_classes(config.classes, "classes")
        shards.check_classes(names, "classes")
        got = f"got {len(names)} in {config.classes}"
        require(len(names) >= len(source.classes), f"classes: expected names of {len(source.classes)} classes, {got}")
    elif names:
        shards.check_classes(names, "source")
    return names


def _write_classes(directory: Path, names: tuple[str, ...]) -> None:
    text = "".join(f"{name}\n" for name in names).encode()
    write_atomically(directory / shards.CLASSES_FILE, lambda temporary: temporary.write_bytes(text))


class _Preparation:
    """The shards of one directory: those of an earlier run, and the missing ones, which it makes."""

    def __init__(self, config: PrepareConfig, source: Source, names: tuple[str, ...]) -> None:
        self.config, self.source, self.names = config, source, names
        fingerprint = f"{FORMAT}:{source.fingerprint}:{digest(names)}"
        size, encoding, count = config.size, config.encoding, config.shard_images
        self.settings = Settings(config.source, fingerprint, size, encoding, count)
        self.left_out = 0
        self.lost: Counter[str] = Counter()
        """What pictures lost, and how many."""

    def shards(self) -> Iterator[pa.Table]:
        """Yield all shards in order and make the missing ones; neither interruptions nor workers change them."""
        out, count = self.config.out, self.config.shard_images
        there = _begun(out, self.settings)
        if self.names and (out / shards.CLASSES_FILE).exists():
            same = shards.read_classes(out / shards.CLASSES_FILE, "out") == self.names
            require(same, f"classes: {out}/classes.txt has other names; expected those, or that file removed")
        samples: Iterator[Sample] = iter(())
        reached = -1
        with ThreadPool(max(1, self.config.workers)) as pool, tqdm(desc="preparing", unit="image") as bar:
            for number in itertools.count():
                file = shards.shard_file(out, number)
                shard = there.get(file)
                if shard is None:
                    samples = samples if reached == number else self.source.samples(number * count)
                    shard, reached = self._make(file, itertools.islice(samples, count), pool), number + 1
                else:
                    for key, reason in zip(shard["key"].to_pylist(), shard["reason"].to_pylist(), strict=True):
                        self._judge(key, reason)
                self.lost += shards.lost_of(shard)
                bar.update(len(shard))
                yield shard
                if len(shard) < count:
                    return

    def _make(self, file: Path, samples: Iterator[Sample], pool: ThreadPool) -> pa.Table:
        """Write a shard. Its pictures are judged before it is written: a shard with too many unusable ones is not."""
        lost: Counter[str] = Counter()

        def rows() -> Iterator[dict[str, Any]]:
            convert = partial(_row, self.config.size, self.config.encoding)
            for row, kinds in _in_order(convert, samples, pool, 4 * max(1, self.config.workers)):
                if row["reason"] is not None and (folder := self.source.folder) is not None:
                    require(folder.is_dir(), f"source: {folder} has vanished; mount it and run the same command again")
                self._judge(row["key"], row["reason"])
                lost.update(kinds)
                yield row

        shards.write_shard(file, self.settings, rows(), lost)
        return shards.open_shard(file)

    def _judge(self, key: str, reason: str | None) -> None:
        if reason is None:
            return
        log.warning("left out %s: %s", key, reason)
        self.left_out += 1
        excess = f"expected at most {self.config.max_corrupt} unusable pictures, the last is {key}: {reason}"
        require(self.left_out <= self.config.max_corrupt, f"source: {excess}")


def _in_order(convert: Callable, samples: Iterator[Sample], pool: ThreadPool, ahead: int) -> Iterator[Any]:
    """Yield convert(sample) in order; this thread reads the samples, so that Ctrl-C interrupts it."""
    pending: deque[AsyncResult] = deque()
    for sample in samples:
        pending.append(pool.apply_async(convert, (sample,)))
        if len(pending) >= ahead:
            yield _result(pending.popleft())
    while pending:
        yield _result(pending.popleft())


def _result(work: AsyncResult) -> Any:
    """The result of work in a pool. Python notices a signal that comes just before a wait only when the wait ends."""
    while not work.ready():
        work.wait(1.0)
    return work.get()


def _begun(directory: Path, settings: Settings) -> dict[Path, pa.Table]:
    """The complete shards of an earlier run. Errors: its settings or source differ, or other files are there."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        files = [file for file in directory.iterdir() if not file.name.startswith(".")]
    except OSError as error:
        raise InputError(f"out: {printable(directory)} cannot be a directory of shards: {error.strerror}") from error
    require(os.access(directory, os.W_OK | os.X_OK), f"out: {printable(directory)} cannot be written to")
    others = [file for file in files if file.name != shards.CLASSES_FILE and not file.match("shard-*.arrow")]
    require(not others, f"out: {directory} is not empty and holds no prepared shards, expected another --out")
    there = {}
    for file in directory.glob("shard-*.arrow"):
        try:
            there[file] = shards.open_shard(file)
        except InputError as error:
            log.warning("%s; making it again", error)
    for shard in there.values():
        _check_same(directory, shards.settings_of(shard), settings)
    _remove_torn(directory)
    return there


def _remove_torn(directory: Path) -> None:
    """Remove what a killed preparation was writing (see `write_atomically`), for the one that holds the lock."""
    for target in ("shard-*.arrow", shards.CLASSES_FILE):
        for torn in torn_files(directory, target):
            with contextlib.suppress(OSError):
                torn.unlink()


def _check_same(directory: Path, before: Settings, now: Settings) -> None:
    """Raise `InputError` unless a shard was prepared in this way from this source."""
    old, new = before.fingerprint.split(":"), now.fingerprint.split(":")
    earlier = f"out: {directory} was begun by an earlier version: it can be trained on if it is complete, not continued"
    require(old[0] == new[0], f"{earlier}; expected another --out")
    for name, was in asdict(before).items():
        if name != "fingerprint":
            got = getattr(now, name)
            require(was == got, f"{name}: {directory} was begun with {was}, got {got}; expected another --out")
    require(old[1] == new[1], f"source: {now.source} has changed since {directory} was begun; expected another --out")
    require(old[2:] == new[2:], f"classes: {directory} was begun with other names of classes; expected another --out")


def _row(size: int, encoding: str, sample: Sample) -> tuple[dict[str, Any], list[str]]:
    """A picture's row in a shard, and what it lost; an unusable picture's row holds the reason instead of the image.

    Errors: `InputError` if the machine and not the picture is at fault: it would be left out for ever.
    """
    lost: list[str] = []
    try:
        label = -1 if sample.label is None else sample.label
        require(label >= 0, "it has no label")
        require(label < MAX_CLASSES, f"its label is {label}, expected one below {MAX_CLASSES:,}")
        image = _square(sample.read(), size, encoding, lost.append)
    except Exception as error:  # decoders may raise anything on torn files
        if isinstance(error, MemoryError) or getattr(error, "errno", None) in MACHINE:
            what = first_line(error)
            raise InputError(f"source: {sample.key} cannot be read now: {what}; run the same command again") from error
        return dict(image=None, label=-1, key=sample.key, checksum=0, reason=first_line(error)), []
    kept = shards.checksum(image, label)
    return dict(image=image, label=label, key=sample.key, checksum=kept, reason=None), lost


def _square(data: bytes, size: int, encoding: str, note: Callable[[str], object]) -> bytes:
    """Centre-crop and encode a picture: npy (bare bytes of uint8 [3, size, size]), png, or jpg at quality 95.

    An RGB jpg that already has the size keeps its bytes. `note`: see `pmf.pictures.to_rgb`.
    """
    picture = opened(data)
    square, buffer = centre_crop(picture, size, note), io.BytesIO()
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
