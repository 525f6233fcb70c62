"""Snapshots to resume from: PyTorch's distributed checkpoints, written in the background, each complete or absent.

A damaged one is noticed by its checksums and set aside, and the one before it is used.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
import re
import shutil
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from pmf.errors import InputError, first_line, reading, require
from pmf.train.checkpoint_files import CheckedPlanner, CheckedReader, CheckedWriter, damage, files_of, read_metadata
from pmf.train.distributed import CommonError, World

FOLDER = "checkpoints"
FAILURES = (Exception, dcp.CheckpointException)  # the latter is a BaseException
warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")


class Snapshots:
    """The rotating set `checkpoints/step-<number>` of a run directory.

    A snapshot is written under a hidden name and renamed once every process's part is on the disk, so a visible one
    can always be read, whenever the run is killed.
    """

    def __init__(self, directory: Path, world: World, keep: int) -> None:
        self.folder, self.world, self.keep = directory / FOLDER, world, keep
        # The writing thread communicates during training, so it needs a process group of its own.
        self.group = dist.new_group(backend="gloo") if world.size > 1 else None
        self.pending: tuple[int, Future, CheckedWriter] | None = None
        self.readable = False  # whether a snapshot of this process was read back

    def steps(self) -> list[int]:
        """The steps of the complete snapshots, in order. Errors: `OSError` if the folder cannot be read."""
        return steps_in(self.folder)

    def prepare(self) -> None:
        """Create the folder and remove what killed processes left. Errors: `OSError` if it cannot be written."""
        self.folder.mkdir(exist_ok=True)
        _remove_torn(self.folder)
        os.rmdir(tempfile.mkdtemp(prefix=".step-", dir=self.folder))

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Copy the state and start writing it; training may go on at once.

        Errors: `InputError` when this or the previous snapshot cannot be written; earlier ones stay.
        """
        self.publish(wait=True)
        if self.world.broadcast(self._path(step).exists()):
            return
        self.world.main_first(partial(self._make_room, step))
        writer = CheckedWriter(self._partial(step))
        try:
            future = dcp.async_save(state, storage_writer=writer, process_group=self.group, no_dist=self.group is None)
        except FAILURES as error:
            raise InputError(self._failure(step, error)) from error
        assert isinstance(future, Future)  # async_save returns one unless asked for a staging future
        self.pending = (step, future, writer)

    def publish(self, wait: bool) -> None:
        """Publish the pending snapshot once it is on every process's disk, and remove the oldest beyond `keep`.

        Every process must call. Errors: `InputError` when it could not be written; earlier ones stay.
        """
        if self.pending is None or not (wait or all(self.world.gather(self.pending[1].done()))):
            return
        (step, future, writer), self.pending = self.pending, None
        try:
            future.result()  # fails in every process or in none
        except FAILURES as error:
            raise CommonError(self._failure(step, error)) from error
        self.world.main_first(partial(self._show, step, writer))

    def _show(self, step: int, writer: CheckedWriter) -> None:
        """Give a snapshot that is on the disk its name. The first one's metadata are read back, which takes seconds."""
        try:
            _check_shared((self.readable and writer.files) or files_of(self._partial(step)))
            self.readable = True
            _synchronise(self._partial(step))
            os.replace(self._partial(step), self._path(step))
            _synchronise(self.folder)
            self._remove_old()
        except OSError as error:
            raise InputError(self._failure(step, error)) from error

    def _remove_old(self) -> None:
        for old in self.steps()[: -self.keep]:
            with contextlib.suppress(OSError):  # someone may be reading it
                remove(self._path(old).replace(self._partial(old)))  # hidden first: a visible one is complete

    def newest(self) -> int:
        """The step of the newest snapshot that is whole. Damaged ones after it are set aside, which is said.

        Every process must call; they share the checking. Errors: `InputError` when there is none.
        """
        faults: dict[int, str] = {}
        steps, run = self.world.main_first(self._found), self.folder.parent
        require(bool(steps), f"resume: {run} has no complete checkpoint, nothing was saved there yet")
        for step in reversed(steps):
            fault = self._fault(step)
            if fault is None:
                self.world.main_first(partial(self._set_aside, faults, step))
                return step
            faults[step] = fault
        told = "; ".join(f"{self._path(step).name}: {fault}" for step, fault in faults.items())
        raise CommonError(f"resume: every checkpoint of {run} is damaged: {told}")

    def _found(self) -> list[int]:
        with reading("resume", self.folder):
            return self.steps()

    def _fault(self, step: int) -> str | None:
        """What is wrong with a snapshot; None if it is whole.

        Errors: `InputError` if it cannot be read now, which says nothing of what it holds.
        """
        unreadable, faults = None, list[str | None]()
        files, fault = self.world.main_first(partial(self._files, step))
        try:
            faults += [fault, *(damage(file) for file in files[self.world.rank :: self.world.size])]
        except OSError as error:
            unreadable = self._unreadable(step, error)
        self.world.raise_first(unreadable)
        return next(filter(None, itertools.chain(*self.world.gather(faults))), None)

    def _files(self, step: int) -> tuple[list[Path], str | None]:
        """The files of a snapshot, and why they are not known."""
        try:
            return files_of(self._path(step)), None
        except InputError as error:
            return [], str(error)
        except OSError as error:
            raise self._unreadable(step, error) from error

    def _unreadable(self, step: int, error: OSError) -> InputError:
        path = self._path(step)
        advice = f"nothing was changed; once {path} is elsewhere, a run resumes from the checkpoint before it"
        return InputError(f"resume: cannot read {error.filename or path}: {error.strerror}; {advice}")

    def _set_aside(self, faults: dict[int, str], step: int) -> None:
        """Hide damaged snapshots from later runs, which write new ones of these steps; nothing is deleted."""
        for damaged, fault in faults.items():
            path = self._path(damaged)
            aside = path.with_name(f"damaged-{path.name}")
            if aside.exists():
                remove(aside)
            path.replace(aside)
            self.world.say(f"resume: {path} is damaged: {fault}; it is now {aside.name}. Going back to step {step}")

    def load(self, step: int, state: dict[str, Any]) -> None:
        """Read that snapshot into the tensors of `state`, in place.

        Errors: `InputError` when it does not fit the state or cannot be read.
        """
        with self._reading(step) as path:
            dcp.load(
                state,
                storage_reader=CheckedReader(path),
                planner=CheckedPlanner(),
                process_group=self.group,
                no_dist=self.group is None,
            )

    def names(self, step: int) -> set[str]:
        """The names of all values in that snapshot, keys joined by dots. Errors: `InputError` if it cannot be read."""
        with self._reading(step) as path:
            return set(read_metadata(path).state_dict_metadata)

    @contextlib.contextmanager
    def _reading(self, step: int) -> Iterator[Path]:
        try:
            yield self._path(step)
        except FAILURES as error:
            raise CommonError(f"resume: cannot continue from {self._path(step)}: {_reason(error)}") from error

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step:08d}"

    def _partial(self, step: int) -> Path:
        return self.folder / f".step-{step:08d}"

    def _make_room(self, step: int) -> None:
        """Create the folder of a new snapshot, and delete unfinished ones."""
        try:
            self.folder.mkdir(exist_ok=True)  # not its parent: a run's directory that was removed stays so
            _remove_torn(self.folder)
            self._partial(step).mkdir()
        except OSError as error:
            raise InputError(self._failure(step, error)) from error

    def _failure(self, step: int, error: BaseException) -> str:
        """What to say of a snapshot that cannot be written; what is written of it is removed."""
        if self.world.main:
            shutil.rmtree(self._partial(step), ignore_errors=True)
        kept = []
        with contextlib.suppress(OSError):
            kept = self.steps()
        last = f"the last complete checkpoint is that of step {kept[-1]}" if kept else "no checkpoint is complete"
        return f"path: cannot write {self._path(step)}: {_reason(error)}; {last}"


