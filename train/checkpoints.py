"""What a run resumes from: PyTorch's distributed checkpoints, written beside the training, each whole or absent."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import warnings
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pmf.errors import InputError, first_line
from pmf.train.distributed import World

FOLDER = "checkpoints"
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
FAILURES = (Exception, dcp.CheckpointException)  # which is a BaseException


class Checkpoints:
    """The rotating set `checkpoints/step-<number>` of a run directory.

    One is written under another name and renamed when every process's part is on the disk: a name that can be
    seen is a checkpoint that can be read, whenever the run is killed.
    """

    def __init__(self, directory: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = directory / FOLDER, world, keep
        # The writing thread talks to the other processes beside the training: in a group of its own.
        self.group = None if world.mesh is None else dist.new_group(backend="gloo")
        self.pending: tuple[int, Future] | None = None

    def steps(self) -> list[int]:
        """The steps of the complete checkpoints, in order."""
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.folder.glob("step-*"))
        return sorted(int(match[1]) for match in found if match)

    def save(self, step: int, state: dict[str, object]) -> None:
        """Copy the state and begin to write it; the training may go on at once.

        Errors: `InputError` when this or the previous checkpoint cannot be written; earlier ones stay.
        """
        self.publish(wait=True)
        if self.world.broadcast(self._path(step).exists()):
            return
        partial = self.folder / f".step-{step:08d}"
        self.world.main_first(lambda: _clear(partial))
        try:
            future = dcp.async_save(
                state, checkpoint_id=str(partial), process_group=self.group, no_dist=self.group is None
            )
        except FAILURES as error:
            raise self._failure(step, error) from error
        self.pending = (step, future)

    def publish(self, wait: bool) -> None:
        """Publish the pending checkpoint once it is on the disk, and remove what the rotation lets go.

        Errors: `InputError` when it could not be written; earlier ones stay.
        """
        if self.pending is None or not (wait or self.pending[1].done()):
            return
        (step, future), self.pending = self.pending, None
        try:
            future.result()
            if self.world.main:
                partial = self.folder / f".step-{step:08d}"
                _synchronise(partial)
                os.replace(partial, self._path(step))
                _synchronise(self.folder)
                for old in self.steps()[: -self.keep]:  # out of sight first: no half of one is ever seen
                    shutil.rmtree(self._path(old).replace(self.folder / f".step-{old:08d}"))
        except FAILURES as error:
            raise self._failure(step, error) from error

    def load(self, step: int, state: dict[str, object]) -> None:
        """Read that checkpoint into the tensors of `state`, in place.

        Errors: `InputError` when it does not fit the state or cannot be read.
        """
        with self._reading(step) as path:
            dcp.load(state, checkpoint_id=path, no_dist=self.group is None, process_group=self.group)

    def names(self, step: int) -> set[str]:
        """The names of all values in that checkpoint, keys joined by dots. Errors: it cannot be read."""
        with self._reading(step) as path:
            return set(dcp.FileSystemReader(path).read_metadata().state_dict_metadata)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[str]:
        try:
            yield str(self._path(step))
        except FAILURES as error:
            raise InputError(f"resume: cannot continue from {self._path(step)}: {_reason(error)}") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _failure(self, step: int, error: Exception) -> InputError:
        if self.world.main:
            shutil.rmtree(self.folder / f".step-{step:08d}", ignore_errors=True)
        kept = self.steps()
        last = f"the last complete checkpoint is that of step {kept[-1]}" if kept else "no checkpoint is complete"
        return InputError(f"path: cannot write {self._path(step)}: {_reason(error)}; {last}")


def _clear(partial: Path) -> None:
    """Room for a new checkpoint: its folder, and nothing of others that were never finished."""
    for torn in partial.parent.glob(".step-*"):
        shutil.rmtree(torn)
    partial.mkdir(parents=True)


def _synchronise(folder: Path) -> None:
    """Bring the folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    failures = getattr(error, "failures", None)  # dcp.CheckpointException: one failure per rank
    if failures:
        error = next(iter(failures.values()))[0]
    return first_line(error)
