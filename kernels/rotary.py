"""Norm of heads, rotation by their positions, and the split of packed q, k, v: `qk_norm_rope`, `norm_rope`.

    q = R(n(q) q_weight + q_bias)        q_dot = R(n_dot q_weight), n_dot = rstd (c_dot - n mean(n c_dot))

and k likewise; v is unchanged. n(x) = (x - mu) rstd as in norm.py: each head's, or that of all heads of a token
together, which one program then holds (`across`); without a norm, n(x) = x. R rotates the pairs (a, b) of the tokens
after the prefix by the angles of their position, (a cos - b sin, a sin + b cos), and leaves the prefix unchanged, with
cos 1 and sin 0. `norm_rope` is the same with q alone.

Backward: g = R^-1(dq), dq_weight = sum of g n, dq_bias = sum of g, and c = g q_weight goes through the norm, whose
Jacobian is symmetric: dx = rstd (c - n mean(n c)), c minus its mean for "layer". See rotary_backward.py.

Saved: the packed qkv and the parameters. A head is in the registers of a few threads, so recomputing its
statistics costs less than storing them.

v and its tangent are views of qkv and qkv_dot. Attention accepts strides, so a copy would only cost 2 e of
6 e bytes per value of forward traffic, and the memory of v (qkv is saved for backward anyway). The gradient of v
is written to its place in dqkv, next to those of q and k, so that no third pass has to add them up.

If q has more heads than k and v (grouped queries), the program of head h of q processes head h of k and v too, and
beyond their last head it reads and writes only q.

Bytes moved per token of H heads of q and G of k and v, D values of e bytes each: the minimum except for the tables,
which all heads share, and the partial sums: forward 2 (H + G) D e, twice that with a tangent, backward
(3 H + 5 G) D e (q, k and three gradients; three gradients out).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.registration import Chip
from pmf.kernels.rotary_backward import MOST_VALUES, heads_backward
from pmf.kernels.rotations import (
    Form,
    Tokens,
    contiguous,
    load_heads,
    load_table,
    load_vector_block,
    normalised,
    normalised_dot,
    store_block,
    table_rows,
    token_rows,
    widened,
)
from pmf.kernels.tiles import rotate
from pmf.pair import Dual

MAX_HEAD_DIM = 128
"""The widest head that a program keeps in registers."""


def unsupported(head_dim: int, tables_need_gradient: bool = False, heads_together: int = 1) -> str | None:
    """The reason why the kernels cannot take such heads or tables, or None if they can."""
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    most = MOST_VALUES // registration.power_of_two(head_dim)
    if heads_together > most:
        return f'across_heads takes up to {most} heads of {head_dim} with impl="triton", got {heads_together}'
    return (
        'cos and sin take no gradient with impl="triton", got tables that require one' if tables_need_gradient else None
    )


@functools.cache
def forward_tile(head_dim: int, item: int, chip: Chip, half: bool = False, together: int = 0) -> tuple[int, int, int]:
    """Heads of q, and as many of k, per program; the columns of a block; and warps.

    A head is split into blocks of 32 columns, all in the registers of the same few threads: 80 columns fill 96, not
    128, sums take few shuffles, and full blocks of `item` bytes per value are still read at least 64 bytes at a time.
    Heads are numbered across all tokens, so that tiles are full even if the number of heads is no power of two; but
    if statistics are of `together` heads, a program has those of one token. A thread loads 16 bytes of every block.
    """
    width = registration.power_of_two(head_dim // 2) if half else min(registration.power_of_two(head_dim), 32)
    if together:
        rows = registration.power_of_two(together)
        return rows, width, 1 if chip.interpreted else min(max(rows * width * item // 512, 1), 16)
    return (1024, width, 1) if chip.interpreted else (2048 // (width * item), width, 4)


def _registers(head_dim: int, half: bool) -> int | None:
    """At most 128 per thread, which keeps 16 warps resident; wider heads would spill."""
    return 128 if half or head_dim < 96 else None


@triton.jit
def _scaled(
    n, k: tl.constexpr, p_weight, p_bias, i_h, m_h, D: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Block k of n weight + bias."""
    WIDTH: tl.constexpr = n[0].shape[1]
    COUNT: tl.constexpr = len(n)
    b_y = n[k]
    if p_weight is not None:
        b_y = b_y * load_vector_block(p_weight, i_h, m_h, k, WIDTH, COUNT, D, FORM)
    if p_bias is not None:
        b_y = b_y + load_vector_block(p_bias, i_h, m_h, k, WIDTH, COUNT, D, FORM)
    return b_y


