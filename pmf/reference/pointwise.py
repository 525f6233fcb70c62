"""Pointwise functions of MLPs: SwiGLU's half, and GELU."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from pmf.pair import Dual, tail
from pmf.reference.product import then_linear
from pmf.reference.tangent import accumulate


@then_linear
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


@then_linear
def gelu(x: Dual, *, approximate: str) -> Dual:
    """y = x P(x), and y_dot = (P(x) + x P'(x)) x_dot, the formula of the gradient, which PyTorch has in one function.

    P is the normal distribution's function or, for "tanh", (1 + tanh(sqrt(2 / pi) (x + 0.044715 x^3))) / 2.
    """
    dtype = x.value.dtype
    y = F.gelu(accumulate(x.value), approximate=approximate).to(dtype)
    if x.dot is None:
        return Dual(y)
    with torch.no_grad():
        last = accumulate(tail(x.value, x.dot.shape[0]))
        return Dual(y, torch.ops.aten.gelu_backward(accumulate(x.dot), last, approximate=approximate).to(dtype))
