"""Pointwise functions of MLPs: SwiGLU's half, and GELU."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.pair import Dual, tail
from pmf.reference.tangent import accumulate


def swiglu(x: Dual) -> Dual:
    """y = silu(a) b for x = [a, b], and y_dot = silu'(a) a_dot b + silu(a) b_dot."""
    dtype = x.value.dtype
    a, b = accumulate(x.value).chunk(2, -1)
    silu = F.silu(a)
    y = (silu * b).to(dtype)
    if x.dot is None:
        return Dual(y)
    with torch.no_grad():
        a_dot, b_dot = accumulate(x.dot).chunk(2, -1)
        a, b, silu = (tail(v, x.dot.shape[0]) for v in (a, b, silu))
        # silu' = sigmoid + silu (1 - sigmoid), which interpolates from silu to 1 with the weight sigmoid.
        slope = torch.lerp(silu, silu.new_ones(()), torch.sigmoid(a))
        y_dot = (slope * a_dot).mul_(b).addcmul_(silu, b_dot)  # vmap allows in-place changes only of mapped tensors
        return Dual(y, y_dot.to(dtype))


def _gelu_slope(x: Tensor, approximate: str) -> Tensor:
    """gelu'(x) = P + x P', with gelu(x) = x P(x); for "tanh", P = (1 + tanh u) / 2 = sigmoid(2 u)."""
    if approximate == "tanh":
        u, u_dot = math.sqrt(2 / math.pi) * (x + 0.044715 * x**3), math.sqrt(2 / math.pi) * (1 + 0.134145 * x**2)
        p = torch.sigmoid(2 * u)
        return p + 2 * x * p * (1 - p) * u_dot
    return (1 + torch.erf(x / math.sqrt(2))) / 2 + x * torch.exp(-(x**2) / 2) / math.sqrt(2 * math.pi)


def gelu(x: Dual, *, approximate: str) -> Dual:
    """y = gelu(x), and y_dot = gelu'(x) x_dot."""
    dtype = x.value.dtype
    y = F.gelu(accumulate(x.value), approximate=approximate).to(dtype)
    if x.dot is None:
        return Dual(y)
    with torch.no_grad():
        last = accumulate(tail(x.value, x.dot.shape[0]))
        return Dual(y, (_gelu_slope(last, approximate) * accumulate(x.dot)).to(dtype))
