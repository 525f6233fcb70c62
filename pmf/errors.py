"""Bad input: the one exception for it, and when values can be checked."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.private import FakeTensor


class InputError(Exception):
    """Bad input: one line that names the argument, what came and what was expected.

    Not a ValueError, which command-line parsers catch and reword.
    """


def require(condition: bool, message: str) -> None:
    """Raise `InputError(message)` unless `condition` holds."""
    if not condition:
        raise InputError(message)


def first_line(error: BaseException) -> str:
    """What an error says in one line; its kind where it says nothing."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def readable(*tensors: Tensor) -> bool:
    """True on real CPU tensors outside compilers: a look neither waits for a GPU nor breaks a graph."""
    if torch.compiler.is_compiling():
        return False
    return all(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in tensors)
