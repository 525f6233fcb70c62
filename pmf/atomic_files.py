"""Atomic writes: a file is either complete or absent."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from safetensors import SafetensorError

from pmf.errors import InputError, first_line


def write_atomically(path: str | Path, write: Callable[[Path], object]) -> None:
    """Call `write(temporary)`, then move the temporary file to `path` in one step.

    Errors: `InputError` when `path` cannot be written (no directory, no permission, a full disk).
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=path.suffix)
    except OSError as error:
        raise InputError(f"path: cannot write {path}: {error.strerror}") from None
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o666 & ~umask)  # mkstemp grants access to the owner only
        os.replace(temporary, path)
    except (OSError, RuntimeError, SafetensorError) as error:
        raise InputError(f"path: cannot write {path}: {first_line(error)}") from error
    finally:
        temporary.unlink(missing_ok=True)