@triton.jit
def _store_turned(
    p_heads, i_head, m_head, n, p_weight, p_bias, cos, sin, i_h, m_h, D: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Store R(n weight + bias), a block (or two, whose values are pairs) at a time, to spare registers."""
    COUNT: tl.constexpr = len(n)
    PAIRED: tl.constexpr = FORM.half and len(cos) > 0
    for k in tl.static_range(COUNT // 2 if PAIRED else COUNT):
        b_a = _scaled(n, k, p_weight, p_bias, i_h, m_h, D, FORM)
        if PAIRED:
            b_b = _scaled(n, COUNT // 2 + k, p_weight, p_bias, i_h, m_h, D, FORM)
            store_block(p_heads, i_head, m_head, b_a * cos[k] - b_b * sin[k], k, COUNT, D, FORM)
            store_block(p_heads, i_head, m_head, b_a * sin[k] + b_b * cos[k], COUNT // 2 + k, COUNT, D, FORM)
        else:
            if len(cos) > 0:
                b_a = rotate(b_a, cos[k], sin[k])
            store_block(p_heads, i_head, m_head, b_a, k, COUNT, D, FORM)


@triton.jit
def _value(
    p_y, i_head, m_head, x, p_weight, p_bias, cos, sin, i_h, eps,
    heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Store the heads' values; return n and rstd (1 without a norm)."""
    b_rstd = 1.0
    if FORM.norm is None:
        n = widened(x)
    else:
        # rstd may be inexact: no sum over tokens reads it.
        n, b_rstd = normalised(x, m_head[:, None], eps, heads, D, FORM, False)
    _store_turned(p_y, i_head, m_head, n, p_weight, p_bias, cos, sin, i_h, m_head, D, FORM)
    return n, b_rstd


@triton.jit
def _tangent(
    p_y_dot, i_head, m_dot, n, b_rstd, x_dot, p_weight, cos, sin, m_head, i_h,
    heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr,
):  # fmt: skip
    """Store the heads' tangents."""
    n_dot = widened(x_dot) if FORM.norm is None else normalised_dot(n, b_rstd, x_dot, m_head[:, None], heads, D, FORM)
    _store_turned(p_y_dot, i_head, m_dot, n_dot, p_weight, None, cos, sin, i_h, m_head, D, FORM)


@triton.jit
def _forward(
    p_qkv, p_qkv_dot, p_weights, p_biases, p_tables, p_q, p_k, p_q_dot, p_k_dot,
    tokens, first_dot_token, step, dot_step, eps,
    H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS heads of q and of k; `step` and `dot_step` are the strides between tokens of qkv and of qkv_dot.

    tokens: `Tokens`; p_weights, p_biases: of q and k; p_tables: cos and sin.
    """
    if FORM.across:
        i_h = tl.arange(0, ROWS)
        i_token = tl.program_id(0) + tl.zeros([1], tl.int32)
        mask = i_h < H
    else:
        i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        i_token, i_h = i_row // H, i_row % H
        mask = i_token < tokens.total
    i_head = i_h * D
    m_k = mask & (i_h < G) if G < H else mask
    i_in = i_token.to(tl.int64) * step + i_head
    i_out = i_token.to(tl.int64) * (H * D) + i_head
    i_out_k = i_token.to(tl.int64) * (G * D) + i_head
    # All loads come before the first sum over a row, so that they are in flight together.
    q = load_heads(p_qkv, i_in, mask, D, WIDTH, FORM)
    if G > 0:
        k = load_heads(p_qkv + H * D, i_in, m_k, D, WIDTH, FORM)
    if p_qkv_dot is not None:
        i_token_dot = i_token - first_dot_token
        m_dot = mask & (i_token_dot >= 0)
        m_k_dot = m_k & (i_token_dot >= 0)
        i_in_dot = i_token_dot.to(tl.int64) * dot_step + i_head
        q_dot = load_heads(p_qkv_dot, i_in_dot, m_dot, D, WIDTH, FORM)
        if G > 0:
            k_dot = load_heads(p_qkv_dot + H * D, i_in_dot, m_k_dot, D, WIDTH, FORM)
    cos, sin = (), ()
    if p_tables is not None:
        i_table = table_rows(i_token, tokens, FORM)
        cos = load_table(p_tables[0], i_table, 1.0, D, WIDTH, FORM)
        sin = load_table(p_tables[1], i_table, 0.0, D, WIDTH, FORM)

    q, b_q_rstd = _value(p_q, i_out, mask, q, p_weights[0], p_biases[0], cos, sin, i_h, eps, H, D, FORM)
    if G > 0:
        k, b_k_rstd = _value(p_k, i_out_k, m_k, k, p_weights[1], p_biases[1], cos, sin, i_h, eps, G, D, FORM)
    if p_qkv_dot is not None:
        last_token = tl.program_id(0) if FORM.across else (tl.program_id(0) * ROWS + ROWS - 1) // H
        if last_token >= first_dot_token:
            i_out_dot = i_token_dot.to(tl.int64) * (H * D) + i_head
            _tangent(p_q_dot, i_out_dot, m_dot, q, b_q_rstd, q_dot, p_weights[0], cos, sin, mask, i_h, H, D, FORM)
            if G > 0:
                i_out_dot = i_token_dot.to(tl.int64) * (G * D) + i_head
                _tangent(p_k_dot, i_out_dot, m_k_dot, k, b_k_rstd, k_dot, p_weights[1], cos, sin, m_k, i_h, G, D, FORM)


def parts(qkv: Tensor, kv_heads: int) -> tuple[Tensor, ...]:
    """Views q, k, v of [B, S, 3, H, D], or of [B, S, H + 2 G, D]."""
    if qkv.ndim == 5:
        return qkv.unbind(2)
    return qkv.split([qkv.shape[2] - 2 * kv_heads, kv_heads, kv_heads], 2)


@registration.operator
def heads_forward(
    qkv: Tensor, qkv_dot: Tensor | None,
    q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None,
    kv_heads: int, prefix: int, eps: float, norm: str | None, across: bool, half: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, q_dot, k_dot; kv_heads 0: q alone."""
    samples, length, *_, head_dim = qkv.shape
    heads = qkv.shape[3] if qkv.ndim == 5 else qkv.shape[2] - 2 * kv_heads
    q = qkv.new_empty(samples, length, heads, head_dim)
    k = qkv.new_empty(samples, length, kv_heads, head_dim) if kv_heads else None
    q_dot = k_dot = dot_rows = None
    if qkv_dot is not None:
        q_dot = q.new_empty(qkv_dot.shape[0], length, heads, head_dim)
        k_dot = q.new_empty(qkv_dot.shape[0], length, kv_heads, head_dim) if kv_heads else None
    if registration.shapes_only(qkv):
        return q, k, q_dot, k_dot
    rows = token_rows(qkv)
    if qkv_dot is not None:
        dot_rows = token_rows(qkv_dot)
    form, tokens = Form(norm, across, half, cos is not None and cos.ndim == 3), samples * length
    chip = registration.chip(qkv.device)
    turned, width, warps = forward_tile(head_dim, qkv.element_size(), chip, half, heads if across else 0)
    registration.launch(
        _forward, tokens if across else registration.cdiv(tokens * heads, turned),
        rows, dot_rows, contiguous(q_weight, k_weight), contiguous(q_bias, k_bias),
        None if cos is None else contiguous(cos, sin), q, k, q_dot, k_dot,
        Tokens(tokens, length, prefix), registration.first_dot(samples, qkv_dot) * length,
        rows.stride(0), 0 if dot_rows is None else dot_rows.stride(0), eps,
        H=heads, G=kv_heads, D=head_dim, FORM=form, ROWS=turned, WIDTH=width, num_warps=warps,
        maxnreg=_registers(head_dim, half),
    )  # fmt: skip
    return q, k, q_dot, k_dot


def _save(ctx, inputs, outputs):
    qkv, _, *tensors, kv_heads, prefix, eps, norm, across, half = inputs
    ctx.options = kv_heads, prefix, eps, norm, across, half, list(ctx.needs_input_grad[2:6])
    ctx.save_for_backward(qkv, *tensors)


def _gradients(ctx, dq, dk, dv, *_):
    qkv, *tensors = ctx.saved_tensors
    like = parts(qkv, ctx.options[0])
    given = (torch.zeros_like(x) if d is None else d for x, d in zip(like, (dq, dk, dv), strict=True))
    dqkv, *dparameters = heads_backward(qkv, *tensors, *given, *ctx.options)
    return dqkv, None, *dparameters


def _gradients_of_one(ctx, dy, *_):
    x, *tensors = ctx.saved_tensors
    dx, *dparameters = heads_backward(x, *tensors, dy, None, None, *ctx.options)
    return dx, None, *dparameters


def _with_v(inputs, outputs):
    """q, k, v, q_dot, k_dot. v is a view, but an output of the node, so backward gets its gradient with q's and k's."""
    q, k, *dots = outputs
    return q, k, parts(inputs[0], inputs[8])[2], *dots


_qk_norm_rope = registration.differentiable(
    "QKNormRope", "qk_norm_rope", heads_forward, _save, _gradients, inputs=6, outputs=3, complete=_with_v
)
_norm_rope = registration.differentiable("NormRope", "norm_rope", heads_forward, _save, _gradients_of_one, inputs=6)


def qk_norm_rope(
    qkv: Dual, q_weight: Tensor | None, k_weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    *, q_bias: Tensor | None, k_bias: Tensor | None, num_kv_heads: int | None,
    norm: str | None, across_heads: bool, pairs: str, prefix_length: int, eps: float,
) -> tuple[Dual, Dual, Dual]:  # fmt: skip
    """`pmf.reference.qk_norm_rope` by Triton."""
    kv_heads = qkv.value.shape[3] if num_kv_heads is None else num_kv_heads
    q, k, v, q_dot, k_dot = _qk_norm_rope(
        *qkv, q_weight, k_weight, q_bias, k_bias, cos, sin,
        kv_heads, prefix_length, eps, norm, across_heads, pairs == "half",
    )  # fmt: skip
    v_dot = None if qkv.dot is None else parts(qkv.dot.detach(), kv_heads)[2]
    return Dual(q, q_dot), Dual(k, k_dot), Dual(v, v_dot)


def norm_rope(
    x: Dual, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None,
    *, bias: Tensor | None, norm: str | None, across_heads: bool, pairs: str, prefix_length: int, eps: float,
) -> Dual:  # fmt: skip
    """`pmf.reference.norm_rope` by Triton."""
    y, _, y_dot, _ = _norm_rope(
        *x, weight, None, bias, None, cos, sin, 0, prefix_length, eps, norm, across_heads, pairs == "half"
    )
    return Dual(y, y_dot)
