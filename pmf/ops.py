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

from typing import overload

import torch
from torch import Tensor

from pmf import reference
from pmf.autocast import autocast_dtype, product_dtype
from pmf.dispatch import use_attention_backend as use_attention_backend
from pmf.dual import Dual
from pmf.errors import InputError, readable
from pmf.inputs import Inputs, Moving, Pair
from pmf.reference import patchify as patchify
from pmf.reference import pmf_objective_fields as pmf_objective_fields
from pmf.reference import rope_tables as rope_tables
from pmf.reference import unpatchify as unpatchify


def _modulation(inputs: Inputs, name: str, modulation: Dual, samples: int, width: int) -> None:
    """Check that a modulation is [B, C], or [C] without tangent."""
    value, dot = modulation
    if value is not None and value.ndim == 2:
        inputs.shape(name, value, samples, width)
        return
    if dot is not None:
        raise InputError(f"{inputs.op}: {name} per channel takes no tangent; expand it to [B, C]")
    inputs.shape(name, value, width)


def _norm(inputs: Inputs, x: Tensor, weight: Tensor | None, scale: Dual, shift: Dual, kind: str) -> tuple[int, int]:
    """Check the inputs that every norm takes; return the number of samples and the width of x."""
    if x is None or x.ndim != 3:
        inputs.shape("x", x, None, None, None)
    samples, _, width = x.shape
    if weight is not None:
        inputs.shape("weight", weight, width)
    if scale.value is not None:
        _modulation(inputs, "scale", scale, samples, width)
    if shift.value is not None:
        _modulation(inputs, "shift", shift, samples, width)
    if kind not in ("rms", "layer"):
        raise InputError(f'{inputs.op}: kind must be "rms" or "layer", got {kind!r}')
    return samples, width


