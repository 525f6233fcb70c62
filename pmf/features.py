"""Features of many images, stored on disk in chunks so that an interrupted computation can resume."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from multiprocessing.pool import ThreadPool
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, extra, first_line, printable, reading, require
from pmf.fields import check_fields, check_values
from pmf.metrics import Resize, Statistics, frechet_distance, inception_score, precision_recall
from pmf.pictures import SUFFIXES, is_picture, read_file, read_picture, walk

log = logging.getLogger(__name__)
SPLITS = 10
"""Splits of the images; the Inception score is the mean over them."""
Source = Callable[[range], Iterable[Tensor]]
"""Yields the images with these indices in order, as tensors uint8 [k, 3, H, W] of any sizes."""


class Extractor(Protocol):
    """A module, such as `pmf.metrics.inception`: images uint8 [n, 3, H, W] -> features [n, d], logits [n, classes]."""

    resize: Resize

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


def find_images(folder: Path, *, argument: str = "folder") -> list[Path]:
    """All pictures below a folder by their names, see `pmf.pictures`, sorted by path.

    Errors: `InputError` if there are none or they cannot be listed; it calls the folder `argument`.
    """
    check_values(Path, folder=folder)
    with reading(argument, folder):
        require(folder.exists(), f"{argument}: {printable(folder)} does not exist, expected a folder of images")
        require(folder.is_dir(), f"{argument}: {printable(folder)} is a file, expected a folder of images")
        found = sorted(Path(entry.path) for entry in walk(folder) if is_picture(entry.name))
    require(bool(found), f"{argument}: {printable(folder)} holds no {', '.join(SUFFIXES)}")
    return found


def images_of(files: list[Path], *, argument: str = "files") -> Source:
    """Decode the files to RGB bytes at their own size; stack consecutive images of equal size.

    The first picture that loses something, such as transparency, is named in a warning. Errors: `InputError` on what is
    no readable picture. Both call the files `argument`.
    """
    lost: set[str] = set()

    def read(batch: range) -> Iterator[Tensor]:
        with ThreadPool(min(32, (os.cpu_count() or 1) + 4)) as pool:  # unlike an executor, it is left at Ctrl-C
            images = list(pool.imap(partial(_read_image, lost, argument), [files[i] for i in batch]))
        for _, group in groupby(images, key=lambda image: image.shape):
            yield torch.stack(list(group))

    return read


def _read_image(lost: set[str], argument: str, file: Path) -> Tensor:
    with extra("eval", f"{argument}: {printable(file)} needs"):
        import PIL.Image  # noqa: F401

    def note(kind: str) -> None:
        if kind not in lost:
            lost.add(kind)
            log.warning("%s: %s %s; other pictures may be the same", argument, printable(file), kind)

    try:
        return torch.from_numpy(np.array(read_picture(read_file(file), note))).permute(2, 0, 1)
    except Exception as error:  # decoders may raise anything on torn files
        raise InputError(f"{argument}: {printable(file)} is not a readable picture: {first_line(error)}") from error


def _bar(total: int) -> AbstractContextManager:
    with extra("eval", "progress: a progress bar needs"):
        from tqdm import tqdm
    return tqdm(total=total, unit="image", desc="features")


@dataclass(frozen=True)
class Chunks:
    """`count` images in chunks of `size`, and the directory with the features of the finished chunks.

    The chunks on disk are the only state. Several processes may divide the chunks among them, on shared storage: chunk
    boundaries do not depend on the number of processes, so the features do not either.
    """

    directory: Path
    count: int
    size: int

    def __post_init__(self) -> None:
        check_fields(self)
        require(self.count >= 0 and self.size > 0, f"count, size: expected >= 0 and > 0, got {self.count}, {self.size}")

    def spans(self) -> list[range]:
        """The indices of each chunk's images."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def file(self, span: range) -> Path:
        """The file with the features of a chunk."""
        return self.directory / f"chunk-{span.start:08d}.npz"

    def missing(self) -> list[range]:
        """The chunks that are not on disk."""
        return [span for span in self.spans() if not self.file(span).is_file()]

    def write(self, span: range, features: Tensor, logits: Tensor) -> None:
        """Write the features [n, d] and logits [n, classes] of a chunk."""
        arrays = (features.float().numpy(), logits.float().numpy())
        write_atomically(self.file(span), lambda temporary: np.savez(temporary, features=arrays[0], logits=arrays[1]))

    def read(self, name: str) -> Iterator[Tensor]:
        """ "features" or "logits", float32, chunk by chunk in order. Errors: `InputError` on a missing chunk."""
        for span in self.spans():
            file = self.file(span)
            require(file.is_file(), f"out: {file} is missing, expected storage that every process sees")
            try:
                with np.load(file, allow_pickle=False) as arrays:
                    values = torch.from_numpy(arrays[name])
                fits = values.dtype == torch.float32 and values.ndim == 2 and len(values) == len(span)
            except Exception as error:  # of a damaged file, anything
                raise InputError(f"out: {file} is damaged, remove it: {first_line(error)}") from error
            require(fits, f"out: {file} is damaged, remove it: {list(values.shape)} is not of {len(span)} images")
            yield values

    def statistics(self, *, keep: bool) -> Statistics:
        """Statistics of all features, with the features themselves if `keep`."""
        kept = []
        total = None
        for features in self.read("features"):
            part = Statistics.of(features)
            total = part if total is None else total.merge(part)
            kept += [features] if keep else []
        if total is None:
            raise InputError("count: expected features of at least one image, got none")
        return replace(total, features=torch.cat(kept).numpy()) if keep else total

    def remove(self) -> None:
        """Delete the chunks."""
        shutil.rmtree(self.directory, ignore_errors=True)


