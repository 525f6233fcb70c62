"""Tensors that have no gradient although they depend on what is differentiated: their backward raises, naming the op.

The kernels compute tangents and gradients, but record neither. Where autograd would record them, a gradient of zero
would be wrong.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from pmf.dual import Dual
from pmf.private import recorded_levels


class _Unrecorded(torch.autograd.Function):
    """(message, x, sources) -> x, as if computed from `sources`; backward raises RuntimeError(message)."""

    @staticmethod
    def forward(message: str, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message, ctx.count = inputs[0], len(inputs)
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gradient):
        if gradient is not None:
            raise RuntimeError(ctx.message)
        return (None,) * ctx.count

    @staticmethod
    def vmap(info, in_dims, message: str, x: Tensor, *sources: Tensor):
        return _Unrecorded.apply(message, x, *sources), in_dims[1]


def unrecorded(x: Tensor, sources: Iterable[Tensor], message: str) -> Tensor:
    """x, whose backward raises RuntimeError(message) if any of `sources` requires a gradient; nothing is saved."""
    return _Unrecorded.apply(message, x, *sources) if torch.is_grad_enabled() else x


def sources_of_tangents(duals: Iterable[Dual], fixed: Iterable[Tensor | None]) -> list[Tensor]:
    """The inputs through which a gradient of an op's tangents would be lost.

    Those are the values and fixed inputs, and the tangents that require gradients where no value does: an edge to a
    tangent keeps everything alive that PyTorch has recorded for it.
    """
    duals = tuple(duals)
    values = [x for x in (*(dual.value for dual in duals), *fixed) if x is not None]
    levels = set().union(*map(recorded_levels, values))
    dots = [dual.dot for dual in duals if dual.dot is not None]
    return values + [dot for dot in dots if not recorded_levels(dot) <= levels]
