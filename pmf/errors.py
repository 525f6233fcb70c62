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
    """The first line of an error's message, or its type where the message is empty."""
    return next(iter(str(error).strip().splitlines()), type(error).__name__)


def readable(*tensors: Tensor) -> bool:
    """Whether reading values waits for no GPU and breaks no graph: real CPU tensors, outside compilers."""
    if torch.compiler.is_compiling():
        return False
    return all(t.device.type == "cpu" and not isinstance(t, FakeTensor) for t in tensors)
