"""Reference statistics of a folder of images."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from pmf.errors import InputError, require
from pmf.train.config import ExtractionConfig
from pmf.train.distributed import World
from pmf.train.evaluation.features import Chunks, Extractor, Source, digest, extractor_digest

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")


def find_images(folder: Path) -> list[Path]:
    """All image files below a folder (png, jpg, jpeg, webp, bmp), sorted by path. Errors: there are none."""
    require(folder.is_dir(), f"reference: {folder} does not exist, expected a folder of images or an npz archive")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in SUFFIXES and not p.name.startswith("."))
    require(bool(found), f"reference: {folder} holds no {', '.join(SUFFIXES)}")
    return found


def images_of(files: list[Path]) -> Source:
    """The files decoded to RGB bytes at their own size; neighbours of equal size are stacked."""

    def read(batch: range) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_read_image, (files[i] for i in batch)))
        for _, group in groupby(images, key=lambda image: image.shape):
            yield torch.stack(list(group))

    return read


def _read_image(file: Path) -> Tensor:
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"reference: {file} is not a readable picture: {error}") from error


def folder_digest(files: list[Path], extractor: Extractor) -> str:
    """A name for the features of these images: it changes with the files and with the extractor."""
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return digest(listing, extractor_digest(extractor))


def write_folder_statistics(
    files: list[Path], out: Path, extractor: Extractor, world: World, config: ExtractionConfig, *, keep: bool
) -> None:
    """Write the statistics of these images, with the features if `keep`; interrupted, it continues when repeated."""
    name = f".{out.name}.{folder_digest(files, extractor)}-{config.chunk}"
    chunks = Chunks(out.parent / name, len(files), config.chunk)
    chunks.compute(images_of(files), extractor, world, batch_size=config.batch_size)
    if world.main:
        replace(chunks.statistics(keep=keep), resize=extractor.resize).save(out)
        chunks.remove()
    world.wait()
