"""Explicit dual code: arithmetic on values with tangents, and any module on them.

Every function takes tensors, pairs (value, tangent) and `Dual`s alike, and gives `Dual`s. The first dimension is the
samples; a tangent covers the last B_dot of them, all tangents equally many. Values are recorded for backward as plain
PyTorch would; tangents never are, so backward keeps nothing of them.

    from pmf import ops
    from pmf.dual import chunk, dual, gated_residual

    shift, scale, gate = chunk(dual(linear, condition), 3)
    x = gated_residual(x, dual(mlp, ops.norm_modulate(x, None, scale, shift)), gate)
"""

from __future__ import annotations

import functools
import numbers
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf.errors import InputError, require
from pmf.fields import checked_integer, is_integer
from pmf.pair import Dual as Dual
from pmf.pair import linear_dual as linear_dual
from pmf.pair import tail
from pmf.pair import tangent_rows as tangent_rows
from pmf.private import hooked, tree_flatten, tree_unflatten
from pmf.recompute import checkpoint_values as checkpoint_values
from pmf.tangents.call import jvp
from pmf.tangents.carriers import CARRIERS, as_dual, carrier_of, inside_call

Kind = TypeVar("Kind", bound=nn.Module)
Given = Dual | Tensor | tuple | float
"""A Dual, a tensor or number that stands still, or a pair (value, tangent)."""

_TENSORS = (Tensor, *CARRIERS)
_NUMBERS = (numbers.Number, torch.SymInt, torch.SymFloat)


def _operand(name: str, given: Given, *others: type) -> Dual:
    """An argument as a Dual; `name` is the function's and its own.

    Errors: `InputError` unless it is a tensor, a pair, or one of the `others`, which are numbers.
    """
    operand = Dual.of(given)
    if type(operand.value) is not Tensor and not isinstance(operand.value, (*_TENSORS, *others)):
        wanted = "a tensor, a number or a pair" if others else "a tensor or a pair"
        raise InputError(f"{name} must be {wanted} (value, tangent), got {type(operand.value).__name__}")
    if operand.dot is not None and operand.dot.ndim == 0:
        raise InputError(f"{name} must have samples to have a tangent, got a single number")
    return operand


def _operands(name: str, given: tuple[Given, ...]) -> list[Dual]:
    """What a function of any number of tensors and numbers got."""
    require(len(given) > 0, lambda: f"{name}: expected at least one argument, got none")
    return [_operand(f"{name}: each argument", x, *_NUMBERS) for x in given]


def _rows(name: str, duals: Iterable[Dual], result: Tensor | None = None) -> int | None:
    """B_dot, the same of all tangents; None without tangents.

    Errors: `InputError` if they differ, and on what moves but is broadcast to the samples of `result`.
    """
    moving = [dual for dual in duals if dual.dot is not None]
    found = {dual.dot.shape[0] for dual in moving}
    require(len(found) < 2, f"{name}: all tangents must cover equally many samples, got {sorted(found)}")
    for value, _ in moving if result is not None else ():
        if value.ndim != result.ndim or len(value) != len(result):
            wanted = f"{result.ndim} dimensions and {len(result)} samples; expand it"
            raise InputError(f"{name}: what has a tangent must have all {wanted}, got {list(value.shape)}")
    return next(iter(found), None)


def _last(value: Tensor | float, rows: int, like: Tensor) -> Tensor | float:
    """The last `rows` samples of an operand of `like`, detached; what is shared by all samples as a whole."""
    if not isinstance(value, Tensor):
        return value
    shared = value.ndim < like.ndim or value.shape[0] == 1 != like.shape[0]
    return value.detach() if shared else tail(value, rows)


def add(*terms: Given) -> Dual:
    """The sum of terms that broadcast, and the sum of their tangents."""
    duals = _operands("add", terms)
    value = functools.reduce(torch.add, (dual.value for dual in duals))
    rows = _rows("add", duals, value)
    if rows is None:
        return Dual(value)
    with torch.no_grad():
        dot = functools.reduce(torch.add, (dual.dot for dual in duals if dual.dot is not None))
        return Dual(value, dot.expand(rows, *value.shape[1:]))


