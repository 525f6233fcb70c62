"""What wraps a network: autograd.Functions, backward hooks, activation checkpointing, DDP and FSDP2."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from pmf.private import (
    PASSES_INPUTS_ON,
    REENTRANT_CHECKPOINT,
    UNUSED_PARAMETERS,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
)
from pmf.tangents.carriers import (
    CARRIERS,
    TRACED_BY_NAME,
    DualTensor,
    TracedDualTensor,
    dual_tensor,
    inside_call,
    moves,
    open_call,
    propagate,
    values_of,
)
from pmf.tangents.handlers import by_torch_func, refused, ruled
from pmf.tangents.interception import intercepted_by, watch_data
from pmf.tangents.memory import fitted
from pmf.tangents.rules import Handler, handler_of, is_dual


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
    known = handler_of(function)
    if known is not None:
        return known
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


def _traced_checkpoint(operator: Callable, args: tuple, kwargs: dict) -> Any:
    """For compilers, a checkpoint of a function of no carrier: they look for those in arguments, not in closures.

    Compilers make again in backward what it reads; no tangent is among that.
    """
    function, *inputs = args
    moving = {name: x for name, x in kwargs.items() if moves(x)}
    rest = {name: values_of(x) for name, x in kwargs.items() if name not in moving}  # options of the checkpoint too
    return checkpoint(lambda **still: function(*inputs, **moving, **still), **rest)


def _again(function: Callable, inputs: tuple) -> Callable:
    """What backward calls for a checkpoint in which compiled code ran: the function, of carriers again.

    Compiled code has a graph for carriers, which keeps other values than its graph for tensors.
    """
    leaves = tree_leaves(inputs)  # the options of the checkpoint too, none of which is a tensor
    tensors = (Tensor, *CARRIERS)
    kinds = [(type(x), moves(x)) for x in leaves if isinstance(x, tensors)]

    def run(*args: Any, **kwargs: Any) -> Any:
        leaves, spec = tree_flatten((args, kwargs))
        first = iter(kinds)
        again = [_as(*next(first), values_of(x)) if isinstance(x, tensors) else x for x in leaves]
        args, kwargs = tree_unflatten(again, spec)
        with nullcontext() if inside_call() else open_call(), seen_through():
            return function(*args, **kwargs)

    return run


def _as(kind: type, moving: bool, x: Tensor) -> Any:
    """x as an object of this class, with any tangent if it moves."""
    if kind not in CARRIERS:
        return x
    dot = fitted(torch.zeros_like(x), x) if moving else None
    return dual_tensor(x, dot) if kind is DualTensor else TracedDualTensor(x, dot)


def _assign(write: Callable, x: Tensor, y: Any) -> None:
    """`x.data = y` for a carrier y."""
    propagate(write, (x, y), {})


TRACED_BY_NAME["tag_activation_checkpoint"] = _traced_checkpoint


def seen_through() -> AbstractContextManager[None]:
    """Inside the context, wrappers treat carriers as above."""
    watch_data(CARRIERS, _assign)
    return intercepted_by(CARRIERS, _apply, values_of, _again)
