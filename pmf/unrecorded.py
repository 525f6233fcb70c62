"""Tangents of kernels under forward mode: autograd records nothing for them, so their backward raises.

`torch.func.jvp` and `torch.autograd.forward_ad` promise tangents with gradients; a gradient of zero would be wrong.
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


def unrecorded(op: str, tangent: Tensor, sources: list[Tensor]) -> Tensor:
    """A kernel's tangent; its backward raises if any of `sources` requires a gradient. Nothing is saved."""
    if not (sources and torch.is_grad_enabled()):
        return tangent
    message = f'{op}: kernels record no gradient for a tangent; detach the tangent, or use impl="reference"'
    return _Unrecorded.apply(message, tangent, *sources)


def without_gradient(tangent: Tensor) -> Tensor:
    """The tangent, detached: a kernel's node must not keep alive what PyTorch has recorded for its tangents."""
    return tangent.detach() if recorded_levels(tangent) else tangent


def sources_of_tangents(duals: list[Dual], fixed: Iterable[Tensor | None]) -> list[Tensor]:
    """The inputs whose gradients through an op's tangents would be lost; empty if none requires a gradient.

    Those are the values and fixed inputs, and the tangents that require gradients where no value does: an edge to a
    tangent keeps alive what PyTorch has recorded for it.
    """
    values = [x for x in (*(dual.value for dual in duals), *fixed) if x is not None]
    levels = set().union(*map(recorded_levels, values))
    dots = [dual.dot for dual in duals if dual.dot is not None]
    further = [dot for dot in dots if not recorded_levels(dot) <= levels]
    return values + further if levels or further else []
