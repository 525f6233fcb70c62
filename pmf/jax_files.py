"""Read the authors' JAX train states as flax writes them: an orbax folder or one msgpack file, optionally zipped."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import re
import shutil
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PureWindowsPath
from typing import Any

from pmf.errors import InputError, extra, first_line, require
from pmf.sizes import check_declared

ORBAX_FILES = ("_METADATA", "manifest.ocdbt", "checkpoint")
"""A folder that has any of these is an orbax checkpoint."""
DEPTH = 3
"""Depth of folders to which checkpoints are searched for."""


def is_state(path: Path) -> bool:
    """Whether `path` is a zip, a train state, or a folder of train states, judging by names alone."""
    return path.suffix == ".zip" or bool(_checkpoints(path))


def _checkpoints(path: Path) -> list[Path]:
    """The topmost train states in `path`, which may be one itself."""
    found = [path]
    for _ in range(DEPTH + 1):
        states = [entry for entry in found if _is_checkpoint(entry)]
        if states:
            return states
        found = [child for entry in found if entry.is_dir() for child in sorted(entry.iterdir())]
    return []


def _is_checkpoint(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).is_file() for name in ORBAX_FILES)
    return _step(path) is not None and path.is_file()


def _step(path: Path) -> int | None:
    """The step in flax's name of a finished checkpoint, `checkpoint_<step>`; None for any other name."""
    match = re.fullmatch(r"checkpoint_(\d+)", path.name)
    return int(match[1]) if match else None


def _latest(path: Path) -> Path:
    """The train state in `path`; of several steps in one folder, the latest, as in flax."""
    found = _checkpoints(path)
    require(bool(found), f"source: {path} holds no JAX train state")
    steps = {state: _step(state) for state in found}
    together = len({state.parent for state in found}) == 1 and None not in steps.values()
    held = ", ".join(str(state.relative_to(path)) for state in found)
    require(len(found) == 1 or together, f"source: {path} holds several train states, expected one of {held}")
    return max(found, key=lambda state: steps[state] or 0)


class StateFile:
    """A train state on disk: `tree` has its nested names, with leaves that have a shape; `read` returns values.

    orbax reads only the requested part, into host memory, whatever devices wrote it; msgpack files are read whole.
    """

    def __init__(self, path: Path) -> None:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # else JAX claims most GPU memory
        if path.is_dir():
            import jax
            import numpy as np
            import orbax.checkpoint as ocp

            self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
            self._as_numpy = ocp.RestoreArgs(restore_type=np.ndarray)
            metadata = self._orbax.metadata(str(path.absolute()))
            metadata = getattr(metadata, "item_metadata", metadata)  # since orbax 0.10
            self.tree = getattr(metadata, "tree", metadata)
            if self.tree is None:
                raise ValueError("orbax finds no array names in it")
            stored = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
            check_declared(f"source: {path}", sum(map(_bytes, jax.tree.leaves(self.tree))), stored)
        else:
            from flax.serialization import msgpack_restore

            self._orbax = None
            self.tree = msgpack_restore(path.read_bytes())
        self.path = path

    def read(self, *names: str) -> Any:
        """The values of the subtree at these nested names."""
        part = self.tree
        for name in names:
            part = part[name]
        if self._orbax is None:
            return part
        import jax

        item, arguments = part, jax.tree.map(lambda _: self._as_numpy, part)
        for name in reversed(names):
            item, arguments = {name: item}, {name: arguments}
        values = self._orbax.restore(str(self.path.absolute()), item=item, restore_args=arguments, transforms={})
        for name in names:
            values = values[name]
        return values


def _bytes(leaf: Any) -> int:
    """Bytes of an array of which the shape and the dtype are known; at least one per value."""
    return math.prod(getattr(leaf, "shape", None) or ()) * getattr(getattr(leaf, "dtype", None), "itemsize", 1)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence orbax, which logs a warning for every array."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def open_state(source: Path) -> Iterator[StateFile]:
    """Open the train state in a zip (unpacked to a temporary folder meanwhile), a folder or a file.

    Errors: `InputError` if flax or orbax is not installed, on a zip that is corrupt, without train state or too large
    for the temporary folder, and on a checkpoint that cannot be read; also on any failure inside the `with` block.
    """
    with contextlib.ExitStack() as stack:
        folder = source
        if source.suffix == ".zip":
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="pmf-")))
            _unpack(source, folder)
        try:
            stack.enter_context(_quiet())
            with extra("jax-checkpoints", f"source: {source} is a JAX train state, which needs"):
                yield StateFile(_latest(folder))
        except InputError as error:
            raise InputError(str(error).replace(str(folder), str(source))) from error
        except Exception as error:  # reading a corrupt checkpoint can raise anything
            raise InputError(f"source: {source} is not a readable JAX train state: {first_line(error)}") from error


def _unpack(source: Path, folder: Path) -> None:
    try:
        with zipfile.ZipFile(source) as archive:
            _check_entries(source, archive)
            needed, free = sum(entry.file_size for entry in archive.infolist()), shutil.disk_usage(folder).free
            check_declared(f"source: {source}", needed, source.stat().st_size)
            require(
                needed < free,
                f"source: {source} unpacks to {needed / 1e9:.1f} GB, and {folder.parent} has {free / 1e9:.1f} free: "
                "expected another TMPDIR, or the unpacked folder",
            )
            archive.extractall(folder)
    except (zipfile.BadZipFile, zlib.error, EOFError, OSError, RuntimeError) as error:
        raise InputError(f"source: {source} is not a readable zip: {first_line(error)}") from error


def _check_entries(source: Path, archive: zipfile.ZipFile) -> None:
    """Check that no path leaves the archive, and that an entry is named like a train state."""
    paths = [PureWindowsPath(name) for name in archive.namelist()]  # parses both slashes, and drives
    outside = [name for name, path in zip(archive.namelist(), paths, strict=True) if path.anchor or ".." in path.parts]
    require(not outside, f"source: {source} holds the path {', '.join(outside[:1])!r}, which leads out of it")
    states = any(path.name in ORBAX_FILES or _step(Path(path.name)) is not None for path in paths)
    require(states, f"source: {source} holds no JAX train state, expected checkpoint_<step> in it")
