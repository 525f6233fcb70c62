"""flash-attn-4 (FlashAttention on CuTe, for Hopper and Blackwell) as two operators.

    o, lse     = flash_attn_4_forward(q, k, v, scale, causal)          lse = log sum exp(scale q k^T), natural
    dq, dk, dv = flash_attn_4_backward(q, k, v, o, lse, do, scale, causal)

Compilers cannot trace its Python launcher, so an operator hides it: `torch.compile` with fullgraph
sees one opaque call. Saved for backward: q, k, v, o, lse. The log-sum-exp has no gradient here. Sums
are float32, products bfloat16 or float16.

The library compiles a kernel for every new dtype, head_dim and class of lengths, which takes 3 to 5
seconds each. Run one step before you capture a CUDA graph, as with every other kernel here. With
FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED=1, the library caches compiled kernels on disk.

Only `library` uses the package's names; those with an underscore may change between its releases.

On Hopper, releases up to 4.0.0b36 silently compute a wrong gradient of q for head_dims that round up to a multiple of
16 but not of 32: 8, 16, 40, 48, 72, 80, 104, 112. The backward kernel accumulates dq in tiles of tile_m values by
head_dim rounded up to 16; the kernels that clear these sums before it and read them after it round up to 32. So from
the second tile on (from 65 queries on), dq consists of sums of other channels and queries. A fix is proposed:
https://github.com/Dao-AILab/flash-attention/pull/2896. `limit` refuses those head_dims in every release, until
tests/kernels/test_flash.py finds one whose kernels agree.
"""

from __future__ import annotations

import functools
import importlib

import torch
from torch import Tensor

from pmf.kernels import registration

MODULE = "flash_attn.cute.interface"
FUNCTIONS = ("_flash_attn_fwd", "_flash_attn_bwd")


def limit(capability: int, head_dim: int) -> str | None:
    """What the package cannot do, or does wrong, worded to follow its name; None if it can be used."""
    if capability // 10 not in (9, 10):
        return f"is for sm_90 and sm_100, not sm_{capability}"
    if capability // 10 == 9 and -head_dim % 32 >= 16:
        return f"has a wrong gradient of q for head_dim {head_dim} on sm_{capability}"
    return None


@functools.cache
def library() -> tuple:
    """The package's forward and backward. Errors: those of the import; AttributeError on another release."""
    module = importlib.import_module(MODULE)
    return tuple(getattr(module, name) for name in FUNCTIONS)


@registration.operator
def flash_attn_4_forward(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """o, contiguous, and the log-sum-exp [B, H, S_q] in float32, computed by the package."""
    samples, length, heads, _ = q.shape
    o, lse = q.new_empty(q.shape), q.new_empty(samples, heads, length, dtype=torch.float32)
    if not registration.shapes_only(q):
        library()[0](q, k, v, softmax_scale=scale, causal=causal, return_lse=True, out=o, lse=lse)
    return o, lse


@registration.gradient_operator("attention")
def flash_attn_4_backward(
    q: Tensor, k: Tensor, v: Tensor, o: Tensor, lse: Tensor, do: Tensor, scale: float, causal: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv, contiguous, computed by the package; summed in a fixed order if deterministic algorithms are on."""
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    if not registration.shapes_only(q):
        fixed = torch.are_deterministic_algorithms_enabled()
        options = dict(softmax_scale=scale, causal=causal, deterministic=fixed)
        library()[1](q, k, v, o, do, lse, **options, dq=dq, dk=dk, dv=dv)
    return dq, dk, dv


def _save(ctx, inputs, outputs):
    q, k, v, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, *outputs)


def _gradients(ctx, do, *_):
    return flash_attn_4_backward(*ctx.saved_tensors, do, *ctx.options)


_flash_attn_4 = registration.differentiable(
    "FlashAttn4", "attention", flash_attn_4_forward, _save, _gradients, inputs=3
)


def attention(q: Tensor, k: Tensor, v: Tensor, scale: float, causal: bool = False) -> tuple[Tensor, Tensor]:
    """o [B, S_q, H, D] in the dtype of q, and the log-sum-exp of every row of scores, float32 [B, H, S_q]."""
    return _flash_attn_4(q, k, v, scale, causal)
