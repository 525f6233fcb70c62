"""PyTorch's operators by the names that exported programs and traced graphs call: `torch.ops.aten`."""

from __future__ import annotations

from typing import Any

from pmf.private import schema
from pmf.tangents.handlers import by_torch_func, ruled
from pmf.tangents.rules import FINDERS, HANDLERS, Handler, jointly_linear, linear_in_first, named
from pmf.tangents.shapes import LINEAR

LINEAR_HERE = {"_to_copy", "_unsafe_view", "index", "istft", "stft", "to", *LINEAR.split()}
"""Operators that are linear in their first argument, whatever the function of their name takes."""


def _of_operator(function: Any) -> Handler | None:
    """The handler of an operator: mostly that of the function of its name."""
    qualified, _, view = schema(function)
    space, _, name = qualified.partition("::")
    if space != "aten":
        return None
    if name == "copy":
        return ruled(jointly_linear(function, (0, "self"), (1, "src")))
    known = next((HANDLERS[other] for other in named(name) if other in HANDLERS), None)
    unknown_view = view and known in (None, by_torch_func)  # views are linear
    return ruled(linear_in_first(function)) if name in LINEAR_HERE or unknown_view else known


FINDERS.append(_of_operator)