def compute(
    sets: Sequence[tuple[Chunks, Extractor]],
    spans: list[range],
    source: Source,
    *,
    batch_size: int,
    progress: bool = True,
    before: Callable[[], None] = lambda: None,
) -> None:
    """Compute the features of these chunks of images by one or several extractors, each into its own `Chunks`.

    The images of a batch are read once for all. A chunk is written as soon as it is complete; one that is on disk
    stays. `progress` shows a bar. `before` is called before every batch; what it raises ends the computation.
    """
    with _bar(sum(map(len, spans))) if progress else nullcontext() as bar:
        for span in spans:
            missing: list[tuple[Chunks, Extractor, list[tuple[Tensor, Tensor]]]] = [
                (chunks, extractor, []) for chunks, extractor in sets if not chunks.file(span).is_file()
            ]
            for start in range(span.start, span.stop, batch_size):
                before()
                batch = range(start, min(start + batch_size, span.stop))
                for images in source(batch):
                    for _, extractor, parts in missing:
                        features, logits = extractor(images)
                        parts.append((features.cpu(), logits.cpu()))
                if bar is not None:
                    bar.update(len(batch))
            for chunks, _, parts in missing:
                chunks.write(span, *map(torch.cat, zip(*parts, strict=True)))


def quality(chunks: Chunks, reference: Statistics, device: torch.device | str = "cpu") -> dict[str, float | None]:
    """FID, Inception score with its deviation, precision and recall of generated images against a reference.

    `chunks` holds their features, made with the reference's extractor and resize. Precision and recall are computed
    on `device`, and are None if the reference has no features. In other spaces than Inception's, FID is called
    frechet_distance; without logits there is no score. Errors: see the functions of `pmf.metrics`.
    """
    known: dict[str, Any] = dict(resize=reference.resize, space=reference.space, image_size=reference.image_size)
    generated, logits = replace(chunks.statistics(keep=True), **known), torch.cat(list(chunks.read("logits")))
    scores = {}
    if logits.shape[1] > 0:
        scores = dict(
            zip(("inception_score", "inception_score_std"), inception_score(logits, splits=SPLITS), strict=True)
        )
    precision = recall = None
    if reference.features is not None:
        both = (torch.from_numpy(x).to(device) for x in (generated.features, reference.features))
        precision, recall = precision_recall(*both)
    name = "fid" if (reference.space or "inception ").startswith("inception ") else "frechet_distance"
    distance = {name: frechet_distance(generated, reference)}
    return {**distance, **scores, "precision": precision, "recall": recall}
