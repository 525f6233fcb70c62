"""Adam with Nesterov momentum (Dozat 2016), as optax computes it; neither torch.optim.AdamW nor NAdam does."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import nn

from pmf.private import (
    foreach_add_,
    foreach_addcdiv_,
    foreach_addcmul_,
    foreach_div_,
    foreach_lerp_,
    foreach_mul_,
    foreach_sqrt,
)
from pmf.train.moments import begin, count, local, nesterov


class NesterovAdam(torch.optim.Optimizer):
    """m = lerp(m, g, 1 - b1); v = lerp(v, g^2, 1 - b2); p -= lr nesterov(m, g) / (sqrt(v / (1 - b2^t)) + eps).

    nesterov(m, g) = b1 m / (1 - b1^(t + 1)) + (1 - b1) g / (1 - b1^t), t counting a parameter's steps from 1
    (`optax.adam(nesterov=True)`; torch.optim.NAdam has a schedule of momenta instead). Everything is elementwise and
    in the parameters' dtype, all parameters in one pass (foreach); sharded ones are updated part by part.
    The state of a parameter: exp_avg, exp_avg_sq like it, and step, on the CPU.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps))

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        """Update every parameter that has a gradient."""
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], *group["betas"], group["eps"])

    def _update(self, parameters: list[nn.Parameter], lr: float, b1: float, b2: float, eps: float) -> None:
        states = [self.state[p] for p in parameters]
        for state, p in zip(states, parameters, strict=True):
            begin(state, p, ("exp_avg", "exp_avg_sq"))
        counts = count(states)
        gradients = [local(p.grad) for p in parameters]
        means, squares = ([local(state[name]) for state in states] for name in ("exp_avg", "exp_avg_sq"))
        foreach_lerp_(means, gradients, 1 - b1)
        foreach_mul_(squares, b2)
        foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        scale = foreach_sqrt(squares)
        foreach_div_(scale, [math.sqrt(1 - b2**t) for t in counts])
        foreach_add_(scale, eps)
        foreach_addcdiv_([local(p) for p in parameters], nesterov(means, gradients, b1, counts), scale, -lr)
