"""What happens to heads before attention: norm, rotation, split."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from pmf.errors import InputError
from pmf.inputs import Inputs, Pair
from pmf.pair import Dual


@overload
def qk_norm_rope(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    *, prefix_length: int = 0, eps: float = 1e-6, impl: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]: ...  # fmt: skip
@overload
def qk_norm_rope(
    qkv: Pair, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    *, prefix_length: int = 0, eps: float = 1e-6, impl: str | None = None,
) -> tuple[Dual, Dual, Dual]: ...  # fmt: skip
def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, *, prefix_length=0, eps=1e-6, impl=None):
    """Per-head RMSNorm of q and k, 2-D rotary positions, and the split: q, k, v [B, S, H, D] each.

    q = R(n(q) q_weight), k = R(n(k) k_weight), v unchanged. R rotates each adjacent pair (a, b) of the
    tokens after the prefix: (a cos - b sin, a sin + b cos).

    Args: qkv [B, S, 3, H, D]; q_weight, k_weight [D]; cos, sin [S - prefix_length, D / 2].
    Tangents: of qkv. Errors: D odd.
    """
    fixed = {"q_weight": q_weight, "k_weight": k_weight, "cos": cos, "sin": sin}
    inputs = Inputs("qk_norm_rope", {"qkv": qkv}, fixed)
    value = inputs.duals[0].value
    inputs.shape("qkv", value, None, None, 3, None, None)
    _, length, _, _, head_dim = value.shape
    if head_dim % 2 != 0:
        raise InputError(f"qk_norm_rope: head_dim must be even, got {head_dim}")
    if not 0 <= prefix_length <= length:
        raise InputError(f"qk_norm_rope: prefix_length must lie in [0, {length}], got {prefix_length}")
    inputs.shape("q_weight", q_weight, head_dim)
    inputs.shape("k_weight", k_weight, head_dim)
    inputs.shape("cos", cos, length - prefix_length, head_dim // 2)
    inputs.shape("sin", sin, length - prefix_length, head_dim // 2)
    run = inputs.implementation(impl, head_dim, cos.requires_grad or sin.requires_grad)
    q, k, v = run.qk_norm_rope(*inputs.duals, **fixed, prefix_length=prefix_length, eps=eps)
    return inputs.give(q), inputs.give(k), inputs.give(v)
