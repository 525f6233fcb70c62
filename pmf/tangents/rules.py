"""The registry: how each function treats values that move."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from types import FunctionType
from typing import Any

import torch

from pmf.errors import InputError
from pmf.pair import Dual, total
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
"""Each gives the handlers of functions that it knows by name: those of a package, which may not be installed, or of
`torch.ops`."""


class Found:
    """The handlers that were found by name, as attributes, which compilers read anew wherever they trace."""


PLACES: dict[Any, str] = {}
"""Function -> the attribute of `Found` that is its handler."""


def handler_of(function: Any) -> Handler | None:
    """The handler of an autograd.Function or of an operator that is registered or known by name."""
    found = HANDLERS.get(function)
    if found is None and hasattr(function, "__module__") and hasattr(function, "__name__"):
        found = next(filter(None, (find(function) for find in FINDERS)), None)
    return found


@constant
def place_of(function: Any) -> str | None:
    """The attribute of `Found` that is `handler_of(function)`: compilers take names as constants, but no functions.

    It is the same at every call, as compilers guard what they have read.
    """
    if function not in PLACES:
        found = handler_of(function)
        if found is None:
            return None
        PLACES[function] = f"handler_{id(function)}"  # which PLACES keeps alive
        setattr(Found, PLACES[function], found)
    return PLACES[function]


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


def plain(x: Any) -> Any:
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


def expect_none(name: str, given: dict[str, Any], known: Sequence[str]) -> None:
    """Errors: `InputError` on an argument that changes the value in a way that the formula of a rule does not have."""
    for argument, x in [(argument, x) for argument, x in given.items() if argument not in known]:
        empty = x is None or (isinstance(x, (int, float)) and x <= 0) or (isinstance(x, (tuple, list)) and not x)
        if not empty:
            raise InputError(f"pmf.jvp: {name} got a moving value and {argument}; expected none of it")


def accumulating(dtype: torch.dtype) -> torch.dtype:
    """The dtype of sums, float32 for half precision, as in fused kernels."""
    return torch.promote_types(dtype, torch.float32)


def any_moves(args: Iterable, kwargs: dict) -> bool:
    """Whether one of the arguments of a rule moves."""
    return any([type(x) is Dual for x in (*args, *kwargs.values())])


def linear_in_first(function: Callable) -> Rule:
    """The rule of a function that is linear in its first argument and of which nothing else moves."""

    def rule(out, x, *args, **kwargs):
        if not is_dual(x) or any_moves(args, kwargs):
            return NotImplemented
        return function(x.dot, *args, **kwargs)

    return rule


def jointly_linear(function: Callable, *slots: tuple[int, str]) -> Rule:
    """The rule of a function that is linear in the arguments at `slots` together: what stands there still is zero."""

    def rule(out, *args, **kwargs):
        places = {place for slot in slots for place in slot}
        if any([is_dual(x) and place not in places for place, x in (*enumerate(args), *kwargs.items())]):
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


def bilinear(function: Callable, second: str, bias: bool = False, spatial: int = 0) -> Rule:
    """The product rule, a_dot b + a b_dot, of a function of a and `second`, linear in each of them.

    With `bias` it takes a third argument, which it adds along the dimension before the last `spatial` ones.
    """

    def rule(out, *args, **kwargs):
        for name in (second, "bias")[len(args) - 1 : 1 + bias]:
            if name in kwargs:
                args = *args, kwargs.pop(name)
        a, b, *others = args
        added = others[0] if bias and others else None
        if added is not None:
            others = [None, *others[1:]]
        if any_moves(others, kwargs):
            return NotImplemented
        dot = added.dot.reshape(-1, *[1] * spatial).clone() if is_dual(added) else None
        if is_dual(a):
            dot = total(dot, function(a.dot, plain(b), *others, **kwargs))
        if is_dual(b):
            dot = total(dot, function(plain(a), b.dot, *others, **kwargs))
        return dot

    return rule
