"""Gradients that have no derivatives: what would differentiate them raises one line that names the op."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import BackwardCFunction

from pmf.private import apply_without_transforms, transforming


def nested_forward_mode(op: str) -> RuntimeError:
    """The error of an op under forward mode around another transform."""
    return RuntimeError(
        f'{op}: kernels take no jvp around another transform (jvp, grad, hessian); use impl="reference"'
    )


class _Underivable(torch.autograd.Function):
    """See `underivable`."""

    @staticmethod
    def forward(function: Callable, op: str | Callable[..., str], *arguments):
        return function(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        _, op, *arguments = inputs
        ctx.op = op(*arguments) if callable(op) else op

    @staticmethod
    def backward(ctx, *gradients):
        raise RuntimeError(f'{ctx.op}: kernels have no second derivatives; use impl="reference"')

    @staticmethod
    def jvp(ctx, *tangents):
        raise RuntimeError(f'{ctx.op}: kernels give gradients no tangents; use impl="reference"')

    @staticmethod
    def vmap(info, in_dims, function: Callable, op: str | Callable[..., str], *arguments):
        """One call per sample: `torch.vmap` of an operator fails inside other transforms."""

        def sample(i: int):
            pairs = zip(arguments, in_dims[2:], strict=True)
            parts = (x.select(dim, i) if isinstance(dim, int) else x for x, dim in pairs)
            return underivable(function, op, *parts)

        found = [sample(i) for i in range(info.batch_size)]
        if isinstance(found[0], Tensor):
            return torch.stack(found), 0
        return tuple(map(torch.stack, zip(*found, strict=True))), (0,) * len(found[0])


def unrecorded_without_grad(outputs):
    """A Function's outputs. Where gradients are off, they are detached: PyTorch records Functions in transforms."""
    if torch.is_grad_enabled():
        return outputs
    return outputs.detach() if isinstance(outputs, Tensor) else tuple(x.detach() for x in outputs)


def underivable(function: Callable, op: str | Callable[..., str], *arguments):
    """`function(*arguments)`, gradients of `op` (or of the op that `op(*arguments)` names), without derivatives."""
    return unrecorded_without_grad(_Underivable.apply(function, op, *arguments))


def _views(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(x.view_as(x) for x in tensors)


class _Once(torch.autograd.Function):
    """(op, *tensors) -> the tensors, whose gradients are `underivable`."""

    @staticmethod
    def forward(op: str, *tensors: Tensor):
        return _views(*tensors)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        ctx.op = inputs[0]

    @staticmethod
    def backward(ctx, *gradients):
        return None, *underivable(_views, ctx.op, *gradients)

    @staticmethod
    def jvp(ctx, *tangents):
        raise nested_forward_mode(ctx.op)

    @staticmethod
    def vmap(info, in_dims, op: str, *tensors: Tensor):
        return _Once.apply(op, *tensors), in_dims[1:]


class _Anchor(torch.autograd.Function):
    """(*tensors) -> an empty tensor that depends on them and keeps nothing of them."""

    @staticmethod
    def forward(ctx, *tensors: Tensor) -> Tensor:
        return tensors[0].new_empty(0)


_anchor = apply_without_transforms(_Anchor)


def _hook(op: str, *anchors: Tensor) -> Callable:
    """A hook that makes the gradients of a node `underivable`, if autograd records them."""

    def hook(gradients, given):
        if not torch.is_grad_enabled():
            return None
        there = [x for x in (*gradients, *given, *anchors) if x is not None]
        marked = iter(underivable(_views, op, *there))
        return tuple(None if x is None else next(marked) for x in gradients)

    return hook


def differentiable_once(
    op: str, function: Callable, inputs: tuple[Tensor, ...], others: tuple = (), **options
) -> tuple[Tensor, ...]:
    """`function(*inputs, *others)`, where PyTorch or a library records the first output. Gradients are `underivable`.

    Where transforms are active, Functions around it see all of their levels. Elsewhere a hook takes less time.
    """
    if torch.compiler.is_compiling():
        return function(*inputs, *others, **options)
    if transforming():
        first, *rest = function(*_Once.apply(op, *inputs), *others, **options)
        return _Once.apply(op, first)[0], *rest
    outputs = function(*inputs, *others, **options)
    node = outputs[0].grad_fn
    if node is not None:
        # A library's own Function may record nothing in its backward.
        anchors = (_anchor(*inputs),) if isinstance(node, BackwardCFunction) else ()
        node.register_hook(_hook(op, *anchors))
    return outputs
