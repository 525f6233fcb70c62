"""Reference statistics of a folder of images, computed by all processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pmf.features import Chunks, Extractor, Source, images_of
from pmf.train.config import ExtractionConfig
from pmf.train.distributed import World
from pmf.train.evaluation.results import digest, extractor_digest


def compute_together(
    chunks: Chunks, spans: list[range], source: Source, extractor: Extractor, world: World, batch_size: int
) -> None:
    """Compute the chunks in the main process's list, a share in every process; return when all are done."""
    chunks.compute(world.share(spans), source, extractor, batch_size=batch_size, progress=world.main)
    world.wait()


def folder_digest(files: list[Path], extractor: Extractor) -> str:
    """Digest of the files' paths, sizes and times and of the extractor: a name for the images' features."""
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return digest(listing, extractor_digest(extractor))


def write_folder_statistics(
    files: list[Path], out: Path, extractor: Extractor, world: World, config: ExtractionConfig, *, keep: bool
) -> None:
    """Write the statistics of these images, with the features if `keep`; an interrupted call resumes when repeated."""
    name = f".{out.name}.{folder_digest(files, extractor)}-{config.chunk}"
    chunks = Chunks(out.parent / name, len(files), config.chunk)
    compute_together(chunks, chunks.missing(), images_of(files), extractor, world, config.batch_size)
    if world.main:
        replace(chunks.statistics(keep=keep), resize=extractor.resize).save(out)
        chunks.remove()
    world.wait()
