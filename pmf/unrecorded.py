"""Tangents of kernels under forward mode: autograd records nothing for them, so their backward raises.

`torch.func.jvp` and `torch.autograd.forward_ad` promise tangents with gradients; a gradient of zero would be wrong.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from pmf.pair import Dual
from pmf.private import recorded_levels


class _Unrecorded(torch.autograd.Function):
    """(message, count, x, *sources) -> x, as if computed from `sources`; backward raises RuntimeError(message).

    The last `count` sources are directions: later kernels find them on this node.
    """

    @staticmethod
    def forward(message: str, count: int, x: Tensor, *sources: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.message, count, *_ = inputs
        ctx.count = len(inputs)
        ctx.pmf_directions = inputs[ctx.count - count :]
        ctx.set_materialize_grads(False)

    @staticmethod
    def backward(ctx, gradient):
        if gradient is not None:
            raise RuntimeError(ctx.message)
        return (None,) * ctx.count

    @staticmethod
    def vmap(info, in_dims, message: str, count: int, x: Tensor, *sources: Tensor):
        return _Unrecorded.apply(message, count, x, *sources), in_dims[2]


class Sources:
    """The tensors whose gradients through an op's tangents would be lost: values and fixed inputs, and directions.

    Directions are what tangents depend on and values do not. An edge to a tangent would keep alive what PyTorch has
    recorded for it since the last kernel; so outside of transforms they are leaves, or tangents of the first kernel.
    """

    def __init__(self, duals: list[Dual], fixed: Iterable[Tensor | None]) -> None:
        self.values: list[Tensor] = []
        self.directions: list[Tensor] = []
        if not torch.is_grad_enabled():
            return
        values = [x for x in (*(dual.value for dual in duals), *fixed) if x is not None]
        levels = set().union(*map(recorded_levels, values))
        for dot in (dual.dot for dual in duals if dual.dot is not None):
            recorded = recorded_levels(dot)
            if recorded - {0} <= levels:
                self.directions += _directions(dot, values) if 0 in recorded else []
            else:
                self.directions.append(dot)
        if levels or self.directions:
            self.values = values

    def of(self, op: str, tangent: Tensor) -> Tensor:
        """The tangent of a kernel; its backward raises if a source requires a gradient. Nothing is saved."""
        if not self.values:
            return tangent
        message = f'{op}: kernels record no gradient for a tangent; detach the tangent, or use impl="reference"'
        return _Unrecorded.apply(message, len(self.directions), tangent, *self.values, *self.directions)


def without_gradient(tangent: Tensor) -> Tensor:
    """The tangent, detached: a kernel's node must not keep alive what PyTorch has recorded for its tangents."""
    return tangent.detach() if recorded_levels(tangent) else tangent


def _graph(*tensors: Tensor) -> Iterator[Any]:
    """The leaves and nodes that tensors depend on outside of transforms, the next ones first, up to other kernels."""
    roots = [x for x in map(torch.func.debug_unwrap, tensors) if x.requires_grad]
    yield from (x for x in roots if x.grad_fn is None)
    following = deque(x.grad_fn for x in roots if x.grad_fn is not None)
    seen = set(following)
    while following:
        node = following.popleft()
        yield getattr(node, "variable", node)
        if not hasattr(node, "pmf_directions"):
            new = {further for further, _ in node.next_functions if further is not None} - seen
            seen |= new
            following.extend(new)


def _directions(dot: Tensor, values: list[Tensor]) -> list[Tensor]:
    """What a tangent depends on at level 0, and values do not."""
    graph = list(_graph(dot))
    leaves = {id(x): x for x in graph if isinstance(x, Tensor)}
    kernels = [x for x in graph if hasattr(x, "pmf_directions")]
    for x in _graph(*values):
        if not leaves:
            break
        leaves.pop(id(x), None)
    if leaves and not kernels:
        return [torch.func.debug_unwrap(dot)]
    return [*leaves.values(), *(x for node in kernels for x in node.pmf_directions)]
