"""The functional ops: check the inputs, choose an implementation, compute value and tangent.

Every op comes as `<op>(...)` and as `<op>_dual(primals, tangents, ...)`. `primals` are the op's
tensors in order; `tangents` has the same length, None meaning zero. A tangent covers the last
B_dot <= B samples. The value is recorded for backward, the tangent never is; when every tangent
is None the result's tangent is None and costs nothing. Sums and statistics are taken in float32
(float64 for float64 inputs). Bad input raises `InputError`, which names the argument.

`impl` is "auto", "triton" or "reference"; None reads the environment variable PMF_IMPL, default
"auto": Triton kernels for CUDA tensors that they can take, the reference otherwise. "triton" raises
where a kernel cannot run; it never falls back. The choice and its reason are logged once, at INFO.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from pmf import dispatch, reference
from pmf.autocast import autocast_dtype
from pmf.errors import InputError, readable, require


def _cast(x: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if x is None else x.to(dtype)


def _shape(op: str, name: str, tensor: Tensor, *expected: int | None) -> None:
    """`tensor` has that shape; None stands for any size."""
    sizes = tensor.shape
    if sizes == expected:
        return
    matches = len(sizes) == len(expected)
    if matches:
        for want, size in zip(expected, sizes, strict=True):
            if want is not None and want != size:
                matches = False
    if not matches:  # the text is written here alone: compilers cannot write a size that they keep open
        wanted = ", ".join("any" if size is None else str(size) for size in expected)
        raise InputError(f"{op}: {name} must have shape [{wanted}], got {list(tensor.shape)}")


def _floating(op: str, name: str, tensor: Tensor, device: torch.device | None) -> None:
    """`tensor` is a floating tensor, and on that device."""
    if not (isinstance(tensor, Tensor) and tensor.is_floating_point()):
        raise InputError(f"{op}: {name} must be a floating tensor, got {getattr(tensor, 'dtype', tensor)}")
    if tensor.device != device:
        raise InputError(f"{op}: {name} must be on {device}, got {tensor.device}")


class _Input(NamedTuple):
    """One primal of an op."""

    name: str
    moves: bool
    """It takes a tangent."""
    optional: bool
    """It may be None."""


def _inputs(names: str) -> tuple[_Input, ...]:
    """The primals by name; those with a * take a tangent, those with a ? may be None."""
    return tuple(_Input(entry.rstrip("*?"), "*" in entry, "?" in entry) for entry in names.split())


def _check(op: str, inputs: tuple[_Input, ...], primals: tuple, tangents: tuple) -> None:
    """Floating primals on one device; as many tangents, each like the last rows of its primal, of one B_dot.

    Every op of every layer comes through here: no message is written before it is needed.
    """
    if len(primals) != len(inputs) or len(tangents) != len(inputs):
        kind, given = ("primals", primals) if len(primals) != len(inputs) else ("tangents", tangents)
        raise InputError(f"{op}: expected {len(inputs)} {kind}, got {len(given)}")
    device = getattr(primals[0], "device", None)
    rows = None
    for (name, moves, optional), primal, tangent in zip(inputs, primals, tangents, strict=True):
        if primal is not None or not optional:
            _floating(op, name, primal, device)
        if tangent is None:
            continue
        _floating(op, f"{name}'s tangent", tangent, device)
        if not moves:
            raise InputError(f"{op}: {name} takes no tangent, got one; expected None")
        if primal is None:
            raise InputError(f"{op}: {name} is absent, so its tangent must be None")
        sizes = primal.shape
        if len(sizes) < 2:
            raise InputError(f"{op}: {name} per channel takes no tangent; expand it to [B, C]")
        if rows is None and tangent.ndim > 0:
            rows = tangent.shape[0]
        _shape(op, f"{name}'s tangent", tangent, rows, *sizes[1:])
        if rows > sizes[0]:
            raise InputError(f"{op}: {name}'s tangent must have at most {sizes[0]} samples, got {rows}")


def _modulation(op: str, x: Tensor, **parameters: Tensor | None) -> None:
    """Each parameter is [C] or, except `weight`, [B, C]."""
    batch, _, width = x.shape
    for name, parameter in parameters.items():
        if parameter is None:
            continue
        per_sample = name != "weight" and parameter.ndim == 2
        _shape(op, name, parameter, *((batch, width) if per_sample else (width,)))


_NORM_MODULATE = _inputs("x* weight? scale*? shift*?")
_RESIDUAL_NORM_MODULATE = _inputs("x* branch* gate* weight? scale*? shift*?")
_QK_NORM_ROPE = _inputs("qkv* q_weight k_weight cos sin")
_ATTENTION = _inputs("q* k* v*")
_SWIGLU = _inputs("x*")
_PATCH_EMBED = _inputs("images* weight1 bias1 weight2 bias2 positions prefix*?")


def norm_modulate(x, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None) -> Tensor:
    """Normalise over the last dimension, then modulate (adaLN): y = n(x) weight (1 + scale) + shift.

    n(x) = (x - mu) / sqrt(mean((x - mu)^2) + eps), with mu = mean(x) for kind "layer" and 0 for "rms".

    Args: x [B, S, C]; weight [C] or None (ones); scale, shift [B, C], [C] or None (zeros).
    Returns y [B, S, C] in autocast's dtype where autocast is on, else in that of x.
    Tangents: of x, and of scale and shift per sample.
    """
    return norm_modulate_dual((x, weight, scale, shift), (None,) * 4, kind=kind, eps=eps, impl=impl)[0]


def norm_modulate_dual(primals, tangents, *, kind="rms", eps=1e-6, impl=None):
    """`norm_modulate` of (x, weight, scale, shift), and its tangent.

    n_dot = (c_dot - n mean(n c_dot)) / sqrt(...), c_dot = x_dot - mean(x_dot) or x_dot.
    """
    op = "norm_modulate"
    _check(op, _NORM_MODULATE, primals, tangents)
    x, weight, scale, shift = primals
    _shape(op, "x", x, None, None, None)
    _modulation(op, x, weight=weight, scale=scale, shift=shift)
    require(kind in ("rms", "layer"), f'{op}: kind must be "rms" or "layer", got {kind!r}')
    run = dispatch.choose("norm_modulate_dual", impl, primals + tangents, dispatch.width_limit(x))
    return run(primals, tangents, kind=kind, eps=eps, out_dtype=dispatch.activation_dtype(x))


def residual_norm_modulate(
    x, branch, gate, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None
) -> tuple[Tensor, Tensor]:
    """Gated residual, then `norm_modulate`: x_new = x + gate branch, y = n(x_new) weight (1 + scale) + shift.

    Args: x, branch [B, S, C]; gate [C] or [B, C]; the rest as in `norm_modulate`.
    Returns x_new in the dtype of x, and y.
    Tangents: of x and branch, and of gate, scale and shift per sample.
    """
    primals = (x, branch, gate, weight, scale, shift)
    return residual_norm_modulate_dual(primals, (None,) * 6, kind=kind, eps=eps, impl=impl)[0]


def residual_norm_modulate_dual(primals, tangents, *, kind="rms", eps=1e-6, impl=None):
    """`residual_norm_modulate` of (x, branch, gate, weight, scale, shift), and its tangents.

    x_new_dot = x_dot + gate branch_dot + gate_dot branch. Returns ((x_new, y), (x_new_dot, y_dot)).
    """
    op = "residual_norm_modulate"
    _check(op, _RESIDUAL_NORM_MODULATE, primals, tangents)
    x, branch, gate, weight, scale, shift = primals
    _shape(op, "x", x, None, None, None)
    _shape(op, "branch", branch, *x.shape)
    _modulation(op, x, gate=gate, weight=weight, scale=scale, shift=shift)
    require(kind in ("rms", "layer"), f'{op}: kind must be "rms" or "layer", got {kind!r}')
    run = dispatch.choose("residual_norm_modulate_dual", impl, primals + tangents, dispatch.width_limit(x))
    return run(primals, tangents, kind=kind, eps=eps, out_dtype=dispatch.activation_dtype(x))


def qk_norm_rope(qkv, q_weight, k_weight, cos, sin, *, prefix_length=0, eps=1e-6, impl=None):
    """Per-head RMSNorm of q and k, 2-D rotary positions, and the split: q, k, v [B, S, H, D] each.

    q = R(n(q) q_weight), k = R(n(k) k_weight), v unchanged. R turns each adjacent pair (a, b) of the
    tokens behind the prefix: (a cos - b sin, a sin + b cos).

    Args: qkv [B, S, 3, H, D]; q_weight, k_weight [D]; cos, sin [S - prefix_length, D / 2].
    Tangents: of qkv. Errors: D odd.
    """
    primals = (qkv, q_weight, k_weight, cos, sin)
    return qk_norm_rope_dual(primals, (None,) * 5, prefix_length=prefix_length, eps=eps, impl=impl)[0]


def qk_norm_rope_dual(primals, tangents, *, prefix_length=0, eps=1e-6, impl=None):
    """`qk_norm_rope` of (qkv, q_weight, k_weight, cos, sin), and its tangents.

    Returns ((q, k, v), (q_dot, k_dot, v_dot)).
    """
    op = "qk_norm_rope"
    _check(op, _QK_NORM_ROPE, primals, tangents)
    qkv, q_weight, k_weight, cos, sin = primals
    _shape(op, "qkv", qkv, None, None, 3, None, None)
    length, head_dim = qkv.shape[1], qkv.shape[4]
    require(head_dim % 2 == 0, f"{op}: head_dim must be even, got {head_dim}")
    require(
        0 <= prefix_length <= length,
        f"{op}: prefix_length must lie in [0, {length}], got {prefix_length}",
    )
    _shape(op, "q_weight", q_weight, head_dim)
    _shape(op, "k_weight", k_weight, head_dim)
    _shape(op, "cos", cos, length - prefix_length, head_dim // 2)
    _shape(op, "sin", sin, length - prefix_length, head_dim // 2)
    limit = None
    if head_dim % 8 != 0 or head_dim > dispatch.KERNEL_MAX_HEAD_DIM:
        limit = f"head_dim must be a multiple of 8 up to {dispatch.KERNEL_MAX_HEAD_DIM}, got {head_dim}"
    elif cos.requires_grad or sin.requires_grad:
        limit = 'cos and sin take no gradient with impl="triton", got tables that require one'
    run = dispatch.choose("qk_norm_rope_dual", impl, primals + tangents, limit)
    return run(primals, tangents, prefix_length=prefix_length, eps=eps)


def attention(q, k, v, *, scale=None, impl=None) -> Tensor:
    """Softmax attention over all keys: o = softmax(scale q k^T) v.

    Args: q [B, S_q, H, D]; k, v [B, S_k, H, D]; scale defaults to 1 / sqrt(D).
    Returns o [B, S_q, H, D]. Tangents: of q, k and v.
    """
    return attention_dual((q, k, v), (None,) * 3, scale=scale, impl=impl)[0]


def attention_dual(primals, tangents, *, scale=None, impl=None):
    """`attention` of (q, k, v), and its tangent.

    P = softmax(S), S_dot = scale (q_dot k^T + q k_dot^T), H = P * S_dot,
    o_dot = P v_dot + H v - rowsum(H) o.
    """
    op = "attention"
    _check(op, _ATTENTION, primals, tangents)
    q, k, v = primals
    _shape(op, "q", q, None, None, None, None)
    _shape(op, "k", k, q.shape[0], None, *q.shape[2:])
    _shape(op, "v", v, *k.shape)
    require(k.shape[1] > 0, f"{op}: k must have at least one token, got 0")
    wanted = autocast_dtype(q.device.type)
    if wanted is not None and q.dtype != torch.float64:
        primals, tangents = (tuple(_cast(x, wanted) for x in pair) for pair in (primals, tangents))
    dtypes = [t.dtype for t in (*primals, *tangents) if t is not None]
    if any(dtype != dtypes[0] for dtype in dtypes):
        raise InputError(f"{op}: q, k, v and their tangents must have one dtype, got {dtypes}")
    run = dispatch.choose("attention_dual", impl, primals + tangents, dispatch.attention_limit(q))
    return run(primals, tangents, scale=scale)


def swiglu(x, *, impl=None) -> Tensor:
    """SwiGLU's pointwise half: silu(a) b for x = [a, b].

    Args: x [B, S, 2F]. Returns [B, S, F]. Tangents: of x.
    """
    return swiglu_dual((x,), (None,), impl=impl)[0]


def swiglu_dual(primals, tangents, *, impl=None):
    """`swiglu` of (x,), and its tangent silu'(a) a_dot b + silu(a) b_dot."""
    op = "swiglu"
    _check(op, _SWIGLU, primals, tangents)
    (x,) = primals
    _shape(op, "x", x, None, None, None)
    require(x.shape[-1] % 2 == 0, f"{op}: x must have an even last dimension, got {x.shape[-1]}")
    return dispatch.choose("swiglu_dual", impl, primals + tangents)(primals, tangents)


