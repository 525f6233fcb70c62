"""The kernels by op name, and the inputs they cannot take. `pmf.reference` has the same functions."""

from __future__ import annotations

from collections.abc import Callable

import torch

from pmf.kernels import attention as _attention
from pmf.kernels import norm, patch, rotary
from pmf.kernels.attention import attention as attention
from pmf.kernels.norm import norm_modulate as norm_modulate
from pmf.kernels.norm import residual_norm_modulate as residual_norm_modulate
from pmf.kernels.objective import pmf_objective as pmf_objective
from pmf.kernels.patch import patch_embed as patch_embed
from pmf.kernels.pointwise import gelu as gelu
from pmf.kernels.pointwise import swiglu as swiglu
from pmf.kernels.rotary import norm_rope as norm_rope
from pmf.kernels.rotary import qk_norm_rope as qk_norm_rope

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LIMITS: dict[str, Callable[..., str | None] | None] = {
    "norm_modulate": norm.unsupported,
    "residual_norm_modulate": norm.unsupported,
    "qk_norm_rope": rotary.unsupported,
    "norm_rope": rotary.unsupported,
    "swiglu": None,
    "gelu": None,
    "attention": _attention.unsupported,
    "patch_embed": patch.unsupported,
    "pmf_objective": None,
}
"""For each op, a function that returns why its kernel cannot take some sizes; None if it takes all sizes."""


def unsupported(op: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...]) -> str | None:
    """The reason why the op's kernel cannot take these dtypes (of inputs and tangents) and sizes, or None if it can."""
    if op not in LIMITS:
        return 'impl="triton" has no kernel for it'
    limit = LIMITS[op]
    reason = limit(*sizes) if limit is not None and sizes else None
    if reason is not None:
        return reason
    for dtype in dtypes:
        if dtype not in DTYPES:
            return f'dtype must be float32, bfloat16 or float16 with impl="triton", got {dtype}'
    if torch.bfloat16 in dtypes and torch.float16 in dtypes:
        return "dtypes must not mix bfloat16 and float16, got both"
    return None
