"""Products behind a kernel, in one node of autograd: its input y is made again in backward, not kept.

    out = y W^T + b                    dy = dout W        dW = dout^T y        db = sum of dout

y is the result of a norm or of an MLP's function, which its backward kernel can write while it computes dx from dy: it
has read all that y depends on. So dW comes after dx, and nothing is kept for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch.nn.functional as F
from torch import Tensor


def product(y: Tensor, y_dot: Tensor | None, matrix: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """out and out_dot = y_dot W^T."""
    return F.linear(y, matrix, bias), None if y_dot is None else F.linear(y_dot, matrix)


def input_gradient(dout: Tensor, matrix: Tensor, needed: bool) -> Tensor:
    """dy; zeros if nothing before y needs a gradient, since a backward kernel takes some to write y."""
    return dout @ matrix if needed else dout.new_zeros(*dout.shape[:-1], matrix.shape[1])


def weight_gradients(dout: Tensor, y: Tensor | None, needs: Sequence[bool]) -> tuple[Tensor | None, Tensor | None]:
    """dW, if there is y, and db, if it is needed."""
    rows = dout.flatten(0, -2)
    dmatrix = rows.mT @ y.flatten(0, -2) if y is not None else None
    return dmatrix, rows.sum(0) if needs[1] else None
