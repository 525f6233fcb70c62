"""The primal of attention: a FlashAttention that also gives the log-sum-exp of every row.

Which library computes it is said by `decide`; its autograd is used as it is. All of them take and
give heads as [B, S, H, D] here, and the log-sum-exp as float32 [B, H, S_q], natural logarithm.

| backend      | where it is taken                                                            |
|--------------|------------------------------------------------------------------------------|
| `flash_attn` | CUDA, bfloat16 and float16, where the flash-attn package imports             |
| `flash`      | the same where it does not: PyTorch's FlashAttention                         |
| `cudnn`      | the same where PyTorch was built without FlashAttention, or it is turned off |
| `efficient`  | CUDA, float32: PyTorch's memory-efficient attention                          |
| `cpu`        | Triton's interpreter: PyTorch's FlashAttention for CPUs                      |

PyTorch's own switches count: `torch.nn.attention.sdpa_kernel(SDPBackend.CUDNN_ATTENTION)` turns both
kinds of FlashAttention off, so that cuDNN is taken.
"""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

import torch
from torch import Tensor

log = logging.getLogger("pmf")


@functools.cache
def _package() -> Callable | None:
    """flash-attn's function, or None where the package does not import."""
    try:
        return importlib.import_module("flash_attn").flash_attn_func
    except (ImportError, AttributeError):
        return None


@functools.cache
def _report(backend: str, dtype: str, reason: str) -> None:
    log.info("attention of %s runs its primal on %s: %s", dtype, backend, reason)


def decide(device: str, dtype: str) -> tuple[str, str]:
    """The backend of the table above for a device type and a dtype's name, and why."""
    cuda = torch.backends.cuda
    if device != "cuda":
        return "cpu", "tensors are on the CPU"
    if dtype == "torch.float32":
        return "efficient", "FlashAttention takes no float32"
    if cuda.flash_sdp_enabled() and _package() is not None:
        return "flash_attn", "the flash-attn package is installed"
    if cuda.flash_sdp_enabled() and cuda.is_flash_attention_available():
        return "flash", "the flash-attn package is not installed"
    return "cudnn", "PyTorch's FlashAttention is turned off or not built in"


@torch.compiler.assume_constant_result
def choose(device: str, dtype: str) -> str:
    """The backend that `decide` names; reports each choice once."""
    backend, reason = decide(device, dtype)
    _report(backend, dtype, reason)
    return backend


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """o [B, S_q, H, D], contiguous, and the log-sum-exp of every row of scores, float32 [B, H, S_q]."""
    if q.numel() == 0:  # no library takes it; the formula keeps the graph of gradients whole
        scores = torch.einsum("bqhd,bkhd->bhqk", q, k)
        return torch.einsum("bhqk,bkhd->bqhd", scores, v), scores.detach().sum(-1).float()
    backend = choose(q.device.type, str(q.dtype))
    if backend == "flash_attn":
        o, lse, _ = _package()(q, k, v, softmax_scale=scale, return_attn_probs=True)
        return o, lse
    aten, heads = torch.ops.aten, tuple(x.transpose(1, 2) for x in (q, k, v))
    if backend == "flash":
        outputs = aten._scaled_dot_product_flash_attention(*heads, scale=scale)
    elif backend == "cudnn":
        outputs = aten._scaled_dot_product_cudnn_attention(*heads, None, True, scale=scale)
    elif backend == "efficient":
        outputs = aten._scaled_dot_product_efficient_attention(*heads, None, True, scale=scale)
    else:
        outputs = aten._scaled_dot_product_flash_attention_for_cpu(*heads, scale=scale)
    # cuDNN's log-sum-exp has a last dimension of one; the memory-efficient one is padded to 32 rows.
    return outputs[0].transpose(1, 2).contiguous(), outputs[1].flatten(2)[:, :, : q.shape[1]]
