"""What wraps a network: autograd.Functions, backward hooks, activation checkpointing, DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import torch

from pmf.private import PASSES_INPUTS_ON, REENTRANT_CHECKPOINT, UNUSED_PARAMETERS, intercepted_by
from pmf.tangents.carriers import CARRIERS, moves, values_of
from pmf.tangents.handlers import by_torch_func, refused, ruled
from pmf.tangents.rules import HANDLERS, Handler, is_dual


def _passed_on(out: tuple, *args: Any) -> tuple:
    """The rule of a Function that returns its last arguments."""
    return tuple(x.dot if is_dual(x) else None for x in args[len(args) - len(out) :])


def _named(function: type, apply: Callable) -> Callable:
    """`apply` under the name of its class, for messages."""

    def run(*args, **kwargs):
        return apply(*args, **kwargs)

    run.__name__ = f"{function.__module__}.{function.__qualname__}"
    return run


def _handler(function: type[torch.autograd.Function], args: tuple) -> Handler:
    """The handler of an autograd.Function."""
    name = f"{function.__module__}.{function.__qualname__}"
    if function in HANDLERS:
        return HANDLERS[function]
    if name == REENTRANT_CHECKPOINT:
        return refused("reentrant checkpointing hides tangents; expected use_reentrant=False")
    if name == UNUSED_PARAMETERS and args[0]().find_unused_parameters:
        return refused("DDP looks for unused parameters behind it; expected find_unused_parameters=False")
    if name in PASSES_INPUTS_ON:
        return ruled(_passed_on)
    if function.jvp is not torch.autograd.Function.jvp:
        return by_torch_func
    return refused("an autograd.Function hides tangents; expected one with a jvp, or registered by pmf.jvp.rule")


def _apply(function: type, apply: Callable, args: tuple, kwargs: dict) -> Any:
    """`function.apply(*args, **kwargs)`, where carriers are among the arguments."""
    if not (moves(args) or moves(kwargs)):
        return apply(*values_of(args), **values_of(kwargs))
    return _handler(function, args)(_named(function, apply), args, kwargs)


def seen_through() -> AbstractContextManager[None]:
    """Inside the context, wrappers treat carriers as above."""
    return intercepted_by(CARRIERS, _apply, values_of)
