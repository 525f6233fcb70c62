"""SwiGLU's pointwise half."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.reference.tangent import accumulate, tail


def swiglu_dual(primals: tuple[Tensor], tangents: tuple[Tensor | None]) -> tuple[Tensor, Tensor | None]:
    """y = silu(a) b for x = [a, b], and y_dot = silu'(a) a_dot b + silu(a) b_dot."""
    (x,), (x_dot,) = primals, tangents
    a, b = accumulate(x).chunk(2, -1)
    silu = F.silu(a)
    y = (silu * b).to(x.dtype)
    if x_dot is None:
        return y, None
    with torch.no_grad():
        a_dot, b_dot = accumulate(x_dot).chunk(2, -1)
        a, b, silu = (tail(v, x_dot.shape[0]) for v in (a, b, silu))
        # silu' = sigmoid + silu (1 - sigmoid): from silu towards 1 by the sigmoid.
        slope = torch.lerp(silu, silu.new_ones(()), torch.sigmoid(a))
        y_dot = slope.mul_(a_dot).mul_(b).addcmul_(silu, b_dot)
        return y, y_dot.to(x.dtype)