def multiply(*factors: Given) -> Dual:
    """The product of factors that broadcast; its tangent is the sum of each factor's tangent times the others."""
    duals = _operands("multiply", factors)
    value = functools.reduce(torch.mul, (dual.value for dual in duals))
    rows = _rows("multiply", duals, value)
    if rows is None:
        return Dual(value)
    with torch.no_grad():
        terms = []
        for i, moving in enumerate(duals):
            if moving.dot is not None:
                others = (_last(dual.value, rows, value) for j, dual in enumerate(duals) if j != i)
                terms.append(functools.reduce(torch.mul, others, moving.dot))
        return Dual(value, functools.reduce(torch.add, terms).expand(rows, *value.shape[1:]))


def pointwise(function: Callable[[Tensor], Tensor], x: Given) -> Dual:
    """f(x) and f'(x) x_dot of a function of each number alone: F.gelu, torch.tanh, lambda x: x * x.

    The derivative is that of `torch.func.jvp`, on the samples with a tangent.
    """
    _check_callable("pointwise", function)
    x = _operand("pointwise: x", x)
    value = function(x.value)
    if x.dot is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, torch.func.jvp(function, (tail(x.value, len(x.dot)),), (x.dot,))[1])


def chunk(x: Given, parts: int, dim: int = -1) -> tuple[Dual, ...]:
    """Equal parts along a dimension that is not the samples'; views, as of `torch.chunk`."""
    x, parts = _operand("chunk: x", x), checked_integer("chunk", "parts", parts)
    _check_dim("chunk", x, dim)
    size = x.value.shape[dim]
    require(size % parts == 0, lambda: f"chunk: dim {dim} must have a size that {parts} divides, got {size}")
    dots = (None,) * parts if x.dot is None else x.dot.chunk(parts, dim)
    return tuple(map(Dual, x.value.chunk(parts, dim), dots))


def concatenate(parts: Sequence[Given], dim: int = -1) -> Dual:
    """`torch.cat` along a dimension that is not the samples'; a part without tangent has zeros."""
    if isinstance(parts, (Dual, *_TENSORS)) or not isinstance(parts, Iterable):
        raise InputError(f"concatenate: parts must be a list of tensors or pairs, got {type(parts).__name__}")
    duals = [_operand("concatenate: each part", part) for part in parts]
    require(len(duals) > 0, "concatenate: expected at least one part, got none")
    _check_dim("concatenate", duals[0], dim)
    value, rows = torch.cat([dual.value for dual in duals], dim), _rows("concatenate", duals)
    if rows is None:
        return Dual(value)
    with torch.no_grad():
        dots = [torch.zeros_like(tail(d.value, rows)) if d.dot is None else d.dot for d in duals]
        return Dual(value, torch.cat(dots, dim))


def _check_dim(name: str, x: Dual, dim: int) -> None:
    sides = len(x.value.shape)
    require(sides > 0, f"{name}: expected tensors with samples, got a tensor without dimensions")
    if not is_integer(dim) or not -sides <= dim < sides:
        raise InputError(f"{name}: dim must be an integer in [{-sides}, {sides - 1}], got {dim!r}")
    if dim % sides == 0:
        raise InputError(f"{name}: dim must not be that of the samples, 0, got {dim}")


def _check_callable(name: str, function: Any) -> None:
    if not callable(function):
        raise InputError(f"{name}: function must be a function or a module, got {type(function).__name__}")


def gated_residual(x: Given, branch: Given, gate: Given | None = None) -> Dual:
    """x + gate branch, and x_dot + gate branch_dot + gate_dot branch, in the dtype of x.

    x, branch [B, ..., C]; gate [C], [B, C], [B, 1, C] (as many ones as x has sides), in the shape of x, or None (one).
    """
    x, branch = _operand("gated_residual: x", x), _operand("gated_residual: branch", branch, *_NUMBERS)
    if gate is not None:
        branch = multiply(_beside(x.value, _operand("gated_residual: gate", gate, *_NUMBERS)), branch)
    return add(x, branch).map(lambda part: part.to(x.value.dtype))


