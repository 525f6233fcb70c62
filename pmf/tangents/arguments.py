"""Take a function's arguments apart: what it is called with, and what its rule sees."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

from pmf.pair import Dual
from pmf.tangents.carriers import CARRIERS, DualTensor, TracedDualTensor, each, moves, values_of


class Given(NamedTuple):
    """The arguments of a function, without their carriers."""

    values: list
    duals: list
    """With `Dual`s in place of the carriers that move, and the values of those that stand still."""
    named_values: dict
    named_duals: dict
    at_rest: list[DualTensor]
    """The DualTensors without tangent."""
    moving: bool


def given(args: tuple, kwargs: dict) -> Given:
    """The parts of the arguments, in one pass: every call of every function takes it."""
    values, duals, at_rest, moving = _split(args)
    if not kwargs:
        return Given(values, duals, {}, {}, at_rest, moving)
    named = _split(kwargs.values())
    named_values, named_duals = (dict(zip(kwargs, part, strict=True)) for part in named[:2])
    return Given(values, duals, named_values, named_duals, at_rest + named[2], moving or named[3])


def _split(arguments: Iterable[Any]) -> tuple[list, list, list[DualTensor], bool]:
    values: list[Any] = []
    duals: list[Any] = []
    at_rest: list[DualTensor] = []
    moving = False
    for x in arguments:
        value = dual = x
        if type(x) in CARRIERS:
            if type(x) is TracedDualTensor and not torch.compiler.is_compiling():
                x.join()
            value, dot = x.value, x.tangent
            if dot is None:
                dual = value
                at_rest += standing_still(x)
            else:
                dual, moving = Dual(value, dot), True
        elif isinstance(x, (tuple, list, dict)):
            value, dual, moving = values_of(x), duals_of(x), moving or moves(x)
            at_rest += standing_still(x)
        values.append(value)
        duals.append(dual)
    return values, duals, at_rest, moving


def standing_still(x: Any) -> list[DualTensor]:
    """The DualTensors without tangent that are x, or in the lists and tuples in x.

    For compilers, which cannot look for their views, without those that nobody will write to: their call is over.
    """
    if type(x) is DualTensor:
        plain = torch.compiler.is_compiling() and x.stopped
        return [x] if x.tangent is None and not plain else []
    return [one for part in x for one in standing_still(part)] if isinstance(x, (tuple, list)) else []


def duals_of(x: Any) -> Any:
    """x with `Dual`s in place of its carriers, and the values of those that stand still."""
    return each(x, lambda moving: moving.value if moving.tangent is None else Dual(moving.value, moving.tangent))
