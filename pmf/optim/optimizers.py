"""Assign each parameter to an optimizer, configure both optimizers, and schedule the learning rate."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh

from pmf.errors import require
from pmf.fields import check_fields, check_values
from pmf.optim.muon import Muon
from pmf.optim.nesterov_adam import NesterovAdam


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimizers and their learning rate; the defaults are the published values."""

    learning_rate: float = 1e-3
    """Learning rate of every optimizer."""
    momentum: float = 0.95
    """Momentum of Muon (Nesterov)."""
    newton_schulz_steps: int = 5
    """Newton-Schulz iterations of Muon."""
    adam_betas: tuple[float, float] = (0.9, 0.95)
    """Decay rates of Adam's moments."""
    adam_eps: float = 1e-8
    """Offset of Adam's denominator."""
    warmup_steps: int = 0
    """Steps of linear warm-up; the learning rate of the first step is zero (0: no warm-up, as published)."""
    decay_share: float = 0.0
    """Share of the run, at its end, over which the learning rate decays (0: constant, as published). The decay
    starts after the warm-up."""
    decay: Literal["linear", "cosine"] = "linear"
    """Shape of the decay: a straight line or half a cosine."""
    decay_to: float = 0.0
    """Final learning rate of the decay, as a share of `learning_rate`."""
    clip_norm: float = 0.0
    """Clip the norm of the whole gradient to this value (0: no clipping, as published)."""
    name: Literal["muon", "adamw"] = "muon"
    """muon: Muon on Linear weights and Adam on the rest, both with Nesterov momentum. adamw: AdamW on all weights."""
    weight_decay: float = 0.0
    """Weight decay of AdamW, as a multiple of the learning rate."""

    def __post_init__(self) -> None:
        check_fields(self, "optimizer.")
        within = {
            "learning_rate": (self.learning_rate > 0, "> 0"),
            "momentum": (0 <= self.momentum < 1, "in [0, 1)"),
            "newton_schulz_steps": (1 <= self.newton_schulz_steps < 100, "in [1, 100)"),
            "adam_betas": (all(0 <= beta < 1 for beta in self.adam_betas), "in [0, 1)"),
            "adam_eps": (self.adam_eps > 0, "> 0"),
            "weight_decay": (self.weight_decay >= 0, ">= 0"),
            "warmup_steps": (self.warmup_steps >= 0, ">= 0"),
            "decay_share": (0 <= self.decay_share <= 1, "in [0, 1]"),
            "decay_to": (0 <= self.decay_to <= 1, "in [0, 1]"),
            "clip_norm": (self.clip_norm >= 0, ">= 0"),
        }
        for name, (good, wanted) in within.items():
            require(good, f"optimizer.{name}: expected {wanted}, got {getattr(self, name)}")


def split_parameters(model: nn.Module) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """(Muon's, Adam's) parameters: the weights of Linear layers, and all others.

    Adam's are biases, norms, gates, tokens, positions, convolutions and the class table.
    """
    check_values(nn.Module, model=model)
    linear = {id(m.weight) for m in model.modules() if isinstance(m, nn.Linear)}
    parameters = list(model.parameters())
    return [p for p in parameters if id(p) in linear], [p for p in parameters if id(p) not in linear]


def build_optimizers(
    model: nn.Module,
    config: OptimizerConfig,
    mesh: DeviceMesh | None = None,
    shard_over: DeviceMesh | None = None,
) -> dict[str, torch.optim.Optimizer]:
    """{"muon": Muon, "adam": NesterovAdam} over the model's parameters, as the authors train, or {"adamw": AdamW}.

    An optimizer that would have no parameters is left out. The rates are `learning_rate`; set `lr` of every parameter
    group to `pmf.optim.learning_rate(config, step, steps)` for warm-up and decay, and clip by `clip_norm` yourself.
    `mesh`: the device mesh whose ranks share Muon's work (see `Muon`). Build them after wrapping the model with FSDP2.
    `shard_over`: a mesh of one dimension over which the moments of a replicated model are sharded (ZeRO-1).
    Errors: `InputError` on a model without parameters, and on adamw with `shard_over`: PyTorch's AdamW shards nothing
    that is replicated.
    """
    check_values(nn.Module, model=model)
    check_values(OptimizerConfig, config=config)
    require(any(True for _ in model.parameters()), "model: expected parameters, got none")
    if config.name == "adamw":
        require(shard_over is None, "shard_over: expected none with adamw, whose state is sharded with the weights")
        rate, betas, decay = config.learning_rate, config.adam_betas, config.weight_decay
        adamw = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas, eps=config.adam_eps, weight_decay=decay)
        return {"adamw": adamw}
    muon, adam = split_parameters(model)
    rate, iterations = config.learning_rate, config.newton_schulz_steps
    optimizers: dict[str, torch.optim.Optimizer] = {}
    if muon:
        optimizers["muon"] = Muon(
            muon, lr=rate, momentum=config.momentum, steps=iterations, mesh=mesh, shard_over=shard_over
        )
    if adam:
        optimizers["adam"] = NesterovAdam(
            adam, lr=rate, betas=config.adam_betas, eps=config.adam_eps, shard_over=shard_over
        )
    return optimizers


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    It rises as step / warmup_steps. After the share x of the decay, the part of it above decay_to is multiplied by
    1 - x (linear) or (1 + cos(pi x)) / 2 (cosine).
    """
    check_values(OptimizerConfig, config=config)
    check_values(int, step=step, steps=steps)
    require(step >= 0 and steps > 0, f"step, steps: expected >= 0 and > 0, got {step} and {steps}")
    risen = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    begin = max(steps * (1 - config.decay_share), config.warmup_steps)
    x = min(1.0, (step - begin) / max(steps - begin, 1)) if step > begin else 0.0  # past the end it stays
    left = 1 - x if config.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return config.learning_rate * risen * (config.decay_to + (1 - config.decay_to) * left)
