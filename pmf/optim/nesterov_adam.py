"""Adam with Nesterov momentum (Dozat 2016) as optax computes it; neither torch.optim.AdamW nor NAdam does."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pmf.errors import require
from pmf.fields import check_values
from pmf.optim.moments import MomentOptimizer, advance, evaluated, gather, nesterov
from pmf.private import (
    foreach_add_,
    foreach_addcdiv_,
    foreach_addcmul_,
    foreach_div_,
    foreach_lerp_,
    foreach_mul_,
    foreach_sqrt,
)
from pmf.sharded import local


class NesterovAdam(MomentOptimizer):
    """m = lerp(m, g, 1 - b1); v = lerp(v, g^2, 1 - b2); p -= lr nesterov(m, g) / (sqrt(v / (1 - b2^t)) + eps).

    nesterov(m, g) = b1 m / (1 - b1^(t + 1)) + (1 - b1) g / (1 - b1^t), where t counts a parameter's steps from 1
    (`optax.adam(nesterov=True)`; torch.optim.NAdam follows a momentum schedule instead). All operations are elementwise
    in the parameters' dtype and run over all parameters at once (foreach). Under FSDP2 each rank updates its shards.
    State of a parameter: exp_avg and exp_avg_sq, shaped like it, and step, on the CPU.

    `shard_over`: a mesh of one dimension over which the moments of replicated parameters are sharded by rows (ZeRO-1;
    `pmf.sharded.shard`). Each rank updates its rows and sends them to the others.
    """

    moments = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.95),
        eps: float = 1e-8,
        shard_over: DeviceMesh | None = None,
    ) -> None:
        super().__init__(parameters, dict(lr=lr, betas=betas, eps=eps), shard_over)

    def check_group(self, group: dict[str, Any]) -> None:
        """Raise `InputError` unless these are options of Adam."""
        lr, betas, eps = group["lr"], group["betas"], group["eps"]
        check_values(float, lr=lr, eps=eps)
        check_values(tuple[float, float], betas=betas)
        good = lr >= 0 and eps > 0 and all(0 <= beta < 1 for beta in betas)
        require(good, f"lr, betas, eps: expected >= 0, in [0, 1) and > 0, got {lr}, {betas}, {eps}")

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient. `closure`: see `evaluated`."""
        result = evaluated(closure)
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if parameters:
                self._update(parameters, group["lr"], group["betas"], group["eps"])
        return result

    def _update(self, parameters: list[nn.Parameter], lr: float, betas: tuple[float, float], eps: float) -> None:
        b1, b2 = betas
        mesh = self.shard_over
        counts, gradients, (means, squares) = advance(self.state, parameters, self.moments, mesh)
        foreach_lerp_(means, gradients, 1 - b1)
        foreach_mul_(squares, b2)
        foreach_addcmul_(squares, gradients, gradients, 1 - b2)
        scale = foreach_sqrt(squares)
        foreach_div_(scale, [math.sqrt(1 - b2**t) for t in counts])
        foreach_add_(scale, eps)
        foreach_addcdiv_([local(p, mesh) for p in parameters], nesterov(means, gradients, b1, counts), scale, -lr)
        if mesh is not None:
            gather(parameters, mesh)
