"""Files of a checkpoint that can be trusted: PyTorch's distributed format with checksums, read without running code.

A file of values, `__<rank>_<n>.distcp`, and `.metadata`, a pickle that says what is where, each have a `.crc32` beside
them. Reading unpickles nothing but the classes of the metadata and values that `torch.load(weights_only=True)` allows.
"""

from __future__ import annotations

import dataclasses
import io
import os
import pickle
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta
from torch.distributed.checkpoint.planner import ReadItem, SavePlan, SavePlanner
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future

from pmf.errors import InputError, first_line, require
from pmf.sizes import is_endless

METADATA = ".metadata"
CHECKSUM = ".crc32"
PIECE = 1 << 22  # bytes read at a time
ALLOWED = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(name for name, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "pathlib": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePath", "PurePosixPath"},
}
"""Module -> names that a checkpoint's metadata may refer to. None of them runs code from the file."""


class CheckedWriter(dcp.FileSystemWriter):
    """Writes a checkpoint and a checksum beside every file. Each process computes those of its own files."""

    files: Sequence[Path] = ()
    """Those of the checkpoint, of all processes."""

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:  # noqa: D102
        try:
            written = super().write_data(plan, planner)
        except Exception as error:
            raise _system_error(error) from None
        _write_checksums(Path(self.path) / result.storage_data.relative_path for result in written.wait())
        return written

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """Write the metadata, in the first process, which knows from now on all `files`."""
        names = {result.storage_data.relative_path for written in results for result in written}
        self.files = [Path(self.path) / name for name in (METADATA, *sorted(names))]
        super().finish(metadata, results)
        _write_checksums([Path(self.path) / METADATA])


class CheckedReader(dcp.FileSystemReader):
    """Reads a checkpoint that may come from anyone."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:  # noqa: D102
        metadata = read_metadata(Path(self.path))
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


class CheckedPlanner(dcp.DefaultLoadPlanner):
    """Loads values that are not tensors without unpickling what a file names, and only such as the state has there."""

    def set_up_planner(self, state_dict: dict, metadata: Metadata | None = None, is_coordinator: bool = False) -> None:  # noqa: D102
        super().set_up_planner(state_dict, metadata, is_coordinator)
        stored = {} if metadata is None else metadata.state_dict_metadata
        for name, tensor in self.state_dict.items():
            if isinstance(tensor, torch.Tensor) and name in stored:
                properties = getattr(stored[name], "properties", None)
                found = "no tensor" if properties is None else properties.dtype
                require(found == tensor.dtype, f"{name}: expected a tensor of {tensor.dtype}, got {found}")

    def load_bytes(self, read_item: ReadItem, value: io.BytesIO) -> None:  # noqa: D102
        plain, buffer = torch.load(value, weights_only=True), io.BytesIO()
        name = read_item.dest_index.fqn
        if isinstance(self.state_dict.get(name), int | float):
            require(isinstance(plain, int | float), f"{name}: expected a number, got {plain!r:.80}")
        torch.save(plain, buffer)  # the base class unpickles: give it bytes of our own
        buffer.seek(0)
        super().load_bytes(read_item, buffer)


_PYTHONS: Any = pickle._Unpickler
"""The unpickler that is written in Python: that in C reserves any memory that a file asks for."""


class _Unpickler(_PYTHONS):
    dispatch = dict(_PYTHONS.dispatch)

    def find_class(self, module: str, name: str) -> Any:
        if name in ALLOWED.get(module, ()):
            return super().find_class(module, name)
        raise InputError(f"{METADATA} refers to {module}.{name}, which no checkpoint of ours does")

    def load_build(self) -> None:
        """Set the fields of an object of the metadata. Those of a class or an enumeration would change this process."""
        target = self.stack[-2]
        plain = dataclasses.is_dataclass(target) and not isinstance(target, type)
        require(plain, lambda: f"{METADATA} changes {target!r}, which no checkpoint of ours does")
        super().load_build()

    dispatch[pickle.BUILD[0]] = load_build


ABSENT = (FileNotFoundError, IsADirectoryError, NotADirectoryError)
"""What opening a file that is not there raises. Of other errors of the system the file may be whole."""


def read_metadata(folder: Path) -> Metadata:
    """What a checkpoint holds and where.

    Errors: `InputError` if it is damaged, missing, or refers to anything else; `OSError` if it cannot be read now.
    """
    try:
        require(not is_endless(folder / METADATA), f"{METADATA} is a pipe or a device, expected a file")
        with open(folder / METADATA, "rb") as file:
            metadata = _Unpickler(file).load()
        names = _names(metadata)
    except ABSENT:
        raise InputError(f"{METADATA} is missing") from None
    except (InputError, OSError):
        raise
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{METADATA} cannot be read: {first_line(error)}") from error
    outside = [name for name in names if Path(name).name != name]
    require(not outside, f"{METADATA} refers to {outside}, expected files beside it")
    return metadata


def files_of(folder: Path) -> list[Path]:
    """The files that a checkpoint consists of. Errors: see `read_metadata`."""
    return [folder / name for name in (METADATA, *_names(read_metadata(folder)))]


def damage(file: Path) -> str | None:
    """What is wrong with a file of a checkpoint; None if nothing is, or if an earlier version wrote no checksums.

    Errors: `OSError` if it cannot be read now.
    """
    beside = Path(f"{file}{CHECKSUM}")
    try:
        for one in (file, beside):
            if is_endless(one):
                return f"{one.name} is a pipe or a device, expected a file"
        if not beside.exists() and any(file.parent.glob(f"*{CHECKSUM}")):
            return f"{beside.name} is missing"
        if beside.exists() and beside.read_text().strip() != _checksum(file):
            return f"{file.name} does not have the checksum that it was written with"
        return None if file.exists() else f"{file.name} is missing"
    except ABSENT:
        return f"{file.name} is missing"
    except ValueError as error:
        return f"{beside.name} cannot be read: {first_line(error)}"


def _system_error(error: BaseException) -> BaseException:
    """The failure of the system behind an error, such as a full disk; PyTorch's writer hides it behind its own."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OSError):
        cause = cause.__cause__ or cause.__context__
    return cause or error


def _names(metadata: Metadata) -> list[str]:
    """The names of the files with values."""
    return sorted({str(info.relative_path) for info in metadata.storage_data.values()})


def _write_checksums(files: Iterable[Path]) -> None:
    for file in sorted(set(files)):
        with open(f"{file}{CHECKSUM}", "w") as beside:
            beside.write(f"{_checksum(file)}\n")
            beside.flush()
            os.fsync(beside.fileno())


def _checksum(file: Path) -> str:
    """CRC-32, which any single flipped bit changes, and size."""
    total, size = 0, 0
    with open(file, "rb") as opened:
        while piece := opened.read(PIECE):
            total, size = zlib.crc32(piece, total), size + len(piece)
    return f"{total:08x} {size}"
