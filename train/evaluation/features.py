"""Features of many images, computed in chunks by all processes. Finished chunks stay on disk until all are done."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from pmf.atomic_files import write_atomically
from pmf.errors import require
from pmf.metrics import Resize, Statistics, inception
from pmf.train.config import ExtractionConfig
from pmf.train.distributed import World

Source = Callable[[range], Iterable[Tensor]]
"""The images of these indices, in order: uint8 [k, 3, H, W] each, of any sizes."""


class Extractor(Protocol):
    """A module: images uint8 [n, 3, H, W] -> features [n, d] and logits [n, classes]."""

    resize: Resize

    def __call__(self, images: Tensor, /) -> tuple[Tensor, Tensor]: ...  # noqa: D102
    def state_dict(self) -> dict[str, Any]: ...  # noqa: D102


MakeExtractor = Callable[[Resize], Extractor]


def inception_of(config: ExtractionConfig, device: torch.device) -> MakeExtractor:
    """The usual extractor, by its resize."""
    return lambda resize: inception(config.inception, resize=resize, device=device)


@dataclass(frozen=True)
class Chunks:
    """`count` images, `size` to a chunk, and the directory that holds the features of the finished chunks.

    Chunk boundaries do not depend on the processes, so neither does any feature. The chunks on disk are the only state.
    The directory must be on storage that every process sees.
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

    def compute(
        self,
        source: Source,
        extractor: Extractor,
        world: World,
        *,
        batch_size: int,
        finished: Callable[[range], bool] = lambda span: True,
    ) -> None:
        """Compute every chunk that is missing or not `finished`; return when all processes are done."""
        missing = world.broadcast([s for s in self.spans() if not (self.file(s).is_file() and finished(s))])
        mine = missing[world.rank :: world.size]
        with tqdm(total=sum(map(len, mine)), unit="image", desc="features", disable=not world.main) as bar:
            for span in mine:
                parts = []
                for start in range(span.start, span.stop, batch_size):
                    batch = range(start, min(start + batch_size, span.stop))
                    parts += [[x.cpu() for x in extractor(images)] for images in source(batch)]
                    bar.update(len(batch))
                self._write(span, *map(torch.cat, zip(*parts, strict=True)))
        world.wait()

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


def digest(*parts: object) -> str:
    """A name, 32 hexadecimal digits, for these values, by their repr."""
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


def extractor_digest(extractor: Extractor) -> str:
    """A name for what an extractor computes."""
    return digest(weights_digest(extractor), extractor.resize)
