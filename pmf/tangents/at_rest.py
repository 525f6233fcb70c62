"""Tensors that stand still and may move later, when a moving value is written to them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.private import alone, exchange, make_shell, storage_id, transform_level, tree_leaves, viewed
from pmf.tangents.carriers import DualTensor, dual_tensor, inside_call, rebuilt
from pmf.tangents.memory import fitted, overlaps
from pmf.tangents.rules import can_move


def _part(function: Callable, i: int, dot: Tensor) -> Tensor:
    return function(dot)[i]


def views_of_still(out: Any, x: Any, again: Callable[[Tensor], Any]) -> Any:
    """`out` with carriers for what lies in the memory of x, a DualTensor without tangent: x may be written to later.

    `again` makes `out` of the tangent that x has then.
    """
    if type(x) is not DualTensor or not inside_call():
        return out
    if isinstance(out, tuple | list):
        parts = [functools.partial(_part, again, i) for i in range(len(out))]
        return rebuilt(out, [views_of_still(y, x, part) for y, part in zip(out, parts, strict=True)])
    if out is x.value:
        return x
    if not can_move(out) or storage_id(out) != storage_id(x.value):
        return out
    view = dual_tensor(out, None)
    view.view_of(x, again)
    return view


def start_viewed(out: Any, given: list[DualTensor]) -> bool:
    """Start those of the given that `out` has views of; whether there are any. Outside of a call nothing starts."""
    memory = {storage_id(x) for x in tree_leaves(out) if can_move(x)} if given and inside_call() else ()
    seen = [x for x in given if storage_id(x.value) in memory]
    for x in seen:
        x.start()
    return bool(seen)


def adopt(x: Tensor) -> None:
    """Let an ordinary tensor be a DualTensor with a tangent of zero until the call is over, and what it is a view of.

    Whoever holds them then holds DualTensors. Not so parameters, and what shares memory with further tensors, which
    would not move.
    """
    if not inside_call() or transform_level() is not None:
        return
    base = viewed(x)
    whole = x if base is None else base
    leaf = whole.is_leaf and whole.requires_grad
    if leaf or not (_ordinary(x) and _ordinary(whole) and x.dtype == whole.dtype and alone(x)):
        return
    tangent = fitted(torch.zeros_like(whole), whole)
    part = tangent.as_strided(x.size(), x.stride(), x.storage_offset() - whole.storage_offset())
    with contextlib.suppress(RuntimeError):  # PyTorch holds one of them weakly, for retain_grad
        _take_over(whole, tangent)
        if whole is not x:
            _take_over(x, part)


def _ordinary(x: Tensor) -> bool:
    """Whether x is a plain dense tensor that holds what is in its memory."""
    return type(x) is Tensor and x.layout == torch.strided and not (overlaps(x) or x.is_conj() or x.is_neg())


def _take_over(x: Any, tangent: Tensor) -> None:
    """Make x a DualTensor with this tangent."""
    value = make_shell(DualTensor, x)
    exchange(x, value)
    x.take_over(value, tangent)
