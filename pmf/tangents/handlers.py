"""Handlers: how value and tangent of a function come about."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from types import BuiltinFunctionType, FunctionType, MethodDescriptorType
from typing import Any

import torch
import torch.nn.functional as F

from pmf.errors import InputError
from pmf.pair import Dual
from pmf.private import number_places, tree_leaves
from pmf.tangents.arguments import given
from pmf.tangents.at_rest import start_viewed, views_of_still
from pmf.tangents.bodies import body_of
from pmf.tangents.carriers import CARRIERS, carrier, give, moves, values_of
from pmf.tangents.fallback import (
    check_eager,
    is_torch,
    mutated,
    overridable,
    shares_memory,
    tangents_by_torch_func,
    versions,
)
from pmf.tangents.interception import unrecorded
from pmf.tangents.random_state import replayed
from pmf.tangents.rules import HANDLERS, TRACED, Found, Handler, Rule, can_move, name_of, place_of


def any_can_move(out: Any) -> bool:
    """Whether there is a floating or complex tensor in a function's result."""
    return can_move(out) or (isinstance(out, tuple | list) and any([any_can_move(x) for x in out]))


def ruled(rule: Rule) -> Handler:
    """The handler that computes the value as usual, recorded, and then the tangent by `rule`, unrecorded."""

    def handle(function, args, kwargs):
        if kwargs and kwargs.get("out") is not None:
            raise InputError(f"pmf.jvp: {name_of(function)} got a moving value and out=; expected no out")
        parts = given(args, kwargs)
        if parts.at_rest and torch.compiler.is_compiling():  # compilers cannot ask whether out lies in their memory
            for x in parts.at_rest:
                x.start()
            parts = given(args, kwargs)
        if any([type(x) is Dual and x.value.ndim == 0 for x in (*parts.duals[1:], *parts.named_duals.values())]):
            _check_numbers(function, parts.duals, parts.named_duals)
        out = function(*parts.values, **parts.named_values)
        if not any_can_move(out):
            return out
        if parts.at_rest:
            if len(parts.at_rest) == 1 and not parts.moving:
                first, named = _first_by_position(args, dict(kwargs))
                if first and first[0] is parts.at_rest[0]:
                    rest, named = values_of(first[1:]), values_of(named)
                    return views_of_still(out, first[0], lambda dot: function(dot, *rest, **named))
            if start_viewed(out, parts.at_rest):
                parts = given(args, kwargs)
        if not parts.moving:
            return out
        with unrecorded():
            duals, named = parts.duals, parts.named_duals
            if named:
                duals, named = _first_by_position(duals, named)
                if "axis" in named and is_torch(function):  # NumPy's name for it
                    named["dim"] = named.pop("axis")
            try:
                dots = rule(out, *duals, **named)
            except TypeError:
                if not is_torch(function) or _takes(rule, out, *duals, **named):
                    raise
                dots = NotImplemented  # another form of the call, such as x.max(y)
            if dots is NotImplemented:
                dots = tangents_by_torch_func(function, out, duals, named)
        return give(out, dots)

    return handle


def _check_numbers(function: Callable, args: Sequence, kwargs: dict) -> None:
    """Errors: `InputError` if a tensor that moves is given where a function takes a number, which has no tangent."""
    places = number_places(getattr(function, "__name__", "")) if is_torch(function) else ()
    for place, x in (*enumerate(args), *kwargs.items()):
        if type(x) is Dual and place in places:
            raise InputError(f"pmf.jvp: {name_of(function)} got a moving value as a number; {NUMBER}")


NUMBER = "its tangent would be lost; expected functions of tensors, or x.item() for what stands still"


def _takes(rule: Rule, *args: Any, **kwargs: Any) -> bool:
    """Whether a rule has parameters for these arguments."""
    try:
        inspect.signature(rule).bind(*args, **kwargs)
    except TypeError:
        return False
    return True


def _first_by_position(args: Sequence, kwargs: dict) -> tuple[Sequence, dict]:
    """The arguments, the first of them without its name: rules take it by position. An `out` of None is dropped."""
    kwargs.pop("out", None)
    for name in ("input", "tensors"):
        if not args and name in kwargs and not kwargs.keys() & {"condition", "n"}:  # as in where, polygamma
            return (kwargs[name],), {other: x for other, x in kwargs.items() if other != name}
    return args, kwargs


def drawn(rule: Rule) -> Handler:
    """`ruled`, for a function that draws random numbers: the rule sees the generators as the function found them."""

    def handle(function, args, kwargs):
        with replayed(tree_leaves(values_of((args, kwargs)))) as replay:
            return ruled(lambda *given, **named: replay(rule, *given, **named))(function, args, kwargs)

    return handle


