"""Features of many images: computed chunk by chunk over all processes, each chunk kept on disk once it is done."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import groupby
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from pmf.atomic_files import write_atomically
from pmf.errors import InputError, require
from pmf.metrics import Resize, Statistics

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")

# The images of these indices, in order: uint8 [k, 3, H, W] each, of any sizes.
Source = Callable[[range], Iterable[Tensor]]


class Extractor(Protocol):
    """A module: images uint8 [n, 3, H, W] -> features [n, d] and logits [n, classes]."""

    resize: Resize

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


@dataclass(frozen=True)
class Ranks:
    """The processes that share an evaluation: this one's place, how many there are, and how they talk."""

    rank: int = 0
    size: int = 1
    local: int = 0
    group: Any = None

    def agree(self, value):
        """What the first process holds, in all of them."""
        box = [value]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def wait(self) -> None:
        """Until every process is here."""
        if self.size > 1:
            dist.barrier(group=self.group)


@contextmanager
def all_ranks() -> Iterator[Ranks]:
    """The processes of torch.distributed where it runs, of torchrun where it started this one, else this one alone.

    They exchange only small objects, over gloo, and wait for each other for as long as it takes.
    """
    started = "RANK" in os.environ and "WORLD_SIZE" in os.environ
    ours = started and not dist.is_initialized()
    if ours:
        dist.init_process_group("gloo")
    try:
        yield present_ranks()
    finally:
        if ours:
            dist.destroy_process_group()


def present_ranks() -> Ranks:
    """The processes of torch.distributed where it runs, else this one alone. Every process must call."""
    if not (dist.is_available() and dist.is_initialized()):
        return Ranks()
    group = dist.new_group(backend="gloo", timeout=timedelta(days=30))
    return Ranks(dist.get_rank(), dist.get_world_size(), int(os.environ.get("LOCAL_RANK", 0)), group)


@dataclass(frozen=True)
class Chunks:
    """`count` images, `size` to a chunk, and the directory that holds the features of the finished chunks.

    Chunk boundaries do not depend on the processes, so neither does any feature: the set of chunks on disk
    is all the state there is. The directory must be on storage that every process sees.
    """

    directory: Path
    count: int
    size: int

    def spans(self) -> list[range]:
        """The indices of each chunk's images."""
        return [range(start, min(start + self.size, self.count)) for start in range(0, self.count, self.size)]

    def file(self, span: range) -> Path:
        """Where the features of a chunk lie."""
        return self.directory / f"chunk-{span.start:08d}.npz"

    def compute(
        self,
        source: Source,
        extractor: Extractor,
        ranks: Ranks,
        *,
        batch_size: int,
        finished: Callable[[range], bool] = lambda span: True,
    ) -> None:
        """Compute every chunk that is missing, or not `finished` otherwise; return when all processes are done."""
        missing = ranks.agree([s for s in self.spans() if not (self.file(s).is_file() and finished(s))])
        mine = missing[ranks.rank :: ranks.size]
        with tqdm(total=sum(map(len, mine)), unit="image", desc="features", disable=ranks.rank > 0) as bar:
            for span in mine:
                parts = []
                for start in range(span.start, span.stop, batch_size):
                    batch = range(start, min(start + batch_size, span.stop))
                    parts += [[x.cpu() for x in extractor(images)] for images in source(batch)]
                    bar.update(len(batch))
                self._write(span, *map(torch.cat, zip(*parts, strict=True)))
        ranks.wait()

    def _write(self, span: range, features: Tensor, logits: Tensor) -> None:
        arrays = {"features": features.float().numpy(), "logits": logits.float().numpy()}
        write_atomically(self.file(span), lambda temporary: np.savez(temporary, **arrays))

    def read(self, name: str) -> Iterator[Tensor]:
        """ "features" or "logits", float32, chunk by chunk in order. Errors: a chunk that is not there."""
        for span in self.spans():
            file = self.file(span)
            require(file.is_file(), f"out: {file} is missing, expected storage that every process sees")
            with np.load(file) as arrays:
                yield torch.from_numpy(arrays[name])

    def statistics(self, *, keep: bool) -> Statistics:
        """Statistics of all features, and the features themselves where `keep` asks for them."""
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


def pictures(folder: Path) -> list[Path]:
    """All pictures below a folder (png, jpg, jpeg, webp, bmp), sorted by path. Errors: there are none."""
    require(folder.is_dir(), f"reference: {folder} does not exist, expected a folder of images or an npz archive")
    found = sorted(p for p in folder.rglob("*") if p.suffix.lower() in PICTURES and not p.name.startswith("."))
    require(bool(found), f"reference: {folder} holds no {', '.join(PICTURES)}")
    return found


def picture_source(files: list[Path]) -> Source:
    """A source that decodes pictures to RGB bytes at their own size; neighbours of one size go together."""

    def read(batch: range) -> Iterator[Tensor]:
        with ThreadPoolExecutor() as pool:
            images = list(pool.map(_read_picture, (files[i] for i in batch)))
        for _, group in groupby(images, key=lambda image: image.shape):
            yield torch.stack(list(group))

    return read


def folder_identity(files: list[Path], extractor: Extractor) -> str:
    """A name for the features of these pictures: it changes with the pictures and with the extractor."""
    listing = [(str(f), f.stat().st_size, f.stat().st_mtime_ns) for f in files]
    return digest(listing, extractor_digest(extractor))


def extractor_digest(extractor: Extractor) -> str:
    """A name for what an extractor computes."""
    return digest(weights_digest(extractor), extractor.resize)


def folder_statistics(
    files: list[Path],
    out: Path,
    extractor: Extractor,
    ranks: Ranks,
    *,
    batch_size: int,
    chunk: int,
    keep: bool,
) -> None:
    """Write the statistics of these pictures to `out`; an interrupted call continues when repeated."""
    identity = folder_identity(files, extractor)
    chunks = Chunks(out.parent / f".{out.name}.{identity}-{chunk}", len(files), chunk)
    chunks.compute(picture_source(files), extractor, ranks, batch_size=batch_size)
    if ranks.rank == 0:
        replace(chunks.statistics(keep=keep), resize=extractor.resize).save(out)
        chunks.remove()
    ranks.wait()


def _read_picture(file: Path) -> Tensor:
    try:
        with Image.open(file) as picture:
            return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"reference: {file} is not a readable picture: {error}") from error


def digest(*parts: object) -> str:
    """A name, 32 hexadecimal digits, for what these values say."""
    return hashlib.sha256("\n".join(map(repr, parts)).encode()).hexdigest()[:32]


def file_digest(file: Path) -> str:
    """A name for the bytes of a file."""
    return hashlib.sha256(file.read_bytes()).hexdigest()[:32]


def weights_digest(module: torch.nn.Module | Extractor) -> str:
    """A name for all weights and buffers of a network."""
    total = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        total.update(f"{name} {value.dtype} {list(value.shape)}".encode())
        total.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return total.hexdigest()[:32]
