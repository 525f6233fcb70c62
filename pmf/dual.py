"""A value and its tangent, side by side."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, cast

from torch import Tensor


class Dual(NamedTuple):
    """A value and its tangent along one direction: forward-mode differentiation of one tensor.

    `value` has B samples in its first dimension (None in `ABSENT` alone). `dot` covers the last B_dot <= B
    samples, or is None where the tangent is zero. Nothing is recorded for `dot`: it never carries a gradient.
    """

    value: Tensor
    dot: Tensor | None = None

    def map(self, function: Callable[[Tensor], Tensor]) -> Dual:
        """A linear function of one sample at a time, applied to value and tangent."""
        return Dual(function(self.value), None if self.dot is None else function(self.dot))


ABSENT = Dual(cast(Tensor, None))
"""An optional input that was not given."""
