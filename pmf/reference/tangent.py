"""Precision and recording in the tangent formulas; helpers that only add and select are in `pmf.pair`."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.private import transforming


def own_gradient(x: Tensor) -> bool:
    """Whether to record our own gradient formula for x; compilers and transforms derive theirs."""
    return torch.is_grad_enabled() and x.requires_grad and not (torch.compiler.is_compiling() or transforming())


def accumulate(value: Tensor) -> Tensor:
    """`value` in the accumulation dtype: float32, or float64 for float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def epsilon(eps: float | None, x: Tensor) -> float:
    """A norm's eps, or for None what nn.RMSNorm takes: the epsilon of x's accumulation dtype."""
    if eps is not None:
        return eps
    return torch.finfo(torch.float64 if x.dtype == torch.float64 else torch.float32).eps


def plus_product(sum: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """sum + a b in the accumulation dtype; None is zero."""
    if sum is not None:
        sum = accumulate(sum)
    if a is None or b is None:
        return sum
    a, b = accumulate(a), accumulate(b)
    return a * b if sum is None else torch.addcmul(sum, a, b)
