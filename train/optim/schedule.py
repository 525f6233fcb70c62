"""The learning rate over a run."""

from __future__ import annotations

import math

from pmf.train.optim.optimizers import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, steps: int) -> float:
    """The learning rate of step `step` (from 0) of `steps`.

    It rises as step / warmup_steps. Over the decay, of which x is the share that has passed, it falls to decay_to by
    the factor 1 - x (linear) or (1 + cos(pi x)) / 2 (cosine).
    """
    risen = min(1.0, step / config.warmup_steps) if config.warmup_steps else 1.0
    begin = max(steps * (1 - config.decay_share), config.warmup_steps)
    x = (step - begin) / (steps - begin) if step > begin else 0.0
    left = 1 - x if config.decay == "linear" else (1 + math.cos(math.pi * x)) / 2
    return config.learning_rate * risen * (config.decay_to + (1 - config.decay_to) * left)
