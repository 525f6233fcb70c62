"""The functions that PyTorch writes in Python, to run line by line on carriers instead of dispatching to them.

Compilers trace them too, and with them the helpers that they would take for operators of their own.
"""

from __future__ import annotations

import functools
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

UNLISTED = frozenset(
    {F.hardsigmoid, F.hardswish, F.sigmoid, F.tanh, F.upsample, F.upsample_bilinear, F.upsample_nearest}
)
"""Functions that compilers do not look into, and that PyTorch does not list as overridable."""


@functools.cache
def body_of(function: Callable) -> Callable | None:
    """The body of a torch function written in Python, without its own dispatch to carriers; None for a builtin."""
    if not isinstance(function, types.FunctionType) or function.__module__.split(".")[0] != "torch":
        return None
    if "__class__" in function.__code__.co_freevars:  # super().name would come back here
        return None
    asks = _asks(function.__code__.co_names)
    answered = asks <= function.__globals__.keys()  # torch.nn.init asks torch.overrides
    if not answered or not (asks or function in UNLISTED):
        return None
    return _in_scope(function, vars(_without_dispatch(function.__globals__["__name__"])))


def _asks(names: Any) -> set[str]:
    """Those of the names that ask whether to dispatch."""
    return {name for name in names if name.startswith("has_torch_function")}


def _in_scope(function: types.FunctionType, scope: dict) -> Callable:
    """The function with other globals."""
    made = types.FunctionType(function.__code__, scope, function.__name__, function.__defaults__, function.__closure__)
    made.__kwdefaults__ = function.__kwdefaults__
    return made


@functools.cache
def _without_dispatch(name: str) -> types.ModuleType:
    """A copy of a module of PyTorch in which no function dispatches, and that compilers can trace.

    It is a module, since they look for the globals of a function in one.
    """
    original = vars(sys.modules[name])
    copy = types.ModuleType(f"pmf.tangents.without_dispatch.{name}")
    scope = vars(copy)
    scope.update({name: x for name, x in original.items() if name == "__builtins__" or not name.startswith("__")})
    scope.update({name: _never for name in _asks(original)})
    for name, x in original.items():
        if isinstance(x, types.ModuleType) and x.__name__ in _HELPERS:
            scope[name] = _without_dispatch(x.__name__)
        elif isinstance(x, types.FunctionType) and not _asks(x.__code__.co_names):
            if x.__globals__ is original:
                scope[name] = _in_scope(x, scope)
            elif x.__module__ in _HELPERS:
                scope[name] = getattr(_without_dispatch(x.__module__), name)
    scope.update({name: x for name, x in _TRACEABLE.items() if name in original})
    sys.modules[copy.__name__] = copy
    return copy


def _never(*tensors: Any) -> bool:
    return False


def _warn(message: Any, category: Any = None, stacklevel: int = 1, source: Any = None) -> None:
    """`warnings.warn`, except in a compiler."""
    if not torch.compiler.is_compiling():
        warnings.warn(message, category, stacklevel + 1, source)


def _check_key_padding_mask(key_padding_mask: Tensor, src_len: int, bsz: int) -> None:
    """The check of PyTorch, whose messages hold a tensor."""
    for i, expected in enumerate((bsz, src_len)):
        found = key_padding_mask.shape[i]
        if found != expected:
            raise AssertionError(f"Expected key_padded_mask.shape[{i}] to be {expected}, but got {found}")


_HELPERS = "torch.nn._reduction", "torch.nn.modules.utils"
"""Modules of helpers that compilers take for operators."""
_TRACEABLE = {
    "warnings": types.SimpleNamespace(**vars(warnings) | {"warn": _warn}),
    "_check_key_padding_mask": _check_key_padding_mask,
}
"""What takes the place of helpers that compilers cannot trace."""
