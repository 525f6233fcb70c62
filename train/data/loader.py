"""Batches by training step, sharded by rank: resumed at any step exactly, with no saved state."""

from __future__ import annotations

import itertools
import logging
import signal
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.util import Finalize

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from pmf.errors import require
from pmf.train.data.interface import CorruptImageError, TrainingData, to_float
from pmf.train.data.order import indices_at, mirrored_at

MAX_CORRUPT = 100
PREFETCH = 4
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Throughput:
    """What a loader has served this rank so far."""

    images: int
    """Images served."""
    elapsed: float
    """Seconds from the first request to the last answer."""
    waited: float
    """Seconds of those in which the loader was asked and had not answered."""

    @property
    def images_per_second(self) -> float:
        """Images over elapsed seconds; where nothing else runs meanwhile, what the data can deliver."""
        return self.images / self.elapsed if self.elapsed else 0.0

    @property
    def waited_share(self) -> float:
        """The share of time lost to waiting for data."""
        return self.waited / self.elapsed if self.elapsed else 0.0


class Loader:
    """An endless iterator over the training batches of one rank.

    Step s sees the positions [s B, (s + 1) B) of the permutations of epochs 0, 1, ... in a row, B being
    `batch_size`, the global batch; rank k of W gets the k-th of its W contiguous parts. Batches are functions
    of (seed, step): a loader with `first_step` continues exactly, on any number of ranks and workers.

    Yields (x, y): x float32 [B / W, c, H, W] in [-1, 1] and y int64 [B / W] on `device`. `workers` processes
    read ahead (0: reading happens in the caller); on CUDA their bytes travel through pinned memory and are
    scaled on the device. With `flip`, each image is mirrored, left to right, with probability 1/2, which is a function
    of (seed, step) and its place in the global batch.

    An image that cannot be read is named in a warning and replaced by the next index that can be, so that
    batches keep their size and every run makes the same replacement. Errors: `InputError` where the batch does
    not divide by the ranks, and once this rank met more than `max_corrupt` different unreadable images.
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
        self._images, self._began, self._ended, self._waited = 0, 0.0, 0.0, 0.0
        loader = DataLoader(
            _Reader(data, max_corrupt),
            batch_sampler=_Places(len(data), batch_size, seed, rank, world, first_step, flip),
            num_workers=workers,
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            prefetch_factor=PREFETCH if workers else None,
            worker_init_fn=_survive_signals,
            generator=torch.Generator(),  # else it would draw from, and move, the global one
        )
        # Workers start with these signals held back, until they ignore them.
        before = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
        try:
            self._batches = [iter(loader)]
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        # Workers do not heed SIGTERM, by which multiprocessing would end them at exit: they must be gone by then.
        Finalize(self, self._batches.clear, exitpriority=100)

    def close(self) -> None:
        """End the workers; dropping the loader does so too."""
        self._batches.clear()

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self

    def __next__(self) -> tuple[Tensor, Tensor]:
        asked = time.perf_counter()
        if not self._batches:
            raise StopIteration
        images, labels, failures = next(self._batches[0])
        self._ended = time.perf_counter()
        self._began = self._began or asked
        self._waited += self._ended - asked
        self._images += len(labels)
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

    @property
    def throughput(self) -> Throughput:
        """Images served, and the time that took, since the first request."""
        return Throughput(self._images, self._ended - self._began, self._waited)


@dataclass(frozen=True)
class _Places:
    """What each step's batch of one rank is made of, from `first_step` on, without end: (index, whether mirrored)."""

    length: int
    batch_size: int
    seed: int
    rank: int
    world: int
    first_step: int
    flip: bool

    def __iter__(self) -> Iterator[list[tuple[int, bool]]]:
        share = self.batch_size // self.world
        offset = self.rank * share
        for step in itertools.count(self.first_step):
            indices = indices_at(self.length, self.seed, step * self.batch_size + offset, share)
            mirrored = [False] * share
            if self.flip:
                mirrored = mirrored_at(self.seed, step, self.batch_size)[offset : offset + share]
            yield list(zip(indices, mirrored, strict=True))


@dataclass(frozen=True)
class _Reader(Dataset):
    """Reads an image or, where it is corrupt, the next readable one: (image, label, what failed).

    The image is None where more failed than the budget allows.
    """

    data: TrainingData
    max_corrupt: int

    def __getitem__(self, place: tuple[int, bool]) -> tuple[Tensor | None, int, list[CorruptImageError]]:
        index, mirrored = place
        failures: list[CorruptImageError] = []
        while len(failures) < min(len(self.data), self.max_corrupt + 1):
            try:
                image, label = self.data.read((index + len(failures)) % len(self.data))
                return image.flip(-1) if mirrored else image, label, failures
            except CorruptImageError as error:
                failures.append(error)
        return None, 0, failures


def _collate(samples: list[tuple]) -> tuple[Tensor | None, Tensor, list[CorruptImageError]]:
    images, labels, failures = zip(*samples, strict=True)
    whole = all(image is not None for image in images)
    batch = default_collate(list(images)) if whole else None
    return batch, torch.tensor(labels), [f for some in failures for f in some]


def _survive_signals(worker: int) -> None:
    """Signals that ask a run to save and stop reach its whole process group; the last batches must still come."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
