"""In-place functions: the tangent is written as the value is, so that views of either see the change."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from pmf.errors import InputError
from pmf.private import FUNCTION_NAMESPACES
from pmf.tangents.at_rest import adopt
from pmf.tangents.carriers import CARRIERS, moves, propagate, values_of
from pmf.tangents.handlers import refused
from pmf.tangents.memory import overlaps
from pmf.tangents.random_state import replayed
from pmf.tangents.rules import HANDLERS, Handler, argument, can_move, name_of

OPERATORS = {
    "__iadd__": "add",
    "__isub__": "sub",
    "__imul__": "mul",
    "__itruediv__": "div",
    "__idiv__": "div",
    "__ipow__": "pow",
    "__imod__": "remainder",
    "__ifloordiv__": "floor_divide",
}
RESET = "zero_ bernoulli_ cauchy_ exponential_ geometric_ log_normal_ normal_ random_ uniform_"
"""The result does not depend on what was there."""
RANDOM = "alpha_dropout_ feature_alpha_dropout_ rrelu_ rrelu_with_noise_"
RESHAPING = "resize_ resize_as_ set_ squeeze_ unsqueeze_ transpose_ swapaxes_ swapdims_ t_ as_strided_ detach_"


def _target(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The carrier that is written to. Errors: `InputError` if nothing can become one, or if it overlaps itself."""
    target: Any = args[0] if args else kwargs.get("input")
    if type(target) is Tensor and not torch.compiler.is_compiling():
        adopt(target)
    if type(target) not in CARRIERS:
        other = "" if torch.compiler.is_compiling() else "a new tensor without views, or "
        raise InputError(
            f"pmf.jvp: {name_of(function)} writes a moving value into a tensor that cannot move; "
            f"expected {other}one made like a moving tensor (x.new_zeros(...), torch.empty_like(x))"
        )
    if not torch.compiler.is_compiling() and overlaps(target.value):
        raise InputError(f"pmf.jvp: {name_of(function)} writes to a tensor that overlaps itself; expected its clone()")
    return target


def _unmoved(args: tuple, kwargs: dict) -> bool:
    """Whether nothing moves, or what is written to are integers."""
    target = args[0] if args else kwargs.get("input")
    return not (moves(args) or moves(kwargs)) or (isinstance(target, Tensor) and not can_move(target))


def _write(function: Callable, target: Any, dot: Tensor | None) -> None:
    """Make `dot` the tangent of `target`, in the memory of the present one."""
    if dot is not None:
        target.start()
    if target.tangent is None:
        return
    if target.tangent.shape != target.value.shape:
        raise InputError(f"pmf.jvp: {name_of(function)} changes the shape of what it writes to")
    target.tangent.zero_() if dot is None else target.tangent.copy_(dot)


def by(counterpart: Callable) -> Handler:
    """The handler of an in-place function, given the one that returns a new tensor."""

    def handle(function, args, kwargs):
        if _unmoved(args, kwargs):
            return _done(function, args, kwargs)
        target = _target(function, args, kwargs)
        with torch.no_grad():
            result = propagate(counterpart, args, kwargs)
            dot = result.tangent if type(result) in CARRIERS else None
        function(*values_of(args), **values_of(kwargs))
        with torch.no_grad():
            _write(function, target, dot)
        return target

    return handle


