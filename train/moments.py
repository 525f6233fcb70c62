"""What Muon and Adam share: running means of gradients, corrected for having started at zero, on every rank's part."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from pmf.private import foreach_add_, foreach_mul


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a sharded tensor; any other tensor itself."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def begin(state: dict[str, Tensor], p: nn.Parameter, moments: Sequence[str]) -> None:
    """Zero moments of a parameter that has none, and its count of steps: on the CPU, where nobody waits to read it.

    In float32 whatever the defaults are: bfloat16 counts to 256.
    """
    if not state:
        state["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
        state.update({name: torch.zeros_like(p) for name in moments})


def count(states: Sequence[dict[str, Tensor]]) -> list[float]:
    """Count a step of each parameter: their numbers t, from 1."""
    for state in states:
        state["step"] += 1
    return [state["step"].item() for state in states]


def nesterov(means: list[Tensor], gradients: list[Tensor], beta: float, counts: list[float]) -> list[Tensor]:
    """beta m / (1 - beta^(t + 1)) + (1 - beta) g / (1 - beta^t): the next mean, were the gradient the same again.

    Both terms are corrected for the zero that m started at, as optax does it; m holds step t's gradient already.
    """
    ahead = foreach_mul(means, [beta / (1 - beta ** (t + 1)) for t in counts])
    foreach_add_(ahead, foreach_mul(gradients, [(1 - beta) / (1 - beta**t) for t in counts]))
    return list(ahead)
