"""Sinusoidal features of a scalar, and SiLU: the pointwise parts of the scalar embedders."""

from __future__ import annotations

import math

import torch

from pmf.pair import Dual, tail
from pmf.reference.tangent import accumulate

FEATURES = 256
MAX_PERIOD = 10000.0


def scalar_features(s: Dual, features: int = FEATURES, *, max_period: float = MAX_PERIOD, shift: float = 0.0) -> Dual:
    """[cos(s f), sin(s f)] of scalars s [B], f_i = max_period^(-i / (features / 2 - shift)), and the tangent."""
    half = features // 2
    scalar = accumulate(s.value)
    index = torch.arange(half, device=scalar.device, dtype=scalar.dtype)
    frequency = torch.exp(-math.log(max_period) / (half - shift) * index)
    angle = scalar[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    value = torch.cat([cos, sin], -1)
    if s.dot is None:
        return Dual(value)
    with torch.no_grad():
        angle_dot = accumulate(s.dot)[:, None] * frequency
        rows = s.dot.shape[0]
        return Dual(value, torch.cat([-tail(sin, rows) * angle_dot, tail(cos, rows) * angle_dot], -1))


def silu(x: Dual) -> Dual:
    """silu(x) = x sigmoid(x), and its tangent (sigmoid + silu (1 - sigmoid)) x_dot."""
    y = torch.nn.functional.silu(x.value)
    if x.dot is None:
        return Dual(y)
    with torch.no_grad():
        last = accumulate(tail(x.value, x.dot.shape[0]))
        sigmoid = torch.sigmoid(last)
        return Dual(y, ((sigmoid + last * sigmoid * (1 - sigmoid)) * accumulate(x.dot)).to(y.dtype))
