"""The functional ops: check the inputs, choose an implementation, compute value and tangent.

Every input that may have a tangent is a Tensor, a `pmf.Dual` or a pair (value, tangent). If any input is a Dual or a
pair, the results are Duals, otherwise Tensors. A tangent covers the last B_dot <= B samples; None is zero. The
value is recorded for backward, the tangent never is; if every tangent is None, the result's is None too and
costs nothing. In eager mode, dual tensors of `torch.func.jvp` and `torch.autograd.forward_ad` give dual tensors.
Sums and statistics are computed in float32 (float64 for float64 inputs). Bad input raises `InputError`, which names
the argument.

`impl` is "auto", "triton" or "reference"; None reads the environment variable PMF_IMPL, default
"auto": Triton kernels for CUDA tensors that they support, the reference otherwise. "triton" raises
if a kernel cannot run; it never falls back. The choice and its reason are logged once, at INFO.
"""

from __future__ import annotations

from pmf.dispatch import use_attention_backend as use_attention_backend
from pmf.ops.attention import attention as attention
from pmf.ops.heads import norm_rope as norm_rope
from pmf.ops.heads import qk_norm_rope as qk_norm_rope
from pmf.ops.heads import rope_tables as rope_tables
from pmf.ops.norms import norm_modulate as norm_modulate
from pmf.ops.norms import residual_norm_modulate as residual_norm_modulate
from pmf.ops.objective import pmf_objective as pmf_objective
from pmf.ops.objective import pmf_objective_fields as pmf_objective_fields
from pmf.ops.patches import patch_embed as patch_embed
from pmf.ops.patches import patchify as patchify
from pmf.ops.patches import unpatchify as unpatchify
from pmf.ops.pointwise import gelu as gelu
from pmf.ops.pointwise import scalar_features as scalar_features
from pmf.ops.pointwise import silu as silu
from pmf.ops.pointwise import swiglu as swiglu
