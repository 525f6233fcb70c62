"""Products of low precision that give float32: a matrix unit adds in float32 anyway, and nothing is rounded after it.

y = x W^T with x and W in autocast's dtype and y in float32, as TPUs compute every product of the authors' code. It
costs no operation more than the same product rounded (in float32 it would take about 4 % of a B/16 step on an H200, at
a fifteenth of bfloat16's rate), and 2 bytes more a value wherever y and its gradient are written, read or kept: of a
B/16 step 1.4 MB an image kept for backward, and 6 MB moved. All of that is counted, not timed.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.autocast import autocast_dtype, no_autocast
from pmf.private import transforming


def wide_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b, x [..., C] and W [F, C] -> [..., F] in float32, x and W in autocast's dtype or else in their own.

    The bias is added as it is. Wider operands, without autocast, give their own dtype. Differentiable, also forward
    and under torch.func; gradients of x and W are of their dtypes, and come from y's gradient rounded to that of the
    operands.
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
    """a b in float32. Only CUDA has it as one product; elsewhere the operands, widened, give the same."""
    return torch.mm(a, b, out_dtype=torch.float32) if a.is_cuda else a.float() @ b.float()


class _WideProduct(torch.autograd.Function):
    """`_product(x, W^T)`; PyTorch's own has no gradient."""

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