def _beside(x: Tensor, gate: Dual) -> Dual:
    """A gate of x [B, ..., C] that broadcasts to its shape: [B, C] as [B, 1, C]. Errors: `InputError` on others."""
    if not isinstance(gate.value, Tensor):
        return gate
    if len(x.shape) < 2:
        raise InputError(f"gated_residual: x must have shape [B, ..., C], got {list(x.shape)}")
    (samples, *between, width), sizes = x.shape, tuple(gate.value.shape)
    vectors = (samples, *(1 for _ in between), width)
    if sizes not in ((width,), (samples, width), vectors, tuple(x.shape)):
        expected = f"[C], [B, C], [B, 1, C] or the shape of x, {list(x.shape)}"
        raise InputError(f"gated_residual: gate must have shape {expected}, got {list(sizes)}")
    return gate.map(lambda g: g.reshape(-1, *vectors[1:])) if len(sizes) == 2 else gate


def dual(function: Callable, *inputs: Given | None) -> Any:
    """`function(*inputs)` and its tangent: of our layers, of any module, of any function of tensors.

    Layers with `forward_dual` compute both in one pass, as do nn.Linear, nn.Conv2d and an nn.Sequential of such.
    Anything else is called by `pmf.jvp`, which records what a plain call would; where the tangents cover only some
    samples, it is called twice, for the others and for these. Results have the structure of the function's, with Duals
    for tensors.
    """
    _check_callable("dual", function)
    duals = [Dual.of(x) for x in inputs]
    if hasattr(function, "forward_dual") and not (isinstance(function, nn.Module) and hooked(function)):
        return function.forward_dual(*duals)
    if len(duals) == 1:
        if acts_as(function, nn.Sequential):
            return functools.reduce(lambda x, part: dual(part, x), function, duals[0])
        if acts_as(function, nn.Linear):
            return linear_dual(duals[0], function.weight, function.bias)
        if acts_as(function, nn.Conv2d) and function.padding_mode == "zeros":
            return _convolution(function, duals[0])
    return _by_jvp(function, duals)


def acts_as(module: Any, kind: type[Kind], *, hooks: bool = False) -> TypeGuard[Kind]:
    """Whether a call of the module does what `kind` does with its weights, and nothing else.

    It may be parametrised, and with `hooks` have hooks.
    """
    if not isinstance(module, kind) or (hooked(module) and not hooks):
        return False
    return type(module).forward is kind.forward and "forward" not in module.__dict__


def _convolution(layer: nn.Conv2d, x: Dual) -> Dual:
    """The convolution of the value, and that of the tangent without bias."""
    if x.dot is None:
        return Dual(layer(x.value))
    with torch.no_grad():
        dot = F.conv2d(x.dot, layer.weight, None, layer.stride, layer.padding, layer.dilation, layer.groups)
    return Dual(layer(x.value), dot)


def _by_jvp(function: Callable, duals: list[Dual]) -> Any:
    values, dots = zip(*duals, strict=True)
    rows = _rows("dual", duals)
    partial = any(dot is not None and len(dot) < len(value) for value, dot in duals)
    if rows is not None and not partial and inside_call():  # of a layer that it calls: values move again
        leaves, spec = tree_flatten(function(*map(carrier_of, duals)))
        return tree_unflatten([as_dual(x) if isinstance(x, Tensor) else x for x in leaves], spec)
    if rows is None:
        result, moved = function(*values), None
    else:
        result, moved = jvp(function, values, dots, rows=rows if partial else None)
    leaves, spec = tree_flatten(result)
    dot_leaves = [None] * len(leaves) if moved is None else tree_flatten(moved, is_leaf=lambda x: x is None)[0]
    pairs = zip(leaves, dot_leaves, strict=True)
    return tree_unflatten([Dual(x, d) if isinstance(x, Tensor) else x for x, d in pairs], spec)
