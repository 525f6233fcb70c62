"""Common to Muon and Adam: running means of gradients with bias correction, on this rank's part of each parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from pmf.private import foreach_add_, foreach_mul
from pmf.sharded import local

State = dict[str, Tensor]
"""The optimizer state of one parameter."""


def evaluated(closure: Callable[[], Any] | None) -> Any:
    """Call `closure`, which recomputes loss and gradients, and return the loss; None without one. See `torch.optim`."""
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def initialise_state(state: State, p: Tensor, names: Sequence[str]) -> None:
    """Initialise an empty state with zero moments of these names and a step count of zero.

    The count is on the CPU, so that reading it never waits for a GPU, and always in float32: a default dtype of
    bfloat16 could count only to 256.
    """
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state.update({name: torch.zeros_like(p) for name in names})


def advance(
    states: Mapping[Tensor, State], parameters: Sequence[Tensor], names: Sequence[str]
) -> tuple[list[float], list[Tensor], list[list[Tensor]]]:
    """Count one step of each parameter: (step numbers t from 1, local gradients, local moments by name)."""
    chosen = [states[p] for p in parameters]
    for state, p in zip(chosen, parameters, strict=True):
        initialise_state(state, p, names)
        state["step"] += 1
    moments = [[local(state[name]) for state in chosen] for name in names]
    return [state["step"].item() for state in chosen], [_gradient(p) for p in parameters], moments


def _gradient(p: Tensor) -> Tensor:
    assert p.grad is not None  # optimizers select the parameters that have one
    return local(p.grad)


def nesterov(means: list[Tensor], gradients: list[Tensor], beta: float, counts: list[float]) -> list[Tensor]:
    """beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t): the mean one step ahead, if g stayed the same.

    m already includes the gradient g of step t. Both terms are corrected for m having started at zero, as in optax.
    """
    ahead = foreach_mul(means, [beta / (1 - beta ** (t + 1)) for t in counts])
    foreach_add_(ahead, foreach_mul(gradients, [(1 - beta) / (1 - beta**t) for t in counts]))
    return list(ahead)
