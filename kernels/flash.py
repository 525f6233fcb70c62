"""The primal of attention: a FlashAttention that also returns the log-sum-exp of every row.

All backends here take and return heads as [B, S, H, D], and return the log-sum-exp (natural logarithm) as float32
[B, H, S_q]. `decide` chooses the first that can run:

| backend        | what it is                 | where it can run           | sm_90, sm_100 | else | lengths | groups |
|----------------|----------------------------|----------------------------|---------------|------|---------|--------|
| `cudnn`        | cuDNN's, through PyTorch   | bf16, fp16; from sm_80 on  | 1st           | 3rd  | no      | yes    |
| `flash_attn`   | the package flash-attn 2   | bf16, fp16; from sm_80 on  | 2nd           | 1st  | no      | yes    |
| `flash`        | PyTorch's FlashAttention   | bf16, fp16; from sm_80 on  | 3rd           | 2nd  | no      | yes    |
| `efficient`    | PyTorch's memory-efficient | fp32 too; all CUDA devices | last          | last | yes     | copies |
| `flash_attn_4` | the package flash-attn-4   | bf16, fp16; sm_90, sm_100  | by request    |      | no      | yes    |
| `cpu`          | PyTorch's for CPUs         | all CPUs                   |               |      | yes     | copies |

lengths: `key_lengths`, as a bias of 0 and -inf: one row of keys per sample, or with `causal` one per query. groups:
fewer key heads than query heads, or copies of them (of PyTorch's, all copy on AMD). All take `causal`. `cpu` serves
Triton's interpreter and cannot be requested. A single key needs no backend.

Times measured on an H200, as fractions of the time of PyTorch's FlashAttention, which has the kernels of flash-attn 2
(forward and backward, bfloat16, all keys):

|              | S 276, D 64 | S 276, D 80 | S 4096, D 128 |
|--------------|-------------|-------------|---------------|
| flash-attn-4 | 0.74, 0.59  | 0.65, 0.55  | 0.50, 0.48    |
| cuDNN        | 0.74, 0.62  | 0.82, 0.68  | 0.53, 0.53    |

flash-attn-4 runs only on request. On Hopper, its releases up to 4.0.0b36 compute a wrong gradient of q at D 80 and
other head_dims (flash_attn_4.py says which and why), so it is refused there; its figures at D 80 include that
backward. At D 64, networks trained with it had the losses and samples of the other backends, but no test of it
has been seen to pass on a GPU yet, and its launcher takes more host time than cuDNN's.

Three ways to choose, in order of precedence:

1. `with pmf.ops.use_attention_backend("cudnn"):`, and
2. `PMF_ATTENTION=cudnn` in the environment ("auto", the default, is the table) select exactly that backend, or
   raise an `InputError` with the reason why it cannot run; they never fall back.
3. PyTorch's own switches: `torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION)` turns every
   FlashAttention off, so that cuDNN runs. They do not affect 1 and 2.

A compiled function follows 1 by recompiling for each backend; it reads 2 and 3 only while it is compiled.
A captured CUDA graph keeps the backend that it was captured with.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import logging
import operator
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from pmf.errors import require
from pmf.kernels import flash_attn_4
from pmf.kernels.gradients import differentiable_once
from pmf.private import SCALED_DOT_PRODUCT, constant, transform_level

log = logging.getLogger("pmf")

BACKENDS = ("flash_attn_4", "cudnn", "flash_attn", "flash", "efficient")
RECENT = ("cudnn", "flash_attn", "flash")
"""The order of preference on sm_90 and sm_100."""
ELSEWHERE = ("flash_attn", "flash", "cudnn")
"""The order of preference on other chips."""
UNGROUPED = ("efficient", "cpu")
"""Backends that do not take fewer key heads than query heads in every supported PyTorch."""
ALIGNMENT = 8
"""Rows of heads start at multiples of 8 values: 16 bytes in half precision, as all libraries require."""

_requests: dict[object, str] = {}
"""The backends that open `use`s request; threads may end them in any order."""
_requested: str | None = None
"""The last of them. Compilers guard a module's global, but not a ContextVar."""


@contextlib.contextmanager
def use(backend: str | None) -> Iterator[None]:
    """Use this one of `BACKENDS` for attention's value inside the context, in all threads; None changes nothing.

    Errors: `InputError` here on an unknown name, and in attention if the backend cannot run.
    """
    global _requested
    known = backend is None or backend in BACKENDS
    require(known, f"attention backend: expected one of {BACKENDS}, got {backend!r}")
    request = object()
    if backend is not None:
        _requests[request] = _requested = backend
    try:
        yield
    finally:
        _requests.pop(request, None)
        _requested = next(reversed(_requests.values()), None)


def _from_environment() -> str | None:
    name = os.environ.get("PMF_ATTENTION", "auto")
    known = name == "auto" or name in BACKENDS
    require(known, f"PMF_ATTENTION: expected one of {('auto', *BACKENDS)}, got {name!r}")
    return None if name == "auto" else name


