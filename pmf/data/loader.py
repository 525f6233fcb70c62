"""Batches that depend only on (seed, step): a run resumes exactly at any step, without saved state."""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from functools import lru_cache
from multiprocessing.util import Finalize

import torch
from torch import Tensor

from pmf.data.reading import Reader
from pmf.data.training_data import CorruptImageError, TrainingData
from pmf.data.workers import STOP_SIGNALS, Batches
from pmf.draws import step_seed
from pmf.errors import InputError, checked_device, require
from pmf.fields import check_values
from pmf.images import to_float

__all__ = ["MAX_CORRUPT", "STOP_SIGNALS", "Loader", "epoch_order"]

MAX_CORRUPT = 100
MAX_WORKERS = 512
"""Beyond it a number must be a mistake, which would fill the memory with processes."""

log = logging.getLogger(__name__)


@lru_cache(maxsize=2)  # a batch may span two epochs, and the next batch starts in the second
def epoch_order(length: int, seed: int, epoch: int) -> Tensor:
    """The order of an epoch's images, a permutation int64 [length]. Do not write to it: it is cached."""
    generator = torch.Generator().manual_seed(step_seed(seed, epoch, "epoch"))
    return torch.randperm(length, generator=generator)


class Loader:
    """An endless iterator over the training batches of one rank.

    The permutations of epochs 0, 1, ... are concatenated. Step s reads positions [s B, (s + 1) B) of them, where B is
    `batch_size`, the global batch; rank k of W gets the k-th of W contiguous parts. A loader with `first_step`
    therefore continues a run exactly, on any number of ranks and workers.

    Yields (x, y): x float32 [B / W, c, H, W] in [-1, 1] and y int64 [B / W] on `device`. `workers` processes read
    ahead (0: the caller reads). For CUDA, batches are copied through pinned memory, and bytes are scaled on the device.
    With `flip`, each image is mirrored left to right with probability 1/2; the draw depends only on (seed, step)
    and the image's place in the global batch.

    An unreadable image is named in a warning and replaced by the next readable one, so that batches keep their size
    and every run makes the same replacement. Errors: `InputError` if the batch is not divisible by the number of
    ranks, once this rank has met more than `max_corrupt` different unreadable images, for images and labels that are
    not as `TrainingData` has them, for whatever else `data.read` raises, and if a worker dies. It closes the loader.
    """

    def __init__(
        self,
        data: TrainingData,
        batch_size: int,
        *,
        seed: int,
        rank: int = 0,
        world: int = 1,
        workers: int = 0,
        first_step: int = 0,
        flip: bool = False,
        device: torch.device | str = "cpu",
        max_corrupt: int = MAX_CORRUPT,
    ) -> None:
        numbers = dict(batch_size=batch_size, rank=rank, world=world, workers=workers, first_step=first_step)
        check_values(int, **numbers, seed=seed, max_corrupt=max_corrupt)
        check_values(bool, flip=flip)
        require(world > 0, f"world: expected a positive number, got {world}")
        require(0 <= rank < world, f"rank: expected a number in [0, {world}), got {rank}")
        require(
            batch_size > 0 and batch_size % world == 0,
            f"batch_size: expected a positive multiple of the {world} ranks, got {batch_size}",
        )
        require(workers <= MAX_WORKERS, f"workers: expected at most {MAX_WORKERS}, got {workers}")
        counts = dict(seed=seed, workers=workers, first_step=first_step, max_corrupt=max_corrupt)
        for name, value in counts.items():
            require(value >= 0, f"{name}: expected a number >= 0, got {value}")
        reader = Reader.of(data, max_corrupt)
        self.step = first_step
        """The step whose batch comes next."""
        self.device, self.max_corrupt = checked_device(device), max_corrupt
        self._corrupt: set[str] = set()
        indices = _shares(reader.length, batch_size, seed, rank, world, first_step, flip)
        self._batches = Batches(reader, indices, workers, pin_memory=self.device.type == "cuda")
        # At exit, multiprocessing sends SIGTERM, which workers ignore, and waits: end them before that.
        self._end = Finalize(self, self._batches.end, exitpriority=100)

    def close(self) -> None:
        """End the workers, within seconds. Deleting the loader, an error and the end of the process do the same."""
        self._end()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self._end.still_active():
            raise StopIteration
        try:
            images, labels = self._next()
        except Exception:
            self.close()
            raise
        self.step += 1
        return to_float(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

    def _next(self) -> tuple[Tensor, Tensor]:
        batch = self._batches.take()
        if batch.error is not None:
            line, cause = batch.error
            raise InputError(line) from cause
        for failure in batch.unreadable:
            self._count(failure)
        if batch.images is None:
            raise InputError(f"data: no readable image follows {batch.unreadable[0].key}")
        return batch.images, batch.labels

    def _count(self, failure: CorruptImageError) -> None:
        if failure.key in self._corrupt:
            return
        self._corrupt.add(failure.key)
        log.warning("unreadable image %s; the next readable one takes its place", failure)
        require(
            len(self._corrupt) <= self.max_corrupt,
            f"data: expected at most {self.max_corrupt} unreadable images, the last one is {failure}",
        )


def _shares(
    length: int, batch_size: int, seed: int, rank: int, world: int, first_step: int, flip: bool
) -> Iterator[list[tuple[int, bool]]]:
    """For each step, the images of one rank: the index of each, and whether it is mirrored."""
    share = batch_size // world
    for step in itertools.count(first_step):
        mirrored = torch.zeros(batch_size, dtype=torch.bool)
        if flip:
            generator = torch.Generator().manual_seed(step_seed(seed, step, "mirror"))
            mirrored = torch.randint(2, (batch_size,), generator=generator).bool()
        positions = range(step * batch_size + rank * share, step * batch_size + (rank + 1) * share)
        indices = [int(epoch_order(length, seed, position // length)[position % length]) for position in positions]
        yield list(zip(indices, mirrored[rank * share : (rank + 1) * share].tolist(), strict=True))