def _done(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The function on values; gives the carrier itself where that was its target."""
    out = function(*values_of(args), **values_of(kwargs))
    return args[0] if args and type(args[0]) in CARRIERS and out is args[0].value else out


def _reset(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler of a function that overwrites its target by something that stands still."""
    if moves(args[1:]) or moves(kwargs):
        return refused("expected numbers that stand still")(function, args, kwargs)
    out = _done(function, args, kwargs)
    if moves(args[0]):
        args[0].tangent.zero_()
    return out


def _masked(function: Callable, args: tuple, kwargs: dict) -> Any:
    """x.dropout_(p, training): the same for value and tangent, with the same random numbers."""
    x, *rest = args
    with replayed([x.value]) as replay:
        _done(function, args, kwargs)
        if moves(x):
            with torch.no_grad():
                replay(function, x.tangent, *rest, **kwargs)
    return x


def _fill(function: Callable, args: tuple, kwargs: dict) -> Any:
    """x.fill_(number), x.copy_(source)."""
    if _unmoved(args, kwargs):
        return _done(function, args, kwargs)
    target, source = _target(function, args, kwargs), (args[1] if len(args) > 1 else next(iter(kwargs.values())))
    _done(function, args, kwargs)
    with torch.no_grad():
        dot = source.tangent if type(source) in CARRIERS else None
        # A number may be an element of the target itself.
        _write(function, target, None if dot is None else (dot if dot.ndim else dot.clone()).expand(target.value.shape))
    return target


def _masked_scatter(function: Callable, args: tuple, kwargs: dict) -> Any:
    """x.masked_scatter_(mask, source): in place for the tangent too, because PyTorch lets the source overlap x."""
    if torch.compiler.is_compiling() or _unmoved(args, kwargs):
        return by(Tensor.masked_scatter)(function, args, kwargs)
    target = _target(function, args, kwargs)
    _done(function, args, kwargs)
    mask, source = (args[i] if len(args) > i else kwargs[name] for i, name in ((1, "mask"), (2, "source")))
    with torch.no_grad():
        target.start()
        dot = source.tangent if moves(source) else torch.zeros_like(values_of(source))
        target.tangent.masked_scatter_(values_of(mask), dot)
    return target


def _fill_diagonal(function: Callable, args: tuple, kwargs: dict) -> Any:
    """x.fill_diagonal_(number, wrap)."""
    x, _, *wrap = args if len(args) > 1 else (args[0], kwargs["fill_value"])
    if moves(args[1:]) or moves(kwargs):
        return refused("expected a number that stands still")(function, args, kwargs)
    out = _done(function, args, kwargs)
    if moves(x):
        x.tangent.fill_diagonal_(0, *wrap, **{name: w for name, w in kwargs.items() if name == "wrap"})
    return out


def _set_item(function: Callable, args: tuple, kwargs: dict) -> None:
    """x[index] = source."""
    if _unmoved(args, kwargs):
        _done(function, args, kwargs)
        return
    target = _target(function, args, kwargs)
    _, index, source = args
    if moves(index):
        refused("an index cannot move")(function, args, kwargs)
    index = values_of(index)
    _done(function, args, kwargs)
    with torch.no_grad():
        target.start()
        target.tangent[index] = source.tangent if moves(source) else 0


def _optional(plain: Handler, position: int) -> Handler:
    """The handler of a function with an argument `inplace` at that position, its last, given the handler without it.

    Compilers write the result to a copy's place: what backward keeps of the argument stays.
    """

    def handle(function, args, kwargs):
        if not torch.compiler.is_compiling():
            return plain(function, args, kwargs)
        rest = {name: x for name, x in kwargs.items() if name != "inplace"}
        if not argument(args, kwargs, (position, "inplace")):
            return plain(function, args[:position], rest)
        target = args[0] if args else rest.pop("input")
        result = plain(function, (target.clone(), *args[1:position]), rest)
        return propagate(Tensor.copy_, (target, result), {})

    return handle


for _space in FUNCTION_NAMESPACES:
    for _name in dir(_space):
        _function, _counterpart = getattr(_space, _name), getattr(_space, _name[:-1], None)
        if _name.endswith("_") and not _name.startswith("_") and callable(_function) and callable(_counterpart):
            HANDLERS[_function] = by(_counterpart)
for _name, _base in OPERATORS.items():
    if hasattr(Tensor, _name):
        HANDLERS[getattr(Tensor, _name)] = by(getattr(Tensor, _base))
for _space in FUNCTION_NAMESPACES:
    for _names, _handler in (
        (RESET, _reset),
        (RANDOM, refused("its random numbers cannot be drawn twice in place; expected inplace=False")),
        (RESHAPING, refused("expected the function that returns a new tensor")),
        ("requires_grad_", _done),
        ("dropout_ feature_dropout_", _masked),
        ("fill_ copy_", _fill),
    ):
        for _name in _names.split():
            if hasattr(_space, _name):
                HANDLERS[getattr(_space, _name)] = _handler
HANDLERS[Tensor.fill_diagonal_] = _fill_diagonal
HANDLERS[Tensor.masked_scatter_] = _masked_scatter
HANDLERS[Tensor.__setitem__] = _set_item
for _function in vars(F).values():
    if isinstance(_function, FunctionType) and _function in HANDLERS:
        _parameters = list(inspect.signature(_function).parameters)
        if "inplace" in _parameters:
            HANDLERS[_function] = _optional(HANDLERS[_function], _parameters.index("inplace"))
