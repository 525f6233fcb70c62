"""Choose an op's implementation: the reference or the Triton kernels. No other module of pmf imports `pmf.kernels`."""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import logging
import operator
import os
from collections.abc import Iterator
from types import ModuleType

import torch

from pmf import reference
from pmf.errors import InputError, require
from pmf.private import constant

log = logging.getLogger("pmf")

IMPLEMENTATIONS = ("auto", "triton", "reference")

_kernels: ModuleType | None = None
"""`pmf.kernels.library`, imported when an op first chooses it, because the import needs Triton."""


def checked_impl(impl: str | None) -> str:
    """`impl`, or PMF_IMPL if it is None. Errors: `InputError` on a name that is not in `IMPLEMENTATIONS`."""
    source = "impl" if impl is not None else "PMF_IMPL"
    impl = impl if impl is not None else os.environ.get("PMF_IMPL", "auto")
    if impl not in IMPLEMENTATIONS:
        raise InputError(f"{source}: expected one of {IMPLEMENTATIONS}, got {impl!r}")
    return impl


def _unsupported(op: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> str | None:
    """The reason why the op's kernel cannot take these inputs on any device, or None if it can."""
    if importlib.util.find_spec("triton") is None:
        return 'impl="triton" needs the triton package, which is not installed'
    return importlib.import_module("pmf.kernels.library").unsupported(op, dtypes, sizes)


def decide(
    op: str, impl: str | None, device: str, dtypes: tuple[torch.dtype, ...] = (), sizes: tuple[int, ...] = ()
) -> tuple[str, str]:
    """Choose "triton" or "reference" for an op on a device type; return the choice and its reason.

    Args: dtypes of all inputs and tangents; the sizes that limit the op's kernel, in the order of
    `pmf.kernels.library.LIMITS` (omitted sizes are not checked).
    Errors: `InputError` if impl is "triton" and the kernel cannot run.
    """
    impl = checked_impl(impl)
    if impl == "reference":
        return "reference", "requested"
    if impl == "auto" and device != "cuda":
        return "reference", "no cuda"
    reason = _unsupported(op, dtypes, sizes)
    if reason is None and device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        reason = f'impl="triton" needs cuda tensors, got {device} (TRITON_INTERPRET=1 runs the interpreter)'
    if reason is None:
        return "triton", "requested" if impl == "triton" else "tensors are on cuda"
    require(impl == "auto", f"{op}: {reason}")
    return "reference", reason


@functools.cache
def _report(op: str, choice: str, reason: str) -> None:
    log.info("%s runs on %s: %s", op, choice, reason)


@functools.cache
def _chosen(op: str, impl: str, device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> bool:
    """Whether `decide` chooses Triton; import the kernels if so, and log each choice once."""
    global _kernels
    choice, reason = decide(op, impl, device, dtypes, sizes)
    _report(op, choice, reason)
    if choice == "triton":
        _kernels = importlib.import_module("pmf.kernels.library")
    return choice == "triton"


@constant
def _on_triton(op: str, impl: str | None, device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> bool:
    """`_chosen`, but read PMF_IMPL on every call."""
    return _chosen(op, checked_impl(impl), device, dtypes, sizes)


def forget_choices() -> None:
    """Clear the cached choices and log entries, for tests that change the environment."""
    _chosen.cache_clear()
    _report.cache_clear()


def implementation(
    op: str, impl: str | None, device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]
) -> ModuleType:
    """The module whose function `op` to call: `pmf.reference` or `pmf.kernels.library`. Arguments: see `decide`."""
    if torch.compiler.is_compiling():
        sizes = tuple(map(operator.index, sizes))  # kernels are specialised on these sizes, so Dynamo may be too
    return _kernels if _on_triton(op, impl, device, dtypes, sizes) else reference


def attention_backend(device: torch.device, dtype: torch.dtype, head_dim: int) -> tuple[str, str]:
    """The backend that computes the value of Triton attention on a device, and the reason; see `pmf.kernels.flash`."""
    flash = importlib.import_module("pmf.kernels.flash")
    return flash.backend_of(device.type, device.index, str(dtype), head_dim)


@contextlib.contextmanager
def use_attention_backend(backend: str | None) -> Iterator[None]:
    """Use this backend for the value and the gradients of Triton attention inside the context.

    Args: backend "flash_attn_4", "flash_attn", "flash", "cudnn" or "efficient" (`pmf.kernels.flash` describes
    each and where it runs); None changes nothing. Triton always computes the tangent. Applies to all threads;
    compiled functions are recompiled for each backend.
    Errors: `InputError` here on an unknown name, and in `attention` if the backend cannot run.
    """
    with importlib.import_module("pmf.kernels.flash").use(backend):
        yield