@functools.cache
def flash_attn_2() -> Callable:
    """The function of flash-attn 2. Errors: those of the import; AttributeError if only flash-attn-4 is installed."""
    return importlib.import_module("flash_attn").flash_attn_func


@functools.cache
def _missing(load: Callable) -> str | None:
    """The reason why a package cannot be used, or None if it can."""
    try:
        load()
    except ModuleNotFoundError as error:
        own = (error.name or "").startswith("flash_attn")
        return "is not installed" if own else f"lacks the package {error.name}"
    except AttributeError:  # a flash_attn without __file__ is a namespace: only flash-attn-4 is installed
        alone = getattr(sys.modules.get("flash_attn"), "__file__", None) is None
        return "is not installed" if load is flash_attn_2 and alone else "has another interface in this release"
    except Exception as error:  # built for another PyTorch or CUDA: anything from OSError to AssertionError
        return f"does not import: {type(error).__name__}: {str(error).partition(chr(10))[0]}"
    return None


def obstacle(
    backend: str, device: str, dtype: str, capability: int, head_dim: int, lengths: bool = False
) -> str | None:
    """The reason why a backend cannot run, worded to follow its name, or None if it can."""
    if device != "cuda":
        return f"needs cuda tensors, got {device}"
    if backend == "efficient":
        return None
    if lengths:
        return "takes no key_lengths"
    if dtype not in ("torch.bfloat16", "torch.float16"):
        return f"takes bfloat16 and float16, got {dtype.removeprefix('torch.')}"
    if capability < 80:
        return f"needs sm_80 or later, got sm_{capability}"
    if backend == "flash_attn_4":
        return flash_attn_4.limit(capability, head_dim) or _missing(flash_attn_4.library)
    if backend == "flash_attn":
        return _missing(flash_attn_2)
    backends = torch.backends
    there = backends.cudnn.is_available() if backend == "cudnn" else backends.cuda.is_flash_attention_available()
    return None if there else "is not built into this PyTorch"


def _switched_off(backend: str) -> str | None:
    cuda = torch.backends.cuda
    enabled = cuda.cudnn_sdp_enabled() if backend == "cudnn" else cuda.flash_sdp_enabled()
    return None if enabled else "is turned off"


@functools.cache
def _capability(index: int | None) -> int:
    """Compute capability times ten; that of an A100 for fake tensors without a GPU, and for AMD's cards."""
    if torch.version.hip or not torch.cuda.is_available():
        return 80
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def decide(
    device: str, dtype: str, capability: int, head_dim: int, requested: str | None = None, lengths: bool = False
) -> tuple[str, str]:
    """The backend for a device type, dtype name, compute capability times ten and head_dim, and the reason.

    requested: one of `BACKENDS`, or None for the first that can run. lengths: whether there are `key_lengths`.
    Errors: `InputError` if the requested one cannot run.
    """
    if requested is not None:
        reason = obstacle(requested, device, dtype, capability, head_dim, lengths)
        require(reason is None, f"attention: backend {requested} was requested, but it {reason}")
        return requested, "requested"
    if device != "cuda":
        return "cpu", "tensors are on the CPU"
    if dtype == "torch.float32":
        return "efficient", "FlashAttention takes no float32"
    passed: list[str] = []
    for backend in RECENT if capability // 10 in (9, 10) else ELSEWHERE:
        reason = _switched_off(backend) or obstacle(backend, device, dtype, capability, head_dim, lengths)
        if reason is None:
            return backend, "; ".join(passed) or f"the first choice on sm_{capability}"
        passed.append(f"{backend} {reason}")
    return "efficient", "; ".join(passed)


def backend_of(device: str, index: int | None, dtype: str, head_dim: int, lengths: bool = False) -> tuple[str, str]:
    """`decide` for a device of this machine and the backend currently requested."""
    capability = _capability(index) if device == "cuda" else 0
    return decide(device, dtype, capability, head_dim, _requested or _from_environment(), lengths)


@functools.cache
def _report(backend: str, dtype: str, reason: str) -> None:
    log.info("attention of %s runs its primal on %s: %s", dtype, backend, reason)


@functools.cache
def _chosen(*place_and_switches) -> str:
    backend, reason = backend_of(*place_and_switches[:5])
    _report(backend, place_and_switches[2], reason)
    return backend


@constant
def choose(
    device: str, index: int | None, dtype: str, head_dim: int, requested: str | None, lengths: bool = False
) -> str:
    """The backend that `backend_of` chooses; log each choice once.

    requested: `_requested`, passed so that compilers notice its changes.
    """
    cuda = torch.backends.cuda
    switches = requested, os.environ.get("PMF_ATTENTION"), cuda.cudnn_sdp_enabled(), cuda.flash_sdp_enabled()
    return _chosen(device, index, dtype, head_dim, lengths, *switches)


def _starts_aligned(x: Tensor) -> bool:
    """Whether the data of x start at a multiple of 16 bytes; without data, judge by the storage offset."""
    plain = torch.func.debug_unwrap(x)
    start = plain.data_ptr() if type(plain) is Tensor else x.storage_offset() * x.element_size()
    return start % 16 == 0