@overload
def norm_modulate(
    x: Tensor, weight: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def norm_modulate(
    x: Pair, weight: Tensor | None = None, scale: Moving | None = None, shift: Moving | None = None,
    *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def norm_modulate(x, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None):
    """Normalise over the last dimension, then modulate (adaLN): y = n(x) weight (1 + scale) + shift.

    n(x) = (x - mu) / sqrt(mean((x - mu)^2) + eps), with mu = mean(x) for kind "layer" and 0 for "rms".
    n_dot = (c_dot - n mean(n c_dot)) / sqrt(...), c_dot = x_dot - mean(x_dot) or x_dot.

    Args: x [B, S, C]; weight [C] or None (ones); scale, shift [B, C], [C] or None (zeros).
    Returns y [B, S, C] in the autocast dtype if autocast is on, else in that of x.
    Tangents: of x, and of scale and shift per sample.
    """
    inputs = Inputs("norm_modulate", {"x": x, "scale": scale, "shift": shift}, {"weight": weight})
    x, scale, shift = inputs.duals
    _, width = _norm(inputs, x.value, weight, scale, shift, kind)
    run = inputs.implementation(impl, width)
    x, scale, shift = inputs.duals
    y = run.norm_modulate(x, weight, scale, shift, kind=kind, eps=eps, out_dtype=product_dtype(x.value))
    return inputs.give(y)


@overload
def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def residual_norm_modulate(
    x: Pair, branch: Moving, gate: Moving, weight: Tensor | None = None, scale: Moving | None = None,
    shift: Moving | None = None, *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> tuple[Dual, Dual]: ...  # fmt: skip
def residual_norm_modulate(x, branch, gate, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None):
    """Gated residual, then `norm_modulate`: x_new = x + gate branch, y = n(x_new) weight (1 + scale) + shift.

    x_new_dot = x_dot + gate branch_dot + gate_dot branch.

    Args: x, branch [B, S, C]; gate [C] or [B, C]; the rest as in `norm_modulate`.
    Returns x_new in the dtype of x, and y.
    Tangents: of x and branch, and of gate, scale and shift per sample.
    """
    moving = {"x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift}
    inputs = Inputs("residual_norm_modulate", moving, {"weight": weight})
    x, branch, gate, scale, shift = inputs.duals
    samples, width = _norm(inputs, x.value, weight, scale, shift, kind)
    if branch.value is None or branch.value.shape != x.value.shape:
        inputs.shape("branch", branch.value, *x.value.shape)
    _modulation(inputs, "gate", gate, samples, width)
    run = inputs.implementation(impl, width)
    x, branch, gate, scale, shift = inputs.duals
    x_new, y = run.residual_norm_modulate(
        x, branch, gate, weight, scale, shift, kind=kind, eps=eps, out_dtype=product_dtype(x.value)
    )
    return inputs.give(x_new), inputs.give(y)


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


@overload
def attention(q: Tensor, k: Tensor, v: Tensor, *, scale: float | None = None, impl: str | None = None) -> Tensor: ...
@overload
def attention(q: Pair, k: Moving, v: Moving, *, scale: float | None = None, impl: str | None = None) -> Dual: ...
def attention(q, k, v, *, scale=None, impl=None):
    """Softmax attention over all keys: o = softmax(scale q k^T) v.

    P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T), H = P * S_dot,
    o_dot = P v_dot + H v - rowsum(H) o.

    Args: q [B, S_q, H, D]; k, v [B, S_k, H, D]; scale defaults to 1 / sqrt(D).
    Returns o [B, S_q, H, D]. Tangents: of q, k and v.
    """
    inputs = Inputs("attention", {"q": q, "k": k, "v": v})
    q, k, v = (dual.value for dual in inputs.duals)
    inputs.shape("q", q, None, None, None, None)
    samples, _, heads, head_dim = q.shape
    inputs.shape("k", k, samples, None, heads, head_dim)
    inputs.shape("v", v, *k.shape)
    if k.shape[1] == 0:
        raise InputError("attention: k must have at least one token, got 0")
    wanted = autocast_dtype(q.device.type)
    if wanted is not None and q.dtype != torch.float64:
        inputs.cast(wanted)
    if inputs.dtypes.count(inputs.dtypes[0]) != len(inputs.dtypes):
        raise InputError(f"attention: q, k, v and their tangents must have one dtype, got {inputs.dtypes}")
    run = inputs.implementation(impl, head_dim)
    return inputs.give(run.attention(*inputs.duals, scale=head_dim**-0.5 if scale is None else scale))


@overload
def swiglu(x: Tensor, *, impl: str | None = None) -> Tensor: ...
@overload
def swiglu(x: Pair, *, impl: str | None = None) -> Dual: ...
def swiglu(x, *, impl=None):
    """SwiGLU's pointwise half: silu(a) b for x = [a, b], and its tangent silu'(a) a_dot b + silu(a) b_dot.

    Args: x [B, S, 2F]. Returns [B, S, F]. Tangents: of x.
    """
    inputs = Inputs("swiglu", {"x": x})
    value = inputs.duals[0].value
    inputs.shape("x", value, None, None, None)
    if value.shape[-1] % 2 != 0:
        raise InputError(f"swiglu: x must have an even last dimension, got {value.shape[-1]}")
    run = inputs.implementation(impl)
    return inputs.give(run.swiglu(*inputs.duals))


@overload
def patch_embed(
    images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor,
    prefix: Tensor | None = None, *, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def patch_embed(
    images: Pair, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor,
    prefix: Moving | None = None, *, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def patch_embed(images, weight1, bias1, weight2, bias2, positions, prefix=None, *, impl=None):
    """Image to token sequence: [prefix, (patches weight1 + bias1) weight2 + bias2] + positions.

    Args: images [B, c, H, W]; weight1 [E, c, p, p], the p x p convolution of stride p; bias1 [E];
    weight2 [C, E, 1, 1]; bias2 [C]; positions [S, C]; prefix [B, P, C] or None (P = 0);
    S = P + (H / p) (W / p).
    Returns [B, S, C]. Tangents: of images and prefix.
    """
    fixed = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "positions": positions}
    inputs = Inputs("patch_embed", {"images": images, "prefix": prefix}, fixed)
    images, prefix = (dual.value for dual in inputs.duals)
    inputs.shape("images", images, None, None, None, None)
    batch, channels, height, width = images.shape
    inputs.shape("weight1", weight1, None, channels, None, None)
    inner, _, patch, _ = weight1.shape
    inputs.shape("weight1", weight1, inner, channels, patch, patch)
    if height % patch != 0 or width % patch != 0:
        sides = f"sides that are multiples of the patch size {patch}, got {height} x {width}"
        raise InputError(f"patch_embed: images must have {sides}")
    inputs.shape("bias1", bias1, inner)
    inputs.shape("weight2", weight2, None, inner, 1, 1)
    outer = weight2.shape[0]
    inputs.shape("bias2", bias2, outer)
    prefix_length = 0
    if prefix is not None:
        inputs.shape("prefix", prefix, batch, None, outer)
        prefix_length = prefix.shape[1]
    inputs.shape("positions", positions, prefix_length + (height // patch) * (width // patch), outer)
    run = inputs.implementation(impl, patch, inner)
    images, prefix = inputs.duals
    dtype = weight1.dtype if weight1.dtype == torch.float64 else product_dtype(weight1)
    return inputs.give(run.patch_embed(images, **fixed, prefix=prefix, dtype=dtype))


@overload
def scalar_features(s: Tensor) -> Tensor: ...
@overload
def scalar_features(s: Pair) -> Dual: ...
def scalar_features(s):
    """Sinusoidal features of scalars, [cos(s f), sin(s f)] with f_i = 10000^(-i / 128): [B] -> [B, 256]."""
    inputs = Inputs("scalar_features", {"s": s})
    inputs.shape("s", inputs.duals[0].value, None)
    return inputs.give(reference.scalar_features(*inputs.duals))


@overload
def silu(x: Tensor) -> Tensor: ...
@overload
def silu(x: Pair) -> Dual: ...
def silu(x):
    """silu(x) = x sigmoid(x), and its tangent (sigmoid + silu (1 - sigmoid)) x_dot: any shape [B, ...]."""
    inputs = Inputs("silu", {"x": x})
    if inputs.duals[0].value is None:
        inputs.shape("x", None)
    return inputs.give(reference.silu(*inputs.duals))


def pmf_objective(
    net_u: Tensor, net_v: Tensor, net_u_dot: Tensor | None, net_c: Tensor | None, net_n: Tensor | None,
    z: Tensor, x: Tensor, t: Tensor, h: Tensor, guidance: Tensor, null_index: Tensor,
    *, t_clip: float = 0.05, patch_size: int, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L_u, L_v per row: sums over pixels of (V - v_g)^2 and (v - v_g)^2 (arXiv 2601.22158).

    The docstring of `pmf/reference/objective.py` has the equations.

    Args: tokens of clean-image predictions in the layout of `patchify`, K = p * p * c values each:
    net_u, net_v [B, N, K], the two heads; net_u_dot [B_dot, N, K] or None, the tangent of net_u along
    (v_c, 1, 0); net_c [B_dot, N, K] or None, the v head of the conditional guidance pass on the last B_dot
    rows (earlier rows use net_v, which had the same inputs); net_n [B_n, N, K] or None, the v head on the
    null class; null_index [B] int64, the row of net_n, -1 for none. Images z = z_t and x [B, c, H, W].
    Scalars t, h = t - r and guidance = 1 - 1 / w' [B].
    Returns two float32 [B] (float64 for float64 inputs). Gradients reach only net_u and net_v; the
    losses have no tangents.
    """
    nets = dict(net_u=net_u, net_v=net_v, net_u_dot=net_u_dot, net_c=net_c, net_n=net_n)
    scalars = dict(t=t, h=h, guidance=guidance)
    inputs = Inputs("pmf_objective", {}, dict(z=z, x=x, **nets, **scalars))
    inputs.shape("z", z, None, None, None, None)
    inputs.shape("x", x, *z.shape)
    batch, channels, height, width = z.shape
    if height % patch_size != 0 or width % patch_size != 0:
        sides = f"sides that are multiples of the patch size {patch_size}, got {height} x {width}"
        raise InputError(f"pmf_objective: z must have {sides}")
    tokens = (height // patch_size * (width // patch_size), patch_size**2 * channels)
    for name, net in nets.items():
        if name in ("net_u", "net_v") or net is not None:
            inputs.shape(name, net, batch if name in ("net_u", "net_v") else None, *tokens)
    alike = net_c.shape == net_u_dot.shape if net_c is not None and net_u_dot is not None else net_c is net_u_dot
    if not alike:
        raise InputError("pmf_objective: net_c must cover the same rows as net_u_dot")
    if net_c is not None and net_c.shape[0] > batch:
        raise InputError(f"pmf_objective: net_c must have at most {batch} rows")
    for name, scalar in scalars.items():
        inputs.shape(name, scalar, batch)
    _check_null_index(inputs, null_index, batch, 0 if net_n is None else net_n.shape[0])
    run = inputs.implementation(impl)
    images = dict(z=z, x=x)
    return run.pmf_objective(**nets, **images, **scalars, null_index=null_index, t_clip=t_clip, patch_size=patch_size)


def _check_null_index(inputs: Inputs, null_index: Tensor, batch: int, rows: int) -> None:
    """Check null_index: int64 [B] on the inputs' device and, if `readable`, below net_n's number of rows."""
    if not isinstance(null_index, Tensor) or null_index.dtype != torch.int64:
        got = getattr(null_index, "dtype", null_index)
        raise InputError(f"pmf_objective: null_index must be int64, got {got}")
    inputs.shape("null_index", null_index, batch)
    if null_index.device != inputs.device:
        raise InputError(f"pmf_objective: null_index must be on {inputs.device}, got {null_index.device}")
    if readable(null_index) and not bool((null_index < max(rows, 1)).all()):
        raise InputError(f"pmf_objective: null_index must be below net_n's {rows} rows")
