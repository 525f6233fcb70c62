"""Draw the same random numbers twice: for a value, and for its tangent."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


def _restore(cpu: Tensor, gpus: dict[torch.device, Tensor]) -> None:
    torch.set_rng_state(cpu)
    for device, state in gpus.items():
        torch.cuda.set_rng_state(state, device)


def _states(gpus: Iterable[torch.device]) -> tuple[Tensor, dict[torch.device, Tensor]]:
    return torch.get_rng_state(), {device: torch.cuda.get_rng_state(device) for device in gpus}


@contextmanager
def replayed(arguments: list) -> Iterator[Callable[..., Any]]:
    """Give `replay(function, ...)`, which calls a function with the generators as they were on entry.

    The generators are those of the CPU and of the GPUs of the tensors among `arguments`. Afterwards they go on as if
    that call had not been.
    """
    gpus = {x.device for x in arguments if isinstance(x, Tensor) and x.is_cuda}
    before = _states(gpus)

    def replay(function: Callable, *args: Any, **kwargs: Any) -> Any:
        after = _states(gpus)
        _restore(*before)
        try:
            return function(*args, **kwargs)
        finally:
            _restore(*after)

    yield replay
