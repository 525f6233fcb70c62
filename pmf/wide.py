"""Products of low-precision factors with a float32 result: matrix units accumulate in float32; do not round after them.

y = x W^T with x and W in autocast's dtype and y in float32, as TPUs compute every product of the authors' code. This
takes as many operations as the rounded product (a float32 one would take about 4 % of a B/16 step on an H200, at a
fifteenth of bfloat16's rate), and 2 more bytes per value wherever y and its gradient are written, read or kept: in a
B/16 step 1.4 MB per image kept for backward, and 6 MB moved. All of this is counted, not timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype, no_autocast
from pmf.private import transforming


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, x [..., C] and W [F, C] -> [..., F] in float32, x and W in autocast's dtype or else in their own.

    The bias is added without a cast. Without autocast, wider operands give a result in their own dtype. Differentiable,
    also in forward mode and under torch.func. The gradients of x and W have their dtypes and are computed from y's
    gradient rounded to the dtype of the operands.
    """
    dtype = autocast_dtype(x.device.type)
    if dtype is not None:
        x, weight = x.to(dtype), weight.to(dtype)
    rows = x.reshape(-1, x.shape[-1])
    with no_autocast(x.device):
        if x.dtype.itemsize > 2 or x.dtype != weight.dtype:  # mixed dtypes: PyTorch refuses them
            product = rows @ weight.T
        elif transforming():
            product = rows.float() @ weight.T.float()
        else:
            product = _WideProduct.apply(rows, weight)
    product = product.reshape(*x.shape[:-1], len(weight))
    return product if bias is None else product + bias


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a b in float32. Only CUDA has such a product; elsewhere the operands are widened first, with the same result."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _WideProduct(torch.autograd.Function):
    """`_product(x, W^T)`, because PyTorch's own has no gradient."""

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
