"""What is private in PyTorch, in one place."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad


def constant(function: Callable) -> Callable:
    """Compilers call `function` once, while they trace, and take what it returned for a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but importing the compiler takes a second.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def transforming() -> bool:
    """Whether torch.func transforms, or forward-mode differentiation, are at work."""
    return torch._C._are_functorch_transforms_active() or forward_ad._current_level >= 0


def watched() -> bool:
    """Whether, outside compilers, something comes between the call of an operator and its kernel.

    Transforms, tracers, and modes: fake tensors, operation counters, selective checkpoints, default devices.
    """
    return bool(
        transforming()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.jit.is_tracing()
    )


def ordinary(arguments: Iterable[object]) -> bool:
    """Whether all tensors among the arguments hold values that lie in memory as they are: no wrapper, no lazy sign."""
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor
    for x in arguments:
        if isinstance(x, Tensor) and (type(x) not in (Tensor, nn.Parameter) or x.is_neg() or wrapped(x)):
            return False
    return True