def aligned(x: Tensor | None) -> Tensor | None:
    """Heads in a layout that every library accepts, copied if they have another.

    Channels are contiguous; samples, tokens and heads start at multiples of 8 values, and the data start at a
    multiple of 16 bytes. (The last cannot be checked while compiling, so it is assumed there.)
    """
    if x is None:
        return None
    sample, token, head, channel = x.stride()
    fits = channel == 1 and not (sample % ALIGNMENT or token % ALIGNMENT or head % ALIGNMENT)
    if fits and (torch.compiler.is_compiling() or _starts_aligned(x)):
        return x
    return x.clone(memory_format=torch.contiguous_format)


def within_reach(x: Tensor | None) -> Tensor | None:
    """`aligned` heads of which all tokens of a sample lie within 2^31 values, for offsets of 32 bits; copied if not.

    Errors: `InputError` for samples that are as large themselves.
    """
    if x is None:
        return None
    length, heads, width = x.shape[1:]
    fits = length * heads * width < 2**31
    require(fits, lambda: f"attention: a tangent takes samples of less than 2^31 values, got {list(x.shape)}")
    x = aligned(x)
    return x if length * x.stride(1) < 2**31 else x.clone(memory_format=torch.contiguous_format)


def _repeated(x: Tensor, heads: int) -> Tensor:
    """Keys or values [B, S, G, D] with `heads` heads, each repeated for the query heads that share it."""
    groups = x.shape[2]
    return x if groups == heads else x[:, :, :, None].expand(-1, -1, -1, heads // groups, -1).flatten(2, 3)


def _bias(q: Tensor, k: Tensor, key_lengths: Tensor, causal: bool) -> Tensor:
    """0 where a query reads a key, else -inf: [B, H, S_q, S_k], expanded from one head and, unless causal, one query.

    Rows start at multiples of 16 values, as the memory-efficient attention requires.
    """
    (samples, queries, heads, _), keys = q.shape, k.shape[1]
    i_k = torch.arange(-(-keys // 16) * 16, device=q.device)
    seen = i_k < key_lengths[:, None, None, None]
    if causal:
        seen = seen & (i_k <= torch.arange(queries, device=q.device)[:, None])
    bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill_(~seen, -torch.inf)
    return bias[..., :keys].expand(samples, heads, queries, keys)


def _by_pytorch(
    backend: str, q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool, key_lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`attention` by one of the backends that are PyTorch's."""
    bias = None if key_lengths is None else _bias(q, k, key_lengths, causal)
    if backend in UNGROUPED or torch.version.hip:
        k, v = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    options: dict[str, Any] = dict(scale=scale, is_causal=causal and bias is None)
    if backend == "cpu":
        options["attn_mask"] = bias
    asked = (bias, True) if backend in ("cudnn", "efficient") else ()  # return the log-sum-exp
    heads = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    o, lse, *_ = differentiable_once("attention", SCALED_DOT_PRODUCT[backend], heads, asked, **options)
    if asked:  # cuDNN's has a last dimension of one; the memory-efficient one is padded to 32 rows
        lse = lse.flatten(2)[:, :, : q.shape[1]]
    return o.transpose(1, 2).contiguous(), lse


def _without_library(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """`attention` of no queries, or with a single key."""
    k, v = _repeated(k, q.shape[2]), _repeated(v, q.shape[2])
    if q.numel() == 0:  # the formula keeps the autograd graph connected
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        return torch.einsum("bhqk,bkhd->bqhd", scores, v), scores.detach().sum(-1).float()
    scores = scale * (q.float() * k.float()).sum(-1, keepdim=True)  # the weights are one
    return scores.softmax(-1).to(v.dtype) * v, scores.detach()[..., 0].mT.contiguous()


def attention(
    q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False, key_lengths: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """o [B, S_q, H, D], contiguous, and the log-sum-exp of every row of scores, float32 [B, H, S_q].

    Args: q, k, v `aligned`; keys beyond `key_lengths` finite.
    Gradients come from the libraries' own autograd, and have no derivatives.
    """
    if q.numel() == 0 or k.shape[1] == 1:  # no library accepts the first, cuDNN not the second
        return _without_library(q, k, v, scale)
    head_dim = operator.index(q.shape[-1])  # makes compilers specialise on this size
    place = q.device.type, q.device.index, str(q.dtype), head_dim
    backend = choose(*place, _requested, key_lengths is not None)
    if backend == "flash_attn_4":
        return flash_attn_4.attention(q, k, v, scale, causal)
    if backend == "flash_attn" and not torch.compiler.is_compiling() and transform_level() is not None:
        requested = _requested or _from_environment()
        require(requested is None, "attention: backend flash_attn was requested, but it takes no torch.func transforms")
        backend = "flash" if torch.backends.cuda.is_flash_attention_available() else "efficient"
    if backend == "flash_attn":
        options: dict[str, Any] = dict(softmax_scale=scale, causal=causal, return_attn_probs=True)
        o, lse, *_ = differentiable_once("attention", flash_attn_2(), (q, k, v), **options)
        return o, lse
    return _by_pytorch(backend, q, k, v, scale, causal, key_lengths)
