"""The published optimizer: Muon on every Linear weight, Nesterov Adam on everything else; and the EMA copies."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from pmf.errors import require
from pmf.private import foreach_lerp_
from pmf.train.adam import NesterovAdam
from pmf.train.moments import local
from pmf.train.muon import Muon

DECAYS = ("linear", "cosine")


@dataclass(frozen=True)
class OptimizerConfig:
    """Muon and Adam, both with Nesterov momentum, of one learning rate; the defaults are the published values."""

    learning_rate: float = 1e-3
    """Learning rate of both optimizers."""
    momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    adam_eps: float = 1e-8
    """Offset of Adam's denominator."""
    warmup_steps: int = 0
    """Steps in which the learning rate rises linearly from zero, which is that of the first (0: none, as published)."""
    decay_share: float = 0.0
    """Share of the run, at its end, in which the learning rate falls (0: constant, as published); what of it lies in
    the warm-up is left out."""
    decay: Literal["linear", "cosine"] = "linear"
    """How it falls: in a straight line, or along half a cosine."""
    decay_to: float = 0.0
    """Where to, as a share of the learning rate."""
    clip_norm: float = 0.0
    """Clip the norm of the whole gradient to this (0: never, as published)."""

    def __post_init__(self) -> None:
        within = {
            "learning_rate": 0 < self.learning_rate < math.inf,
            "momentum": 0 <= self.momentum < 1,
            "newton_schulz_steps": 1 <= self.newton_schulz_steps < 100,
            "adam_betas": all(0 <= beta < 1 for beta in self.adam_betas),
            "adam_eps": 0 < self.adam_eps < math.inf,
            "warmup_steps": self.warmup_steps >= 0,
            "decay_share": 0 <= self.decay_share <= 1,
            "decay": self.decay in DECAYS,
            "decay_to": 0 <= self.decay_to <= 1,
            "clip_norm": 0 <= self.clip_norm < math.inf,
        }
        for name, good in within.items():
            require(good, f"optimizer.{name}: out of range, got {getattr(self, name)}")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon's, Adam's): Linear weights to Muon; biases, norms, gates, tokens, positions, convolutions and
    the class table to Adam.
    """
    muon = [m.weight for m in model.modules() if isinstance(m, nn.Linear)]
    chosen = {id(p) for p in muon}
    return muon, [p for p in model.parameters() if id(p) not in chosen]


def build_optimizers(
    model: nn.Module, config: OptimizerConfig, mesh: DeviceMesh | None = None
) -> dict[str, torch.optim.Optimizer]:
    """Muon and Adam with Nesterov momentum over the model's parameters, by name.

    `mesh` holds the processes that share the work of Muon; see `pmf.train.muon`.
    """
    muon, adam = split_parameters(model)
    return {
        "muon": Muon(
            muon,
            lr=config.learning_rate,
            momentum=config.momentum,
            steps=config.newton_schulz_steps,
            mesh=mesh,
        ),
        "adam": NesterovAdam(adam, lr=config.learning_rate, betas=config.adam_betas, eps=config.adam_eps),
    }


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`: risen to step / warmup_steps, fallen by its share x of the
    decay, to 1 - x or (1 + cos(pi x)) / 2 of the way down to decay_to.
    """
    risen = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    begin = max(steps * (1 - config.decay_share), config.warmup_steps)
    x = (step - begin) / (steps - begin) if step > begin else 0.0
    left = 1 - x if config.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return config.learning_rate * risen * (config.decay_to + (1 - config.decay_to) * left)


class EMA:
    """An exponential moving average of a model's parameters with the published ramp.

    beta = 0.5^(batch / max(half_life, 1e-8)), half_life = min(half_life_kimg * 1000, 0.05 images_seen).
    """

    def __init__(self, model: nn.Module, half_life_kimg: float) -> None:
        self.half_life_kimg = half_life_kimg
        self.average = {name: p.detach().clone() for name, p in model.named_parameters()}

    @torch.no_grad()
    def update(self, model: nn.Module, batch: int, images_seen: int) -> None:
        """Move towards the model after a step of `batch` images; images_seen counts them too."""
        half_life = min(self.half_life_kimg * 1000, 0.05 * images_seen)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        averages = [local(value) for value in self.average.values()]
        foreach_lerp_(averages, [local(p.detach()) for p in model.parameters()], 1 - beta)

    def state_dict(self) -> dict[str, Tensor]:
        """The averaged parameters by name."""
        return self.average
