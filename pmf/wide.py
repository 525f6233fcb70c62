"""Products of low-precision operands with a float32 result: matrix units accumulate in float32, so keep that precision.

y = x W^T with x and W in the autocast dtype and y in float32, as TPUs compute every product of the authors' code. This
takes as many operations as the rounded product, and 2 more bytes per value wherever y and its gradient are written,
read or kept: in a B/16 step, 1.4 MB per image kept for backward and 6 MB moved. (A product of float32 operands, at a
fifteenth of bfloat16's rate, would take about 4 % of a B/16 step on an H200.) All of this is counted, not timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype, no_autocast
from pmf.private import transforming


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: x [..., C], W [F, C] -> [..., F] in float32, with x and W in the autocast dtype, else in their own.

    The bias is added without a cast. Without autocast, operands wider than 16 bits give a result in their own dtype.
    Differentiable, also in forward mode and under torch.func. The gradients of x and W have the dtypes of x and W and
    are computed from y's gradient, rounded to the dtype of the operands.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    with no_autocast(x.device):
        if x.dtype.itemsize > 2 or x.dtype != weight.dtype:  # PyTorch raises on mixed dtypes
            product = rows @ weight.T
        elif transforming():
            product = rows.float() @ weight.T.float()
        else:
            product = _WideProduct.apply(rows, weight)
    product = product.reshape(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. Only CUDA has such a product; other devices widen the operands first, with the same result."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _WideProduct(torch.autograd.Function):
    """`_product(x, W^T)` with a gradient: PyTorch's own has none."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight.T)

    @staticmethod
    def backward(ctx, dy: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        dy = dy.to(x.dtype)
        dx = dy @ weight if ctx.needs_input_grad[0] else None
        return dx, dy.T @ x if ctx.needs_input_grad[1] else None
