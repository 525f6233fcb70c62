"""Exponential moving averages of the weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from pmf.errors import require
from pmf.fields import check_values
from pmf.private import foreach_lerp_
from pmf.sharded import local


class EMA:
    """An exponential moving average of a model's parameters with the published ramp (EDM, arXiv 2206.00364).

    average = beta average + (1 - beta) p, beta = 0.5^(batch / max(half_life, 1e-8)),
    half_life = min(1000 half_life_kimg, 0.05 images_seen), in images.

    `average` holds it by parameter name, in the parameters' dtype. With FSDP2 it is sharded like the parameters:
    construct it after `fully_shard`.
    """

    def __init__(self, model: nn.Module, half_life_kimg: float) -> None:
        check_values(nn.Module, model=model)
        check_values(float, half_life_kimg=half_life_kimg)
        require(half_life_kimg > 0, f"half_life_kimg: expected a positive number, got {half_life_kimg}")
        self.half_life_kimg = half_life_kimg
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, images_seen: int) -> None:
        """Move the average towards the model after a step of `batch` images; images_seen includes them."""
        check_values(int, batch=batch, images_seen=images_seen)
        require(
            0 < batch <= images_seen,
            f"images_seen: expected at least batch, a positive number, got {images_seen}, {batch}",
        )
        half_life = min(self.half_life_kimg * 1000, 0.05 * images_seen)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        averages = [local(value) for value in self.average.values()]
        foreach_lerp_(averages, [local(p.detach()) for p in model.parameters()], 1 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.average