def patch_embed(images, weight1, bias1, weight2, bias2, positions, prefix=None, *, impl=None) -> Tensor:
    """Image to token sequence: [prefix, (patches weight1 + bias1) weight2 + bias2] + positions.

    Args: images [B, c, H, W]; weight1 [E, c, p, p], the p x p convolution of stride p; bias1 [E];
    weight2 [C, E, 1, 1]; bias2 [C]; positions [S, C]; prefix [B, P, C] or None (P = 0);
    S = P + (H / p) (W / p).
    Returns [B, S, C]. Tangents: of images and prefix.
    """
    primals = (images, weight1, bias1, weight2, bias2, positions, prefix)
    return patch_embed_dual(primals, (None,) * 7, impl=impl)[0]


def patch_embed_dual(primals, tangents, *, impl=None):
    """`patch_embed` of (images, weight1, bias1, weight2, bias2, positions, prefix), and its tangent."""
    op = "patch_embed"
    _check(op, _PATCH_EMBED, primals, tangents)
    images, weight1, bias1, weight2, bias2, positions, prefix = primals
    _shape(op, "images", images, None, None, None, None)
    batch, channels, height, width = images.shape
    patch = weight1.shape[-1]
    _shape(op, "weight1", weight1, None, channels, patch, patch)
    require(
        height % patch == 0 and width % patch == 0,
        f"{op}: images must have sides that are multiples of the patch size {patch}, got {height} x {width}",
    )
    inner, outer = weight1.shape[0], weight2.shape[0]
    _shape(op, "bias1", bias1, inner)
    _shape(op, "weight2", weight2, outer, inner, 1, 1)
    _shape(op, "bias2", bias2, outer)
    prefix_length = 0
    if prefix is not None:
        _shape(op, "prefix", prefix, batch, None, outer)
        prefix_length = prefix.shape[1]
    _shape(op, "positions", positions, prefix_length + (height // patch) * (width // patch), outer)
    run = dispatch.choose("patch_embed_dual", impl, primals + tangents, dispatch.patch_limit(patch, inner))
    return run(primals, tangents)


def pmf_objective(
    net_u,
    net_v,
    net_u_dot,
    net_c,
    net_n,
    z,
    x,
    t,
    h,
    guidance,
    null_index,
    *,
    t_clip=0.05,
    patch_size,
    impl=None,
) -> tuple[Tensor, Tensor]:
    """L_u, L_v per row: sums over pixels of (V - v_g)^2 and (v - v_g)^2 (arXiv 2601.22158).

    The equations stand at the top of `pmf/reference/objective.py`.

    Args: tokens of clean-image predictions in the layout of `patchify`, K = p * p * c values each:
    net_u, net_v [B, N, K], the two heads; net_u_dot [B_dot, N, K] or None, the tangent of net_u along
    (v_c, 1, 0); net_c [B_dot, N, K] or None, guidance's conditional v head on the last B_dot rows (the
    rows before take net_v, whose inputs were the same); net_n [B_n, N, K] or None, the v head on the
    null class; null_index [B] int64, the row of net_n, -1 for none. Images z = z_t and x [B, c, H, W].
    Scalars t, h = t - r and guidance = 1 - 1 / w' [B].
    Returns two float32 [B] (float64 for float64 inputs). Gradients reach net_u and net_v alone.
    """
    op = "pmf_objective"
    _shape(op, "z", z, None, None, None, None)
    _shape(op, "x", x, *z.shape)
    batch, channels, height, width = z.shape
    require(
        height % patch_size == 0 and width % patch_size == 0,
        f"{op}: z must have sides that are multiples of the patch size {patch_size}, got {height} x {width}",
    )
    tokens = (height // patch_size * (width // patch_size), patch_size**2 * channels)
    for name, value in (("net_u", net_u), ("net_v", net_v)):
        _shape(op, name, value, batch, *tokens)
    for name, value in (("net_u_dot", net_u_dot), ("net_c", net_c), ("net_n", net_n)):
        if value is not None:
            _shape(op, name, value, None, *tokens)
    require(
        (net_u_dot is None) == (net_c is None) and (net_c is None or net_c.shape == net_u_dot.shape),
        f"{op}: net_c must cover the same rows as net_u_dot",
    )
    require(net_c is None or len(net_c) <= batch, f"{op}: net_c must have at most {batch} rows")
    for name, value in (("t", t), ("h", h), ("guidance", guidance), ("null_index", null_index)):
        _shape(op, name, value, batch)
    floats = dict(net_u=net_u, net_v=net_v, net_u_dot=net_u_dot, net_c=net_c, net_n=net_n, z=z, x=x)
    floats |= dict(t=t, h=h, guidance=guidance)
    for name, value in floats.items():
        if value is not None:
            _floating(op, name, value, z.device)
    require(null_index.dtype == torch.int64, f"{op}: null_index must be int64, got {null_index.dtype}")
    require(null_index.device == z.device, f"{op}: null_index must be on {z.device}, got {null_index.device}")
    if readable(null_index):
        rows = 0 if net_n is None else len(net_n)
        require(bool((null_index < max(rows, 1)).all()), f"{op}: null_index must be below net_n's {rows} rows")
    run = dispatch.choose("pmf_objective", impl, tuple(floats.values()))
    return run(
        net_u,
        net_v,
        net_u_dot,
        net_c,
        net_n,
        z,
        x,
        t,
        h,
        guidance,
        null_index,
        t_clip=t_clip,
        patch_size=patch_size,
    )


use_attention_backend = dispatch.use_attention_backend

# What has one implementation, in plain PyTorch: small tensors, layouts and helpers of tangents.
scalar_features_dual = reference.scalar_features_dual
silu_dual = reference.silu_dual
rope_tables = reference.rope_tables
patchify = reference.patchify
unpatchify = reference.unpatchify
pmf_objective_fields = reference.pmf_objective_fields
tail = reference.tail
tangent_rows = reference.tangent_rows
total = reference.total