def steps_in(folder: Path) -> list[int]:
    """The steps of the complete snapshots in a folder, in order; none if it is missing. Errors: `OSError`."""
    try:
        names = os.listdir(folder)
    except FileNotFoundError:
        return []
    found = (re.fullmatch(r"step-(\d{8,})", name) for name in names)
    return sorted(int(match[1]) for match in found if match)


def _remove_torn(folder: Path) -> None:
    """Remove what is left of snapshots that no process finished."""
    for torn in folder.glob(".step-*"):
        with contextlib.suppress(OSError):
            remove(torn)


def _check_shared(files: Sequence[Path]) -> None:
    """Errors: `OSError` if a process wrote its part of a snapshot where this one does not see it."""
    lost = [file.name for file in files if not file.exists()]
    if lost:
        raise OSError(errno.ENOENT, f"{lost[0]} was written elsewhere: expected a directory that all machines share")


def remove(path: Path) -> None:
    """Delete a folder, a file or a link, but not what it points to."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _synchronise(folder: Path) -> None:
    """Flush the folder's entries to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _reason(error: BaseException) -> str:
    """The innermost cause in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    if isinstance(error, dcp.CheckpointException) and error.failures:  # one per rank
        error = next(iter(error.failures.values()))[0]
    return (isinstance(error, OSError) and error.strerror) or first_line(error)
