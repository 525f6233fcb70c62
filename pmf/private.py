"""All private names of PyTorch that we use, as of torch 2.11.0 and 2.13.0.

Those of Triton are in `pmf.kernels.launching`. test_private.py fails on private names anywhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.autograd import forward_ad
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

__all__ = [  # without public equivalents: torch.utils.pytree takes no is_leaf, fake tensors are private as a whole
    "FakeTensor",
    "FakeTensorMode",
    "tree_flatten",
    "tree_map_only",
    "tree_unflatten",
]

# One launch for a list of tensors; torch.optim uses them too.
foreach_add_ = torch._foreach_add_
foreach_addcdiv_ = torch._foreach_addcdiv_
foreach_addcmul_ = torch._foreach_addcmul_
foreach_copy_ = torch._foreach_copy_
foreach_div_ = torch._foreach_div_
foreach_lerp_ = torch._foreach_lerp_
foreach_mul = torch._foreach_mul
foreach_mul_ = torch._foreach_mul_
foreach_sqrt = torch._foreach_sqrt
foreach_sub_ = torch._foreach_sub_
foreach_zero_ = torch._foreach_zero_

_ATEN = torch.ops.aten
SCALED_DOT_PRODUCT = {
    "flash": _ATEN._scaled_dot_product_flash_attention,
    "cudnn": _ATEN._scaled_dot_product_cudnn_attention,
    "efficient": _ATEN._scaled_dot_product_efficient_attention,
    "cpu": _ATEN._scaled_dot_product_flash_attention_for_cpu,
}
"""Attention that also returns the log-sum-exp; the public function does not."""


def constant(function: Callable) -> Callable:
    """Make compilers call `function` once, while tracing, and treat its result as a constant.

    `torch.compiler.assume_constant_result` sets the same mark, but importing the compiler takes a second.
    """
    setattr(function, "_dynamo_marked_constant", True)  # noqa: B010
    return function


def open_batch(x: Tensor) -> None:
    """Let compilers treat the batch size of x as dynamic; the public function fails if it turns out static."""
    torch._dynamo.maybe_mark_dynamic(x, 0)


def reread_buffers() -> None:
    """Make compiled functions keep their buffers after backward, so that it can run again."""
    import torch._functorch.config  # importing the compiler takes a second

    torch._functorch.config.donated_buffer = False


def storage_id(x: Tensor) -> int:
    """An identifier of x's storage, even if that has no memory (fake and meta tensors)."""
    return x.untyped_storage()._cdata


def forward_mode() -> bool:
    """Whether forward-mode differentiation is active; reads a variable, because Dynamo cannot trace such a query."""
    return forward_ad._current_level >= 0


def apply_without_transforms(function: type[torch.autograd.Function]) -> Callable:
    """`function.apply`, without its checks for transforms and for dead wrappers left by finished ones."""
    base: Any = super(torch.autograd.Function, function)
    return base.apply


def transforming() -> bool:
    """Whether torch.func transforms or forward-mode differentiation are active."""
    return torch._C._are_functorch_transforms_active() or forward_mode()


def intercepted() -> bool:
    """Whether anything but a compiler intercepts operator calls.

    That is: transforms, tracers, and modes (fake tensors, operation counters, selective checkpoints, default devices).
    """
    return bool(
        forward_ad._current_level >= 0
        or torch._C._are_functorch_transforms_active()
        or torch._C._len_torch_dispatch_stack()
        or torch._C._len_torch_function_stack()
        or torch.jit.is_tracing()
    )


_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor


def mapped(x: Tensor) -> bool:
    """Whether `torch.vmap` maps over x, so that its values cannot be read."""
    while _is_wrapped(x):
        if torch._C._functorch.is_batchedtensor(x):
            return True
        x = torch._C._functorch.get_unwrapped(x)
    return False


def recorded_levels(x: Tensor) -> set[int]:
    """The nesting levels of torch.func transforms at which x requires a gradient; 0 is outside of all transforms."""
    levels = set()
    while _is_wrapped(x):
        if x.requires_grad:
            levels.add(torch._C._functorch.maybe_get_level(x))
        x = torch._C._functorch.get_unwrapped(x)
    return levels | {0} if x.requires_grad else levels


_PLAIN = frozenset((type(None), bool, int, float, torch.dtype, list))


def ordinary(arguments: Iterable[Any]) -> bool:
    """Whether all tensors among the arguments are plain: no subclass, no wrapper of torch.func, no lazy negation."""
    tensors = []
    for x in arguments:
        kind = type(x)
        if kind is Tensor or kind is nn.Parameter:
            tensors.append(x)
        elif kind not in _PLAIN and isinstance(x, Tensor):
            return False
    return not (any(map(Tensor.is_neg, tensors)) or any(map(_is_wrapped, tensors)))
