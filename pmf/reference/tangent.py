"""Small helpers of the tangent formulas: rows, accumulation, sums with absent terms."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pmf.private import transforming


def own_gradient(x: Tensor) -> bool:
    """Whether a formula of our own may be recorded for x's gradient; compilers and transforms derive theirs."""
    return torch.is_grad_enabled() and x.requires_grad and not (torch.compiler.is_compiling() or transforming())


def tangent_rows(tangents: Iterable[Tensor | None]) -> int | None:
    """B_dot, the number of samples that carry a tangent; None when no tangent is given."""
    return next((tangent.shape[0] for tangent in tangents if tangent is not None), None)


def tail(value: Tensor, rows: int) -> Tensor:
    """The last `rows` samples, cut off from autograd."""
    return value.detach()[value.shape[0] - rows :]


def accumulate(value: Tensor) -> Tensor:
    """`value` in the dtype that sums are taken in: float32, or float64 for float64."""
    return value if value.dtype in (torch.float32, torch.float64) else value.float()


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are there; None when none is."""
    present = [term for term in terms if term is not None]
    if not present:
        return None
    result = present[0]
    for term in present[1:]:
        result = result + term
    return result


def plus_product(sum: Tensor | None, a: Tensor | None, b: Tensor | None) -> Tensor | None:
    """sum + a b in the dtype sums are taken in; what is absent (None) is zero."""
    if sum is not None:
        sum = accumulate(sum)
    if a is None or b is None:
        return sum
    a, b = accumulate(a), accumulate(b)
    return a * b if sum is None else torch.addcmul(sum, a, b)
