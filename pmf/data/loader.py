"""Batches that depend only on (seed, step): a run resumes exactly at any step, without saved state."""

from __future__ import annotations

import itertools
import logging
import signal
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pmf.data.training_data import CorruptImageError, TrainingData
from pmf.draws import step_seed
from pmf.errors import require
from pmf.images import to_float

MAX_CORRUPT = 100
PREFETCH = 4
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGQUIT)
"""Signals that ask a run to save and stop. Slurm's --signal=USR1@60 sends SIGUSR1 60 seconds before the time limit."""

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
    ranks, and once this rank has met more than `max_corrupt` different unreadable images.
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
        require(len(data) > 0, "data: expected at least one image, got none")
        require(0 <= rank < world, f"rank: expected a number in [0, {world}), got {rank}")
        require(
            batch_size > 0 and batch_size % world == 0,
            f"batch_size: expected a positive multiple of the {world} ranks, got {batch_size}",
        )
        for name, value in (("workers", workers), ("first_step", first_step), ("max_corrupt", max_corrupt)):
            require(value >= 0, f"{name}: expected a number >= 0, got {value}")
        self.step = first_step
        """The step whose batch comes next."""
        self.device, self.max_corrupt = torch.device(device), max_corrupt
        self._corrupt: set[str] = set()
        loader = DataLoader(
            _Images(data, max_corrupt),
            batch_sampler=_shares(len(data), batch_size, seed, rank, world, first_step, flip),
            collate_fn=_collate,
            num_workers=workers,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_ignore_stop_signals,
            generator=torch.Generator(),  # else it would draw from the global generator
        )
        # Block the signals until the workers ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._batches = [iter(loader)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # At exit, multiprocessing sends SIGTERM, which workers ignore, so end them before that.
        Finalize(self, self._batches.clear, exitpriority=100)

    def close(self) -> None:
        """End the workers. Deleting the loader does the same."""
        self._batches.clear()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        if not self._batches:
            raise StopIteration
        images, labels, failures = next(self._batches[0])
        for failure in failures:
            self._count(failure)
        require(images is not None, f"data: no readable image follows {failures[0].key if failures else ''}")
        self.step += 1
        return to_float(images.to(self.device, non_blocking=True)), labels.to(self.device, non_blocking=True)

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


@dataclass(frozen=True)
class _Images(Dataset):
    """Item (index, mirror) is an image, its label, and the failures to read the images before it.

    The image is None if more than `max_corrupt` images in a row are unreadable, or all are.
    """

    data: TrainingData
    max_corrupt: int

    def __getitem__(self, item: tuple[int, bool]) -> tuple[Tensor | None, int, list[CorruptImageError]]:
        (index, mirror), length = item, len(self.data)
        failures: list[CorruptImageError] = []
        for position in range(index, index + min(length, self.max_corrupt + 1)):
            try:
                image, label = self.data.read(position % length)
                return image.flip(-1) if mirror else image, label, failures
            except CorruptImageError as error:
                failures.append(error)
        return None, 0, failures


def _collate(
    items: list[tuple[Tensor | None, int, list[CorruptImageError]]],
) -> tuple[Tensor | None, Tensor, list[CorruptImageError]]:
    images, labels, failures = zip(*items, strict=True)
    missing = any(image is None for image in images)
    return None if missing else default_collate(list(images)), torch.tensor(labels), [*itertools.chain(*failures)]


def _ignore_stop_signals(worker: int) -> None:
    """Ignore the stop signals: they reach the whole process group, but workers must still deliver the last batches."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
