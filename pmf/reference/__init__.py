"""The specification: every op in eager PyTorch, any dtype, any device, tangents as explicit formulas.

Inputs that may have tangents, and all results, are `Dual`s; `pmf.kernels.library` has functions of the same
signatures. Autograd records the value as usual, but not the tangent. A tangent of None is zero; if every tangent is
None, so is the result's. Tangents cover the last B_dot samples of the batch. Sums and statistics are accumulated in
float32, or in float64 for float64 inputs.
"""

from pmf.reference.attention import attention
from pmf.reference.embedding import scalar_features, silu
from pmf.reference.norm import norm_modulate, residual_norm_modulate
from pmf.reference.objective import pmf_objective, pmf_objective_fields
from pmf.reference.patch import patch_embed, patchify, unpatchify
from pmf.reference.pointwise import gelu, swiglu
from pmf.reference.rotary import norm_rope, qk_norm_rope, rope_tables

__all__ = [
    "attention",
    "gelu",
    "norm_modulate",
    "norm_rope",
    "patch_embed",
    "patchify",
    "pmf_objective",
    "pmf_objective_fields",
    "qk_norm_rope",
    "residual_norm_modulate",
    "rope_tables",
    "scalar_features",
    "silu",
    "swiglu",
    "unpatchify",
]
