"""Features of many images, kept on disk in chunks: interrupted, the computation continues where it stopped."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, require
from pmf.metrics import Resize, Statistics, frechet_distance, inception_score, precision_recall

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
SPLITS = 10
"""Parts of the images that the Inception score is the mean of."""
Source = Callable[[range], Iterable[Tensor]]
"""The images of these indices, in order: uint8 [k, 3, H, W] each, of any sizes."""


class Extractor(Protocol):
    """A module, such as `pmf.metrics.inception`: images uint8 [n, 3, H, W] -> features [n, d], logits [n, classes]."""

    resize: Resize

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


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


@dataclass(frozen=True)
class Chunks:
    """`count` images, `size` to a chunk, and the directory that holds the features of the finished chunks.

    The chunks on disk are the only state. Several processes may each compute some of the chunks, on storage that all of
    them see: chunk boundaries do not depend on the processes, so neither does any feature.
    """

    directory: Path
    count: int
    size: int

    def spans(self) -> list[range]:
        """The indices of each chunk's images."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def file(self, span: range) -> Path:
        """The file with the features of a chunk."""
        return self.directory / f"chunk-{span.start:08d}.npz"

    def missing(self, finished: Callable[[range], bool] = lambda span: True) -> list[range]:
        """The chunks that are not on disk, or there but not `finished`."""
        return [span for span in self.spans() if not (self.file(span).is_file() and finished(span))]

    def compute(
        self, spans: list[range], source: Source, extractor: Extractor, *, batch_size: int, progress: bool = True
    ) -> None:
        """Compute these chunks and write them, each when it is done."""
        with tqdm(total=sum(map(len, spans)), unit="image", desc="features", disable=not progress) as bar:
            for span in spans:
                parts = []
                for start in range(span.start, span.stop, batch_size):
                    batch = range(start, min(start + batch_size, span.stop))
                    parts += [[x.cpu() for x in extractor(images)] for images in source(batch)]
                    bar.update(len(batch))
                self._write(span, *map(torch.cat, zip(*parts, strict=True)))

    def _write(self, span: range, features: Tensor, logits: Tensor) -> None:
        arrays = (features.float().numpy(), logits.float().numpy())
        write_atomically(self.file(span), lambda temporary: np.savez(temporary, features=arrays[0], logits=arrays[1]))

    def read(self, name: str) -> Iterator[Tensor]:
        """ "features" or "logits", float32, chunk by chunk in order. Errors: a chunk that is not there."""
        for span in self.spans():
            file = self.file(span)
            require(file.is_file(), f"out: {file} is missing, expected storage that every process sees")
            with np.load(file) as arrays:
                yield torch.from_numpy(arrays[name])

    def statistics(self, *, keep: bool) -> Statistics:
        """Statistics of all features, with the features themselves if `keep`."""
        kept = []
        total = None
        for features in self.read("features"):
            part = Statistics.of(features)
            total = part if total is None else total.merge(part)
            kept += [features] if keep else []
        return replace(total, features=torch.cat(kept).numpy()) if keep else total

    def remove(self) -> None:
        """Delete the chunks."""
        shutil.rmtree(self.directory, ignore_errors=True)


def quality(chunks: Chunks, reference: Statistics, device: torch.device | str = "cpu") -> dict[str, float | None]:
    """FID, Inception score with its deviation, precision and recall of generated images against a reference.

    `chunks` hold their features, of the extractor and resize of the reference. Precision and recall, computed on
    `device`, are None where the reference has no features. Errors: as of the functions of `pmf.metrics`.
    """
    generated = replace(chunks.statistics(keep=True), resize=reference.resize)
    score, deviation = inception_score(torch.cat(list(chunks.read("logits"))), splits=SPLITS)
    precision = recall = None
    if reference.features is not None:
        both = (torch.from_numpy(x).to(device) for x in (generated.features, reference.features))
        precision, recall = precision_recall(*both)
    return {
        "fid": frechet_distance(generated, reference),
        "inception_score": score,
        "inception_score_std": deviation,
        "precision": precision,
        "recall": recall,
    }