def still(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler of a function whose result never moves."""
    return function(*values_of(args), **values_of(kwargs))


def made_like(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler of a function that makes a tensor in the likeness of another: a carrier that stands still."""
    like, others = (args[0], args[1:]) if args else (kwargs.get("input"), ())
    if moves(others) or any([moves(x) for name, x in kwargs.items() if name != "input"]):
        raise InputError(f"pmf.jvp: {name_of(function)} got a moving value as a number; {NUMBER}")
    out = still(function, args, kwargs)
    if type(like) not in CARRIERS or not any_can_move(out):
        return out
    return carrier(out, torch.zeros_like(out) if torch.compiler.is_compiling() else None)


def refused(reason: str) -> Handler:
    """The handler of a function that would lose the tangent."""

    def handle(function, args, kwargs):
        if moves(args) or moves(kwargs):
            raise InputError(f"pmf.jvp: {name_of(function)} got a moving value; {reason}")
        return still(function, args, kwargs)

    return handle


def composite(function: Callable) -> Handler | None:
    """The handler of a function that PyTorch writes in Python: its body, run on the carriers; None for a builtin."""
    body = body_of(function)
    if body is None:
        return None
    traceable = function.__module__ == F.__name__  # compilers enter no other module of PyTorch
    imports = "importlib" in function.__code__.co_names  # for deterministic algorithms; compilers cannot trace it

    def handle(function, args, kwargs):
        if not torch.compiler.is_compiling():
            return body(*args, **kwargs)
        if traceable and not (imports and torch.are_deterministic_algorithms_enabled()):
            return body(*args, **kwargs)
        return TRACED.get(function, by_torch_func)(function, args, kwargs)

    return handle


def unknown(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler of a function without rule that PyTorch does not list."""
    place = place_of(function)
    if place is not None:
        found = getattr(Found, place)
        if not torch.compiler.is_compiling():  # compiled code would be compiled again: it guards the registry's size
            HANDLERS[function] = found
        return found(function, args, kwargs)
    check_eager(function)
    if isinstance(getattr(function, "__self__", None), property):
        return refused("its tangent would be lost; expected torch functions")(function, args, kwargs)
    hidden = refused(TORCH_SCRIPT if isinstance(function, torch.ScriptMethod) else NO_RULE)
    handler = composite(function) or (by_torch_func if is_torch(function) else hidden)
    HANDLERS[function] = handler
    return handler(function, args, kwargs)


TORCH_SCRIPT = "torch.jit.script loses its tangent; expected the code before it (PYTORCH_JIT=0 in the environment)"
NO_RULE = "it is not a function of PyTorch and has no rule; expected one registered by pmf.jvp.rule"


def by_torch_func(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler that computes a function twice: recorded, and under `torch.func.jvp`, unrecorded."""
    if torch.compiler.is_compiling():
        return ruled(lambda out, *duals, **named: tangents_by_torch_func(function, out, duals, named))(
            function, args, kwargs
        )
    before = versions(args, kwargs)

    def check_arguments() -> None:
        if mutated(args, kwargs, before):
            raise InputError(f"pmf.jvp: {name_of(function)} has no rule and writes to its arguments")

    def rule(out, *duals, **named):
        check_arguments()
        if shares_memory(out, duals, named):
            raise InputError(f"pmf.jvp: {name_of(function)} has no rule and returns a view")
        return tangents_by_torch_func(function, out, duals, named)

    result = drawn(rule)(function, args, kwargs)
    if moves(args) or moves(kwargs):
        check_arguments()  # a function that writes may return nothing
    return result


LISTED = BuiltinFunctionType | FunctionType | MethodDescriptorType
"""The kinds of functions that are listed at once, so that compilers tell PyTorch's own from others."""
DRAWING = """
_fused_dropout _sample_dirichlet _standard_gamma alpha_dropout binomial feature_alpha_dropout fractional_max_pool2d
fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices gumbel_softmax
native_dropout normal pca_lowrank poisson rrelu rrelu_with_noise svd_lowrank
"""
"""Functions without rule that draw random numbers."""


def eager_only(function: Callable, args: tuple, kwargs: dict) -> Any:
    """The handler of a function without rule that draws numbers, which compilers cannot draw again, or that writes."""
    check_eager(function)
    return by_torch_func(function, args, kwargs)


HANDLERS[None] = unknown
for _function in overridable():
    _name = getattr(_function, "__name__", "")
    _handler = composite(_function)
    if _name in DRAWING.split() or re.fullmatch(r"\w*[^_]_|__i(and|or|xor|lshift|rshift)__|_scaled_dot\w+", _name):
        _handler = _handler or eager_only
    if _handler is not None or isinstance(_function, LISTED):
        HANDLERS[_function] = _handler or by_torch_func
