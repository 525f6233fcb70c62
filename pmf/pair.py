"""`Dual`, a value with its tangent, and helpers that tangent formulas share; `pmf.dual` has what users call."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import NamedTuple, cast

import torch
from torch import Tensor

from pmf.errors import InputError


class Dual(NamedTuple):
    """A value and its tangent along one direction: forward-mode differentiation of one tensor.

    `value` has B samples in its first dimension (only in `ABSENT` is it None). `dot` covers the last
    B_dot <= B samples; None stands for a zero tangent. Autograd records nothing for `dot`: it never
    carries a gradient.
    """

    value: Tensor
    dot: Tensor | None = None

    @classmethod
    def of(cls, given: Dual | Tensor | tuple[Tensor, Tensor | None] | float | None) -> Dual:
        """`given` as a Dual: a tensor or number stands still, a tuple is (value, tangent), None is `ABSENT`."""
        if not isinstance(given, tuple):
            return cls(cast(Tensor, given))
        if len(given) != 2:
            raise InputError(f"Dual: expected a tensor or a pair (value, tangent), got {len(given)} values")
        dual = given if isinstance(given, Dual) else cls(*given)
        if dual.dot is not None and not _covers(dual.value, dual.dot):
            wanted, got = (f"of shape {list(x.shape)}" if isinstance(x, Tensor) else repr(x) for x in dual)
            raise InputError(
                f"Dual: a tangent must have the shape of its value's last samples; value {wanted}, tangent {got}"
            )
        return dual

    def map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """Apply a linear function that acts on each sample separately to both value and tangent; None stays None."""
        value = self.value if self.value is None else function(self.value)
        return Dual(value, None if self.dot is None else function(self.dot))


def _covers(value: Tensor | None, dot: Tensor) -> bool:
    """Whether a tangent has the shape of the last samples of its value."""
    if not (isinstance(value, Tensor) and isinstance(dot, Tensor)):
        return False
    if value.ndim != dot.ndim or value.shape[1:] != dot.shape[1:]:
        return False
    return value.ndim == 0 or dot.shape[0] <= value.shape[0]


ABSENT = Dual(cast(Tensor, None))
"""An omitted optional input."""


def linear_dual(
    x: Dual, weight: Tensor, bias: Tensor | None = None, *, linear: Callable[..., Tensor] = torch.nn.functional.linear
) -> Dual:
    """x W^T + b, and x_dot W^T: two products, so that backward keeps no tangent alive."""
    value = linear(x.value, weight, bias)
    if x.dot is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, linear(x.dot, weight))


Weights = tuple[Tensor, Tensor | None]
"""Weight [N, C] and bias [N] of a product; None is no bias."""


def tangent_rows(tangents: Iterable[Tensor | None]) -> int | None:
    """B_dot, the number of samples that carry a tangent; None when no tangent is given."""
    return next((tangent.shape[0] for tangent in tangents if tangent is not None), None)


def tail(value: Tensor, rows: int) -> Tensor:
    """The last `rows` samples, detached."""
    return value.detach()[value.shape[0] - rows :]


def without_padding(x: Tensor, lengths: Tensor | None) -> Tensor:
    """x [B, S, H, D] with zero, whatever they held, in the tokens beyond the lengths [B]; x itself without lengths."""
    if lengths is None:
        return x
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
    return x.masked_fill(beyond[:, :, None, None], 0)


def total(*terms: Tensor | None) -> Tensor | None:
    """The sum of the terms that are not None, or None if all are."""
    present = [term for term in terms if term is not None]
    if not present:
        return None
    result = present[0]
    for term in present[1:]:
        result = result + term
    return result
