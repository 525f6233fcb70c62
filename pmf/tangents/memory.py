"""How tangents lie in memory: as their values do, unless elements of a value share a place."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.private import transform_level


def fitted(dot: Tensor, value: Tensor) -> Tensor:
    """`dot` in the shape, dtype and strides of `value`.

    With equal strides, views of the value are views of the tangent, so that in-place functions write to both.
    """
    if dot.dtype == value.dtype and dot.shape == value.shape and dot.stride() == value.stride():
        return dot
    if 0 in value.stride() or (not torch.compiler.is_compiling() and overlaps(value)):
        # Elements in one place would share a tangent; views of such a tensor fit contiguous ones.
        return dot.to(value.dtype).expand(value.shape).contiguous()
    if transform_level() is not None:  # torch.vmap may have batched one of them alone
        return dot.to(value.dtype).expand(value.shape).clone()
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=value.device).copy_(dot)


def overlaps(x: Tensor) -> bool:
    """Whether elements of x may share a place in memory, as in an expanded tensor or in windows of one."""
    reach = 0  # of the dimensions with smaller steps
    for step, n in sorted(zip(x.stride(), x.shape, strict=True)):
        if n > 1 and step <= reach:
            return x.numel() > 0
        reach += step * (n - 1)
    return False
