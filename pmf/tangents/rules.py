"""The registry: how each function treats values that move."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch

from pmf.errors import InputError
from pmf.pair import Dual
from pmf.private import FUNCTION_NAMESPACES, constant

Rule = Callable[..., Any]
"""`rule(out, *args, **kwargs)`, the tangent of `out = function(*args, **kwargs)`. What moves is a `Dual` among the
arguments. Several outputs have a tuple of tangents; None is zero; NotImplemented leaves it to `torch.func.jvp`."""

Handler = Callable[[Callable, tuple, dict], Any]
"""`handler(function, args, kwargs)`, the result of a function on arguments among which are carriers."""

HANDLERS: dict[Callable | None, Handler] = {}
"""By torch function, `torch.autograd.Function` class or custom operator; under None, that of all others."""

TRACED: dict[Callable, Handler] = {}
"""For compilers, the handlers of functions that PyTorch writes in Python."""

FINDERS: list[Callable[[Any], Handler | None]] = []
"""Each gives the handlers of one package's functions, which it knows by name: it may not be installed."""


@constant
def handler_of(function: Any) -> Handler | None:
    """The handler of an autograd.Function or a custom operator that is registered or known by name."""
    found = HANDLERS.get(function)
    if found is None and hasattr(function, "__module__") and hasattr(function, "__name__"):
        found = next(filter(None, (find(function) for find in FINDERS)), None)
    if found is not None:
        HANDLERS[function] = found
    return found


def name_of(function: Callable) -> str:
    """The name of a function in messages."""
    if torch.compiler.is_compiling():
        return getattr(function, "__name__", "a function")
    return torch.overrides.resolve_name(function) or getattr(function, "__name__", str(function))


def named(*names: str) -> Iterator[Callable]:
    """The builtin functions and the tensor methods of these names. (PyTorch's other functions are composites.)"""
    for name in names:
        for space in (torch.Tensor,) if name.startswith("__") else FUNCTION_NAMESPACES:
            function = getattr(space, name, None)
            if callable(function) and (space is torch.Tensor or not isinstance(function, FunctionType)):
                yield function


def getter(name: str) -> Any:
    """The function that reads a property of tensors."""
    return getattr(torch.Tensor, name).__get__


def setter(name: str) -> Any:
    """The function that sets a property of tensors."""
    return getattr(torch.Tensor, name).__set__


def can_move(x: Any) -> bool:
    """Whether x is a tensor that may have a tangent."""
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex())


def is_dual(x: Any) -> bool:
    """Whether an argument of a rule moves."""
    return type(x) is Dual


def value(x: Any) -> Any:
    """The value of an argument that may move."""
    return x.value if type(x) is Dual else x


def replaced(args: tuple, kwargs: dict, slot: tuple[int, str], by: Any) -> tuple[tuple, dict]:
    """The arguments with another one at a slot, which is a position and a keyword."""
    index, name = slot
    if index < len(args):
        return (*args[:index], by, *args[index + 1 :]), kwargs
    return args, {**kwargs, name: by}


def argument(args: tuple, kwargs: dict, slot: tuple[int, str]) -> Any:
    """The argument at a slot, or None."""
    index, name = slot
    return args[index] if index < len(args) else kwargs.get(name)


def mapped(x: Any, function: Callable[[Any], Any]) -> Any:
    """The function of a tensor, or of value and tangent of one that moves."""
    return x.map(function) if type(x) is Dual else function(x)


def values(args: tuple, kwargs: dict) -> tuple[tuple, dict]:
    """The arguments with the values of those that move."""
    return tuple(map(value, args)), {name: value(x) for name, x in kwargs.items()}


def expect_none(name: str, given: dict[str, Any], known: Sequence[str]) -> None:
    """Errors: `InputError` on an argument that changes the value in a way that the formula of a rule does not have."""
    for argument, x in [(argument, x) for argument, x in given.items() if argument not in known]:
        empty = x is None or (isinstance(x, (int, float)) and x <= 0) or (isinstance(x, (tuple, list)) and not x)
        if not empty:
            raise InputError(f"pmf.jvp: {name} got a moving value and {argument}; expected none of it")


def moving_elsewhere(args: tuple, kwargs: dict, *slots: tuple[int, str]) -> bool:
    """Whether an argument moves that is at none of the slots."""
    places = (*enumerate(args), *kwargs.items())
    return any([type(x) is Dual and all([place not in slot for slot in slots]) for place, x in places])


def linear_in_first(function: Callable) -> Rule:
    """The rule of a function that is linear in its first argument and of which nothing else moves."""

    def rule(out, x, *args, **kwargs):
        if not is_dual(x) or moving_elsewhere(args, kwargs):
            return NotImplemented
        return function(x.dot, *args, **kwargs)

    return rule


def jointly_linear(function: Callable, *slots: tuple[int, str]) -> Rule:
    """The rule of a function that is linear in the arguments at `slots` together: what stands there still is zero."""

    def rule(out, *args, **kwargs):
        if moving_elsewhere(args, kwargs, *slots):
            return NotImplemented
        for slot in slots:
            x = argument(args, kwargs, slot)
            if x is not None:
                args, kwargs = replaced(args, kwargs, slot, x.dot if is_dual(x) else zero(x))
        return function(*args, **kwargs)

    return rule


def zero(x: Any) -> Any:
    """Zeros like a tensor, or 0."""
    return torch.zeros_like(x) if isinstance(x, torch.Tensor) else 0


def multilinear(
    function: Callable, *slots: tuple[int, str], added: tuple[int, str] | None = None, spatial: int = 0
) -> Rule:
    """The product rule of a function that is linear in each of the arguments at `slots`.

    `added` is the slot of a bias, which the function adds along the dimension before the last `spatial` ones.
    """

    def rule(out, *args, **kwargs):
        bias = None if added is None else argument(args, kwargs, added)
        if moving_elsewhere(args, kwargs, *slots, *(() if added is None else (added,))):
            return NotImplemented
        dot = bias.dot.reshape(-1, *[1] * spatial).clone() if is_dual(bias) else None
        plain, named_plain = values(args, kwargs)
        if added is not None and bias is not None:
            plain, named_plain = replaced(plain, named_plain, added, None)
        for slot in slots:
            x = argument(args, kwargs, slot)
            if is_dual(x):
                one, named_one = replaced(plain, named_plain, slot, x.dot)
                term = function(*one, **named_one)
                dot = term if dot is None else dot + term
        return dot

    return rule
