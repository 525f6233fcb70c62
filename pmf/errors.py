"""The exception for bad input and missing packages, and when input values can be checked."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from pmf.private import FakeTensor, is_vmapped, traced_by_fx


class InputError(Exception):
    """Bad input: one line that names the argument, the value received and the value expected.

    Not a ValueError: command-line parsers catch and reword those.
    """

    def __str__(self) -> str:
        return super().__str__().replace("\n", "\\n")  # a name may hold a line break


def require(condition: bool, message: str | Callable[[], str]) -> None:
    """Raise `InputError(message)` unless `condition` holds.

    A message that computes something, or that can fail while the condition holds, is a function: it is called only on
    failure.
    """
    if not condition:
        raise InputError(message() if callable(message) else message)


def check_path(argument: str, path: object, kind: str = "file") -> None:
    """Raise `InputError` unless this is a str or a path."""
    require(isinstance(path, str | os.PathLike), lambda: f"{argument}: expected the name of a {kind}, got {path!r:.80}")


def checked_device(device: torch.device | str | int) -> torch.device:
    """That device. Errors: `InputError` if it is none, or not there."""
    try:
        torch.empty(0, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, ImportError, TypeError) as error:
        raise InputError(f"device: cannot use {device!r}: {first_line(error)}") from None


def check_network(model: object) -> None:
    """Raise `InputError` unless this is a `PMFDiT`, or wraps one as FSDP does."""
    require(hasattr(model, "predict_dual"), lambda: f"model: expected a PMFDiT, got {type(model).__name__}")


def no_vmap(op: str) -> RuntimeError:
    """The error of an op's kernels inside `torch.vmap`."""
    advice = 'make the mapped dimension part of the batch, or use impl="reference"'
    return RuntimeError(f"{op}: kernels have no torch.vmap (nor jacfwd, which needs it); {advice}")


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type if the message is empty."""
    return printable(next(iter(str(error).strip().splitlines()), type(error).__name__))


def reason_of(error: BaseException) -> str:
    """Why a file could not be read or written: the system's words where it gave some, else the error's first line."""
    return getattr(error, "strerror", None) or first_line(error)


@contextlib.contextmanager
def reading(argument: str, path: object) -> Iterator[None]:
    """Turn a failure of the system inside the `with` block, which reads or looks up `path`, into an `InputError`."""
    try:
        yield
    except OSError as error:
        name = f"{printable(error.filename or path):.350}"
        raise InputError(f"{argument}: cannot read {name}: {reason_of(error)}") from error


def printable(name: object) -> str:
    """A name on one line of UTF-8: control characters, line breaks and bytes that are not UTF-8 are escaped."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(name))


@contextlib.contextmanager
def extra(name: str, sentence: str) -> Iterator[None]:
    """Turn a failure to import inside the `with` block into an `InputError` that says which extra to install.

    `sentence` says what needs it and ends in "needs".
    """
    try:
        yield
    except ImportError as error:
        raise InputError(f"{sentence} pip install 'pixel-meanflow[{name}]': {first_line(error)}") from error


def extent(values: Tensor) -> str:
    """The range of some values, as a part of a message."""
    return f"{values.min().item()} to {values.max().item()}" if values.numel() else "none"


def readable(*tensors: Tensor) -> bool:
    """Whether values can be read without waiting for a GPU or breaking a graph: real CPU tensors, uncompiled code.

    Those that `torch.vmap` maps over have no single value.
    """
    if torch.compiler.is_compiling() or traced_by_fx():
        return False
    return all(t.device.type == "cpu" and not isinstance(t, FakeTensor) and not is_vmapped(t) for t in tensors)
