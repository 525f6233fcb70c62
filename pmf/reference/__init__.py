"""The specification: every op in eager PyTorch, any dtype, any device, tangents as explicit formulas.

Each op is one function `<op>_dual(primals, tangents, ...) -> (value, tangent)`. The value is
recorded by autograd as usual; the tangent is computed without recording. A tangent of None is
zero, and so is the tangent of the result when every tangent is None. Tangents cover the last
B_dot samples of the batch. Sums and statistics are accumulated in float32, or in float64 for
float64 inputs.
"""

from pmf.reference.attention import attention_dual
from pmf.reference.embedding import scalar_features_dual, silu_dual
from pmf.reference.norm import norm_modulate_dual, residual_norm_modulate_dual
from pmf.reference.objective import pmf_objective, pmf_objective_fields
from pmf.reference.patch import patch_embed_dual, patchify, unpatchify
from pmf.reference.rotary import qk_norm_rope_dual, rope_tables
from pmf.reference.swiglu import swiglu_dual
from pmf.reference.tangent import tail, tangent_rows, total

__all__ = [
    "attention_dual",
    "norm_modulate_dual",
    "patch_embed_dual",
    "patchify",
    "pmf_objective",
    "pmf_objective_fields",
    "qk_norm_rope_dual",
    "residual_norm_modulate_dual",
    "rope_tables",
    "scalar_features_dual",
    "silu_dual",
    "swiglu_dual",
    "tail",
    "tangent_rows",
    "total",
    "unpatchify",
]
