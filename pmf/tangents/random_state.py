"""Draw the same random numbers twice: for a value, and for its tangent."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _generators(arguments: list) -> list[torch.Generator]:
    """Those among the arguments, and the default ones of the CPU and of the GPUs of the tensors among them."""
    gpus = {x.device.index for x in arguments if isinstance(x, Tensor) and x.is_cuda}
    given = [x for x in arguments if isinstance(x, torch.Generator)]
    return [torch.default_generator, *(torch.cuda.default_generators[i] for i in gpus), *given]


_DRAWING = threading.RLock()
"""Threads share the generators."""


@contextmanager
def replayed(arguments: list) -> Iterator[Callable[..., Any]]:
    """Give `replay(function, ...)`, which calls a function with the generators as they were on entry.

    Afterwards they go on as if that call had not been. Other threads that replay wait meanwhile.
    """
    with _DRAWING:
        yield _replay(_generators(arguments))


def _replay(generators: list[torch.Generator]) -> Callable[..., Any]:
    before = [one.get_state() for one in generators]

    def restore(states: list[Tensor]) -> None:
        for one, state in zip(generators, states, strict=True):
            one.set_state(state)

    def replay(function: Callable, *args: Any, **kwargs: Any) -> Any:
        after = [one.get_state() for one in generators]
        restore(before)
        try:
            return function(*args, **kwargs)
        finally:
            restore(after)

    return replay
