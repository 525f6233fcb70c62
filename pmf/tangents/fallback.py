"""Functions without a rule are left to `torch.func.jvp`."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.func import jvp as forward_jvp  # scripts may put pmf.jvp in its place
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmf.errors import InputError, first_line
from pmf.private import (
    FUNCTION_NAMESPACES,
    constant,
    forward_mode,
    is_zero_tensor,
    schema,
    storage_id,
    tree_flatten,
    tree_leaves,
    tree_unflatten,
    version,
)
from pmf.tangents.bodies import UNLISTED
from pmf.tangents.memory import overlaps
from pmf.tangents.rules import can_move, is_dual, name_of

FORWARD_MODE = threading.RLock()
"""PyTorch counts the levels of forward mode for all threads together."""


def forward_mode_around() -> bool:
    """Whether forward mode is active that no other thread has begun here."""
    with FORWARD_MODE:
        return forward_mode()


@constant
def is_torch(function: Callable) -> bool:
    """Whether a function is one of PyTorch's own, for which `torch.func.jvp` is right or raises."""
    return schema(function)[0].startswith("aten::") or function in overridable()


@functools.cache
def overridable() -> frozenset[Callable]:
    """The functions of PyTorch that dispatch to `__torch_function__`."""
    listed = [f for functions in torch.overrides.get_overridable_functions().values() for f in functions]
    builtin = [getattr(space, name) for space in FUNCTION_NAMESPACES for name in dir(space)]
    return frozenset(f for f in (*listed, *builtin, *UNLISTED) if callable(f) and f.__hash__ is not None)


def versions(*arguments: Any) -> list[int]:
    """How often each tensor among the arguments has been written to."""
    return [version(x) for x in tree_leaves(arguments) if isinstance(x, Tensor) and not x.is_inference()]


def mutated(args: tuple, kwargs: dict, before: list[int]) -> bool:
    """Whether a tensor among the arguments has been written to since `versions` gave `before`."""
    return versions(args, kwargs) != before


def shares_memory(out: Any, *arguments: Any) -> bool:
    """Whether an output lies in the memory of an argument that moves."""
    moving = [x for x in tree_leaves(arguments, is_leaf=is_dual) if is_dual(x)]
    memory = {storage_id(x.value) for x in moving}
    return any(storage_id(x) in memory for x in tree_leaves(out) if can_move(x))


def check_eager(function: Callable) -> None:
    """Errors: `InputError` in a compiler, which cannot trace what follows."""
    if torch.compiler.is_compiling():
        raise InputError(f"pmf.jvp: {name_of(function)} has no rule that compiles; expected a function that has one")


def tangents_by_torch_func(function: Callable, out: Any, args: tuple, kwargs: dict) -> Any:
    """The tangents of `out = function(*args, **kwargs)`, by computing it again under `torch.func.jvp`."""
    leaves, spec = tree_flatten((args, kwargs), is_leaf=is_dual)
    places = [i for i, x in enumerate(leaves) if is_dual(x)]

    def floats(*values: Tensor) -> list[Tensor]:
        given = list(leaves)
        for i, value in zip(places, values, strict=True):
            given[i] = value
        args, kwargs = tree_unflatten(given, spec)
        return [x for x in tree_leaves(function(*args, **kwargs)) if can_move(x)]

    if torch.compiler.is_compiling():
        moving = [leaves[i] for i in places]
        with sdpa_kernel(SDPBackend.MATH):
            dots = forward_jvp(floats, tuple([x.value.detach() for x in moving]), tuple([x.dot for x in moving]))[1]
        return _arranged(out, iter([dot.clone() for dot in dots]))
    before = versions(args, kwargs)
    try:
        # Flash attention has no forward mode, its mathematics has; torch 2.11 has none in inference mode.
        with FORWARD_MODE, sdpa_kernel(SDPBackend.MATH), torch.inference_mode(False), torch.no_grad():
            leaves = [x.map(_ordinary) if is_dual(x) else _ordinary(x) for x in leaves]
            moving = [leaves[i] for i in places]
            primals, tangents = tuple(_primal(x.value) for x in moving), tuple(x.dot for x in moving)
            dots = [_owned(dot, tangents) for dot in forward_jvp(floats, primals, tangents)[1]]
    except (RuntimeError, NotImplementedError) as error:
        raise InputError(
            f"pmf.jvp: {name_of(function)} has no rule, and torch.func.jvp fails: {first_line(error)}"
        ) from error
    if mutated(args, kwargs, before):
        raise InputError(f"pmf.jvp: {name_of(function)} has no rule and writes to its arguments")
    return _arranged(out, iter(dots))


def _owned(dot: Tensor, given: tuple) -> Tensor:
    """dot in memory of its own, to which in-place functions can write."""
    return dot.clone() if is_zero_tensor(dot) or storage_id(dot) in map(storage_id, given) else dot


def _primal(x: Tensor) -> Tensor:
    """x for `torch.func.jvp`, which takes no dense tangent of a tensor that overlaps itself."""
    return x.detach().contiguous() if overlaps(x) else x.detach()


def _ordinary(x: Any) -> Any:
    """x, copied if it is a tensor that inference mode made."""
    return x.clone() if isinstance(x, Tensor) and x.is_inference() else x


def _arranged(out: Any, dots: Any) -> Any:
    """The tangents of the floating tensors in `out`, in its structure; None elsewhere."""
    if isinstance(out, tuple | list):
        return [_arranged(x, dots) for x in out]
    return next(dots) if can_move(out) else None
