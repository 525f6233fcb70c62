"""Draw the same random numbers twice: for a value, and for its tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch


def _state() -> tuple:
    """The states of the default generators of the CPU and of the current GPU."""
    return torch.get_rng_state(), torch.cuda.get_rng_state() if torch.cuda.is_initialized() else None


def _restore(state: tuple) -> None:
    cpu, cuda = state
    torch.set_rng_state(cpu)
    if cuda is not None:
        torch.cuda.set_rng_state(cuda)


@contextmanager
def replayed() -> Iterator[Callable[..., Any]]:
    """Give `replay(function, ...)`, which calls a function with the generators as they were on entry.

    Afterwards the generators go on as if that call had not been.
    """
    before = _state()

    def replay(function: Callable, *args: Any, **kwargs: Any) -> Any:
        after = _state()
        _restore(before)
        try:
            return function(*args, **kwargs)
        finally:
            _restore(after)

    yield replay
