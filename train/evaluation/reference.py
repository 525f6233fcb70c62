"""The real images of a reference, and their statistics, computed by all processes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from pmf.data.training_data import CorruptImageError
from pmf.errors import InputError, extra, reading
from pmf.features import Chunks, Extractor, Source, compute, find_images, images_of
from pmf.metrics import Statistics
from pmf.pictures import open_file, open_picture
from pmf.train.config import ExtractionConfig
from pmf.train.data.samples import listed
from pmf.train.distributed import World
from pmf.train.evaluation.lock import alone
from pmf.train.evaluation.results import digest, extractor_digest
from pmf.train.stop_signals import Stopped, never, stop_together

FEW = "a Fréchet distance of so few is mostly error (their covariance has no full rank), expected at least"


def warn_of_few(world: World, name: str, count: int | None, width: int) -> None:
    """Warn of fewer images than features."""
    if count is not None and count < width:
        world.warn(f"{name}: {count:,} images; {FEW} {width:,}")


@dataclass(frozen=True)
class Pictures:
    """Real images, read by index."""

    files: list[Path]
    """The files that hold them."""
    count: int
    """Number of images."""
    read: Source
    """Reads them."""
    sizes: Callable[[], Counter[tuple[int, int]]]
    """(width, height) -> number of images, by their headers."""
    argument: str
    """What the user calls them."""

    def side(self) -> int | None:
        """The side of the images if all are squares of one size, else None."""
        sizes = set(self.sizes())
        return next(iter(sizes))[0] if len({side for size in sizes for side in size}) == 1 else None

    def warn_of_sizes(self, world: World, wanted: int | None = None) -> None:
        """Warn, in one line, of sizes that differ, or differ from that of the samples: only equal ones compare."""
        sizes = self.sizes() if world.main else Counter()
        expected = "one size" if wanted is None else f"{wanted} x {wanted}, as the samples"
        if len(sizes) > 1 or (wanted is not None and set(sizes) - {(wanted, wanted)}):
            most = ", ".join(f"{w} x {h} ({n:,})" for (w, h), n in sizes.most_common(3))
            more = f" and {len(sizes) - 3} other sizes" if len(sizes) > 3 else ""
            world.warn(f"{self.argument}: images of {most}{more}; expected {expected}")


def open_pictures(path: Path, argument: str) -> Pictures:
    """The images of a folder, or of a directory that `pmf data prepare` filled; `argument` is named in errors.

    Errors: `InputError` if there are none, or if a prepared directory is not complete.
    """
    with reading(argument, path):
        if any(path.glob("shard-*.*")):
            return _prepared(path, argument)
    files = find_images(path, argument=argument)
    read = images_of(files, argument=argument)
    return Pictures(files, len(files), read, cache(lambda: _sizes(files, argument)), argument)


def _prepared(path: Path, argument: str) -> Pictures:
    from pmf.data.shards import PreparedShards  # needs the extra `data`

    data = PreparedShards(path)

    def read(batch: range) -> Iterator[Tensor]:
        try:
            yield torch.stack([data.read(i)[0] for i in batch])
        except CorruptImageError as error:
            raise InputError(f"{argument}: {path} holds a corrupt image: {error}") from error

    size = data.settings.size
    files = sorted(path.glob("shard-*.arrow"))
    return Pictures(files, len(data), read, lambda: Counter({(size, size): len(data)}), argument)


def _sizes(files: list[Path], argument: str) -> Counter[tuple[int, int]]:
    with extra("eval", f"{argument}: pictures need"):
        import PIL.Image  # noqa: F401

    def size(file: Path) -> tuple[int, int] | None:
        try:
            with open_file(file) as opened:
                return open_picture(opened).size
        except Exception:  # reading its pixels will name what is wrong
            return None

    with ThreadPoolExecutor() as pool:
        return Counter(found for found in pool.map(size, files) if found is not None)


def compute_together(
    sets: Sequence[tuple[Chunks, Extractor]],
    spans: list[range],
    source: Source,
    world: World,
    batch_size: int,
    stopping: Callable[[], bool] = never,
) -> None:
    """Compute the chunks in the main process's list, a share in every process; return when all are done. See `compute`.

    If `stopping` becomes true in any process, every process raises `Stopped` before its next batch: they agree before
    each one, as often as the process with the most batches has some. Finished chunks stay on disk.
    """
    spans = world.broadcast(spans)
    shares = [spans[rank :: world.size] for rank in range(world.size)]
    batches = [sum(-(-len(span) // batch_size) for span in share) for share in shares]
    agreed = 0

    def agree() -> None:
        nonlocal agreed
        agreed += 1
        stop_together(world, stopping)

    progress = world.main
    compute(sets, shares[world.rank], source, batch_size=batch_size, progress=progress, before=agree)
    while agreed < max(batches):
        agree()
    world.wait()


def pictures_digest(pictures: Pictures, extractor: Extractor) -> str:
    """Digest of the files' paths, sizes and times and of the extractor: a name for the images' features."""
    listing = [(str(file), *listed(str(file))) for file in pictures.files]
    return digest(listing, extractor_digest(extractor))


def _described(statistics: Statistics, pictures: Pictures, extractor: Extractor) -> Statistics:
    """The statistics with what is known of their features."""
    space = getattr(extractor, "space", None)
    size = pictures.side() if space else None
    return replace(statistics, resize=extractor.resize, space=space, image_size=size)


def write_folder_statistics(
    pictures: Pictures,
    out: Path,
    extractor: Extractor,
    world: World,
    config: ExtractionConfig,
    *,
    keep: bool,
    again: bool = True,
    stopping: Callable[[], bool] = never,
) -> None:
    """Write the statistics of these images, with the features if `keep`; an interrupted call resumes when repeated.

    Unless `again`, a file that another evaluation wrote meanwhile is kept.
    """
    name = f".{out.name}.{pictures_digest(pictures, extractor)}-{config.chunk}"
    chunks = Chunks(out.parent / name, pictures.count, config.chunk)
    with alone(out.parent / f"{name}.lock", world, stopping) as held:
        if not held:
            raise Stopped
        if not again and world.broadcast(out.is_file()):
            return
        compute_together([(chunks, extractor)], chunks.missing(), pictures.read, world, config.batch_size, stopping)
        world.main_first(lambda: _described(chunks.statistics(keep=keep), pictures, extractor).save(out))
        chunks.remove()
