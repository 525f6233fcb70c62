"""Which implementation an op runs on: the reference or a Triton kernel. The only importer of kernels."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Callable

import torch
from torch import Tensor

from pmf import reference
from pmf.autocast import autocast_dtype
from pmf.errors import InputError, require
from pmf.private import constant

log = logging.getLogger("pmf")

IMPLEMENTATIONS = ("auto", "triton", "reference")
KERNEL_MODULES = {
    "norm_modulate_dual": "norm",
    "residual_norm_modulate_dual": "norm",
    "qk_norm_rope_dual": "rotary",
    "swiglu_dual": "swiglu",
    "attention_dual": "attention",
    "patch_embed_dual": "patch",
    "pmf_objective": "objective",
}
"""Ops that have a Triton kernel, and the module of `pmf.kernels` that holds it."""
KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
KERNEL_MAX_WIDTH = 8192
"""Widest row a norm kernel keeps in registers."""
KERNEL_MAX_HEAD_DIM = 128
"""Widest head the attention tangent keeps in registers."""
KERNEL_PATCHES = (2, 4, 8, 16, 32)
KERNEL_MAX_BOTTLENECK = 256
"""Widest bottleneck the patch embedding keeps in registers between its two products."""

_kernels: dict[str, Callable] = {}


def checked_impl(impl: str | None) -> str:
    """`impl`, or PMF_IMPL where it is None. Errors: not one of `IMPLEMENTATIONS`."""
    source = "impl" if impl is not None else "PMF_IMPL"
    impl = impl if impl is not None else os.environ.get("PMF_IMPL", "auto")
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"{source}: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    return impl


@functools.cache
def report(op: str, choice: str, reason: str) -> None:
    """Say once which implementation an op runs on, and why."""
    log.info("%s runs on %s: %s", op, choice, reason)


def _unsupported(tensors: tuple[Tensor | None, ...]) -> str | None:
    """What about the dtypes of these tensors, tangents too, a Triton kernel cannot take; None when it can."""
    low = None
    for tensor in tensors:
        if tensor is None or tensor.dtype == torch.float32:
            continue
        if tensor.dtype not in KERNEL_DTYPES:
            return f'dtype must be float32, bfloat16 or float16 with impl="triton", got {tensor.dtype}'
        low = tensor.dtype if low is None else low
        if tensor.dtype != low:
            return "dtypes must not mix bfloat16 and float16, got both"
    return None


def decide(op: str, impl: str | None, device: str, unsupported: str | None = None) -> tuple[str, str]:
    """("triton" or "reference", why) for an op on a type of device; `unsupported`: what its kernel cannot take.

    An op without a kernel runs on the reference under every impl. Errors: `InputError` where impl is "triton" and
    its kernel cannot run.
    """
    impl, name = checked_impl(impl), op.removesuffix("_dual")
    if op not in KERNEL_MODULES:
        return "reference", "this op has no Triton kernel yet"
    if impl == "reference":
        return "reference", "requested"
    if device != "cuda" and impl == "auto":
        return "reference", "no cuda"
    if not _kernels and importlib.util.find_spec("triton") is None:
        reason = 'impl="triton" needs the triton package, which is not installed'
    elif unsupported is None and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f'impl="triton" needs cuda tensors, got {device} (TRITON_INTERPRET=1 runs the interpreter)'
    else:
        reason = unsupported
    require(impl != "triton" or reason is None, f"{name}: {reason}")
    if reason is not None:
        return "reference", reason
    return "triton", "requested" if impl == "triton" else "tensors are on cuda"


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """What computes the value of the Triton attention on a device, and why; see `pmf.kernels.flash`."""
    flash = importlib.import_module("pmf.kernels.flash")
    return flash.backend_of(device.type, device.index, str(dtype), head_dim)


def use_attention_backend(backend: str | None) -> contextlib.AbstractContextManager[None]:
    """Compute the value of the Triton attention, and its gradients, by this one backend inside the context.

    Args: backend "flash_attn_4", "flash_attn", "flash", "cudnn" or "efficient" (`pmf.kernels.flash` says what each
    is and where it runs); None changes nothing. The tangent is Triton's with each. In all threads; compiled
    functions are compiled anew for each backend.
    Errors: `InputError` here for another name, and at the call of attention where the backend cannot run.
    """
    return importlib.import_module("pmf.kernels.flash").use(backend)


@constant
def _use_triton(op: str, impl: str | None, device: str, unsupported: str | None) -> bool:
    """Whether the Triton kernel runs, said once; compilers call this once, while they trace."""
    choice, reason = decide(op, impl, device, unsupported)
    report(op.removesuffix("_dual"), choice, reason)
    if choice == "triton" and not _kernels:  # all at once: a compiler that traces this sees the table as first found
        for each, module in KERNEL_MODULES.items():
            _kernels[each] = getattr(importlib.import_module(f"pmf.kernels.{module}"), each)
    return choice == "triton"


def choose(op: str, impl: str | None, tensors: tuple, limit: str | None = None) -> Callable:
    """The function that computes `op` on these tensors, the first of which is there; `limit`: what else about them
    its kernel cannot take.
    """
    device = tensors[0].device.type
    unsupported = limit or (_unsupported(tensors) if op in KERNEL_MODULES else None)
    return _kernels[op] if _use_triton(op, impl, device, unsupported) else getattr(reference, op)


def width_limit(x: Tensor) -> str | None:
    """What about the rows of x a norm kernel cannot take."""
    width = x.shape[-1]
    if width <= KERNEL_MAX_WIDTH:
        return None
    return f'width must be at most {KERNEL_MAX_WIDTH} with impl="triton", got {width}'


def attention_limit(q: Tensor) -> str | None:
    """What about the heads the attention tangent cannot take."""
    head_dim = q.shape[-1]
    if head_dim % 8 or not 0 < head_dim <= KERNEL_MAX_HEAD_DIM:
        wanted = f"a multiple of 8 up to {KERNEL_MAX_HEAD_DIM}"
        return f'head_dim must be {wanted} with impl="triton", got {head_dim}'
    return None


def patch_limit(patch: int, bottleneck: int) -> str | None:
    """What about the patches the patch embedding's kernel cannot take."""
    if patch not in KERNEL_PATCHES:
        return f'patch size must be one of {KERNEL_PATCHES} with impl="triton", got {patch}'
    if bottleneck > KERNEL_MAX_BOTTLENECK:
        return f'bottleneck must be at most {KERNEL_MAX_BOTTLENECK} with impl="triton", got {bottleneck}'
    return None


def activation_dtype(x: Tensor) -> torch.dtype:
    """The dtype a product reads next: autocast's where it is on, else that of `x`."""
    return autocast_dtype(x.device.type) or x.dtype
