"""Sinusoidal features of a scalar, and SiLU: the pointwise parts of the scalar embedders."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmf.reference.tangent import accumulate, tail

FEATURES = 256
MAX_PERIOD = 10000.0


def scalar_features_dual(primals: tuple[Tensor], tangents: tuple[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """[cos(s f), sin(s f)] of scalars s [B], f_i = 10000^(-i / 128): [B, 256], and the tangent."""
    (s,), (s_dot,) = primals, tangents
    half = FEATURES // 2
    index = torch.arange(half, device=s.device, dtype=accumulate(s).dtype)
    frequency = torch.exp(-math.log(MAX_PERIOD) / half * index)
    angle = accumulate(s)[:, None] * frequency
    cos, sin = angle.cos(), angle.sin()
    features = torch.cat([cos, sin], -1)
    if s_dot is None:
        return features, None
    with torch.no_grad():
        angle_dot = accumulate(s_dot)[:, None] * frequency
        rows = s_dot.shape[0]
        return features, torch.cat([-tail(sin, rows) * angle_dot, tail(cos, rows) * angle_dot], -1)


def silu_dual(primals: tuple[Tensor], tangents: tuple[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """silu(x) = x sigmoid(x), and its tangent (sigmoid + silu (1 - sigmoid)) x_dot."""
    (x,), (x_dot,) = primals, tangents
    y = torch.nn.functional.silu(x)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        x = accumulate(tail(x, x_dot.shape[0]))
        sigmoid = torch.sigmoid(x)
        return y, ((sigmoid + x * sigmoid * (1 - sigmoid)) * accumulate(x_dot)).to(y.dtype)
