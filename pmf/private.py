"""What is private in PyTorch, in one place."""

from __future__ import annotations

from collections.abc import Callable


def constant(function: Callable) -> Callable:
    """Compilers call `function` once, while they trace, and take what it returned for a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but importing the compiler takes a second.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function
