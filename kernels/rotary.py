"""Per-head RMSNorm of q and k, rotation, and the split of packed q, k, v: `qk_norm_rope`.

    q = R(n(q) q_weight)        q_dot = R(n_dot q_weight), n_dot = rstd (x_dot - n mean(n x_dot))

and k likewise; v is unchanged. R rotates the adjacent pairs (a, b) of the tokens after the prefix by the
angles of their position, (a cos - b sin, a sin + b cos), and leaves the prefix unchanged, with cos 1 and sin 0.

Backward: g = R^-1(dq), dq_weight = sum of g n, and g q_weight goes through the norm, whose Jacobian is
symmetric: dx = rstd (g q_weight - n mean(n g q_weight)). Every program sums weight gradients in
registers and writes them to its row of a partial buffer; the rows are summed in a fixed order.

Saved: the packed qkv and the parameters. A head is in the registers of a few threads, so recomputing its
rstd costs less than storing it.

v and its tangent are views of qkv and qkv_dot. Attention accepts strides, so a copy would only cost 2 e of
6 e bytes per value of forward traffic, and the memory of v (qkv is saved for backward anyway). The gradient of v
is written to its place in dqkv, next to those of q and k, so that no third pass has to add them up.

Bytes moved per token of H D values of e bytes per part, the minimum except for the tables, which H heads share:
forward 4 H D e, twice that with a tangent, backward 8 H D e (q, k, three gradients; three gradients out).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration, sums
from pmf.kernels.heads import Heads, Steps
from pmf.kernels.registration import Chip
from pmf.kernels.tiles import load_vector, normalise, normalise_dot, rotate, row_mean
from pmf.pair import Dual

MAX_HEAD_DIM = 128
"""The widest head that a program keeps in registers."""


def unsupported(head_dim: int, tables_need_gradient: bool = False) -> str | None:
    """The reason why the kernels cannot take heads of this width or such tables, or None if they can."""
    if head_dim % 8 != 0 or head_dim > MAX_HEAD_DIM:
        return f"head_dim must be a multiple of 8 up to {MAX_HEAD_DIM}, got {head_dim}"
    return (
        'cos and sin take no gradient with impl="triton", got tables that require one' if tables_need_gradient else None
    )


@dataclass(frozen=True)
class HeadTile:
    """`tokens` times `heads` rows of `block` (padded) columns."""

    tokens: int
    heads: int
    block: int
    warps: int

    @property
    def rows(self) -> int:
        """Rows of the tile, one per head."""
        return self.tokens * self.heads


@functools.cache
def forward_tile(head_dim: int, item: int, chip: Chip) -> tuple[int, int, int]:
    """Heads of q, and as many of k, per program; the columns of a block; and warps.

    A head is split into blocks of 32 columns, all in the registers of the same few threads: 80 columns fill 96, not
    128, sums take few shuffles, and full blocks of `item` bytes per value are still read at least 64 bytes at a time.
    Heads are numbered across all tokens, so that tiles are full even if the number of heads is no power of two.
    """
    width = min(registration.power_of_two(head_dim), 32)
    return (1024, width, 1) if chip.interpreted else (2048 // (width * item), width, 4)


@functools.cache
def tile_of(heads: int, head_dim: int, chip: Chip) -> HeadTile:
    """The backward's tile: all heads of a token if they fit, several tokens if heads are few; 8 values per thread.

    q and k of a program's tokens rotate by the same angles, read from cache for every head.
    """
    block = registration.power_of_two(head_dim)
    together = min(registration.power_of_two(heads), 4096 // block)
    tokens = max((64 if chip.interpreted else 1024 // block) // together, 1)
    return HeadTile(tokens, together, block, 1 if chip.interpreted else max(tokens * together * block // 256, 1))


def backward_grid(tiles: int, tile: HeadTile, item: int, chip: Chip) -> tuple[int, int]:
    """One wave of programs, and the stages of the loop over a program's tiles.

    Registers (up to 128 per thread) limit a multiprocessor to 16 warps, too few to hide the latency of HBM,
    so the five operands (of `item` bytes per value) and both tables of a tile are prefetched.
    """
    if chip.interpreted:
        return min(tiles, 16), 1
    resident, values = 16 // tile.warps, tile.rows * tile.block
    return min(tiles, chip.processors * resident), chip.stages(resident, (5 * item + 4) * values, 4 * values)


@triton.jit
def _place(
    i_tile,
    tokens,
    H: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Tokens and heads of the rows of tile number i_tile, and the mask of the values in it."""
    groups: tl.constexpr = tl.cdiv(H, HEADS)
    i_r = tl.arange(0, ROWS)
    i_token = i_tile // groups * (ROWS // HEADS) + i_r // HEADS
    i_head = i_tile % groups * HEADS + i_r % HEADS
    mask = ((i_token < tokens) & (i_head < H))[:, None] & (tl.arange(0, BLOCK) < D)[None, :]
    return i_token, i_head, mask


@triton.jit
def _positions(i_token, length, prefix, HEADS: tl.constexpr, ROWS: tl.constexpr):
    """Each row's position after the prefix; a single one if all rows are heads of one token."""
    i_position = i_token % length - prefix
    if HEADS == ROWS:
        i_position = tl.max(i_position, 0, keep_dims=True)
    return i_position


@triton.jit
def _angles(p_cos, p_sin, i_position, D: tl.constexpr, BLOCK: tl.constexpr):
    """cos and sin [positions, BLOCK / 2] after the prefix, in their own dtype; 1 and 0 in the prefix."""
    i_pair = tl.arange(0, BLOCK // 2)
    mask = (i_position >= 0)[:, None] & (i_pair < D // 2)[None, :]
    i_angle = i_position[:, None] * (D // 2) + i_pair[None, :]
    return tl.load(p_cos + i_angle, mask=mask, other=1.0), tl.load(p_sin + i_angle, mask=mask, other=0.0)


@triton.jit
def _load(p_heads, i_head, m_head, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load heads that begin at i_head, in blocks of WIDTH columns."""
    blocks = ()  # type: tuple
    for i in tl.static_range(0, D, WIDTH):
        i_c = i + tl.arange(0, WIDTH)[None, :]
        blocks = blocks + (tl.load(p_heads + i_head[:, None] + i_c, mask=m_head[:, None] & (i_c < D), other=0.0),)
    return blocks


@triton.jit
def _load_table(p_table, i_position, other, D: tl.constexpr, WIDTH: tl.constexpr):
    """Load cos or sin at some positions, in float32 blocks of WIDTH / 2 columns; `other` in the prefix."""
    blocks = ()  # type: tuple
    for i in tl.static_range(0, D // 2, WIDTH // 2):
        i_pair = i + tl.arange(0, WIDTH // 2)[None, :]
        mask = (i_position >= 0)[:, None] & (i_pair < D // 2)
        b_angle = tl.load(p_table + i_position[:, None] * (D // 2) + i_pair, mask=mask, other=other)
        blocks = blocks + (b_angle.to(tl.float32),)
    return blocks


@triton.jit
def _mean_product(a, b, D: tl.constexpr):
    """The mean of a b over a head's columns, float32: [R, 1]."""
    b_sum = a[0].to(tl.float32) * b[0].to(tl.float32)
    for i in tl.static_range(1, len(a)):
        b_sum += a[i].to(tl.float32) * b[i].to(tl.float32)
    return row_mean(b_sum, D)


@triton.jit
def _normalised(x, eps, D: tl.constexpr):
    """n, and 1 / sqrt(mean(x^2) + eps)."""
    b_rstd = tl.rsqrt(_mean_product(x, x, D) + eps)  # may be inexact: no sum over tokens reads it
    n = ()  # type: tuple
    for i in tl.static_range(len(x)):
        n = n + (x[i].to(tl.float32) * b_rstd,)
    return n, b_rstd


@triton.jit
def _normalised_dot(n, b_rstd, x_dot, D: tl.constexpr):
    """n_dot = rstd (x_dot - n mean(n x_dot))."""
    b_mean = _mean_product(n, x_dot, D)
    n_dot = ()  # type: tuple
    for i in tl.static_range(len(n)):
        n_dot = n_dot + (b_rstd * (x_dot[i].to(tl.float32) - n[i] * b_mean),)
    return n_dot


@triton.jit
def _store_turned(p_heads, i_head, m_head, n, p_weight, cos, sin, D: tl.constexpr):
    """Store R(n weight) in the layout that `_load` reads."""
    WIDTH: tl.constexpr = n[0].shape[1]
    for i in tl.static_range(len(n)):
        i_c = i * WIDTH + tl.arange(0, WIDTH)
        b_y = rotate(n[i] * load_vector(p_weight, i_c, D), cos[i], sin[i]).to(p_heads.dtype.element_ty)
        tl.store(p_heads + i_head[:, None] + i_c[None, :], b_y, mask=m_head[:, None] & (i_c < D)[None, :])


@triton.jit
def _forward(
    p_qkv, p_qkv_dot, p_weights, p_tables, p_q, p_k, p_q_dot, p_k_dot,
    tokens, first_dot_token, length, prefix, step, dot_step, eps,
    H: tl.constexpr, D: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    """ROWS heads of q and of k; `step` and `dot_step` are the strides between tokens of qkv and of qkv_dot.

    p_weights: of q and k; p_tables: cos and sin.
    """
    i_row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    i_token, i_head = i_row // H, i_row % H * D
    mask = i_token < tokens
    i_in = i_token.to(tl.int64) * step + i_head
    i_out = i_token.to(tl.int64) * (H * D) + i_head
    # All loads come before the first sum over a row, so that they are in flight together.
    q = _load(p_qkv, i_in, mask, D, WIDTH)
    k = _load(p_qkv + H * D, i_in, mask, D, WIDTH)
    if p_qkv_dot is not None:
        i_token_dot = i_token - first_dot_token
        m_dot = mask & (i_token_dot >= 0)
        i_in_dot = i_token_dot.to(tl.int64) * dot_step + i_head
        q_dot = _load(p_qkv_dot, i_in_dot, m_dot, D, WIDTH)
        k_dot = _load(p_qkv_dot + H * D, i_in_dot, m_dot, D, WIDTH)
    i_position = i_token % length - prefix
    cos = _load_table(p_tables[0], i_position, 1.0, D, WIDTH)
    sin = _load_table(p_tables[1], i_position, 0.0, D, WIDTH)

    q, b_q_rstd = _normalised(q, eps, D)
    _store_turned(p_q, i_out, mask, q, p_weights[0], cos, sin, D)
    k, b_k_rstd = _normalised(k, eps, D)
    _store_turned(p_k, i_out, mask, k, p_weights[1], cos, sin, D)
    if p_qkv_dot is not None:
        if (tl.program_id(0) * ROWS + ROWS - 1) // H >= first_dot_token:
            i_out_dot = i_token_dot.to(tl.int64) * (H * D) + i_head
            q_n_dot = _normalised_dot(q, b_q_rstd, q_dot, D)
            _store_turned(p_q_dot, i_out_dot, m_dot, q_n_dot, p_weights[0], cos, sin, D)
            k_n_dot = _normalised_dot(k, b_k_rstd, k_dot, D)
            _store_turned(p_k_dot, i_out_dot, m_dot, k_n_dot, p_weights[1], cos, sin, D)


@triton.jit
def _turn_back(b_x, b_dy, b_weight, b_cos, b_sin, mask, eps, D: tl.constexpr):
    """dx of q or k, and the tile's terms of the weight's gradient."""
    b_n, _, b_rstd = normalise(b_x.to(tl.float32), mask, eps, D, False)
    b_g = rotate(b_dy.to(tl.float32), b_cos, -b_sin)
    return normalise_dot(b_n, b_rstd, b_g * b_weight, mask, D, False), b_g * b_n


@triton.jit
def _backward(
    p_qkv, p_weights, p_tables, p_d, p_dqkv, p_dweights, tokens, length, prefix, step, eps, tiles,
    STEPS: tl.constexpr, H: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process every num_programs-th tile.

    p_weights: of q and k; p_tables: cos and sin; p_d: `Heads` of gradients, STEPS their `Steps`; p_dweights: partial
    sums for both weights, or None.
    """
    i_c = tl.arange(0, BLOCK)
    b_q_weight, b_k_weight = load_vector(p_weights[0], i_c, D), load_vector(p_weights[1], i_c, D)
    b_sum_q = tl.zeros([ROWS, BLOCK], tl.float32)
    b_sum_k = tl.zeros([ROWS, BLOCK], tl.float32)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_token, i_head, mask = _place(i_tile, tokens, H, D, HEADS, ROWS, BLOCK)
        i_b, i_s = (i_token // length).to(tl.int64), (i_token % length).to(tl.int64)
        i_row = i_head[:, None] * D + i_c[None, :]
        i_in = i_token.to(tl.int64)[:, None] * step + i_row
        i_out = i_token.to(tl.int64)[:, None] * (3 * H * D) + i_row
        i_dq = (i_b * STEPS.q.sample + i_s * STEPS.q.token + i_head * STEPS.q.head)[:, None] + i_c[None, :]
        i_dk = (i_b * STEPS.k.sample + i_s * STEPS.k.token + i_head * STEPS.k.head)[:, None] + i_c[None, :]
        i_dv = (i_b * STEPS.v.sample + i_s * STEPS.v.token + i_head * STEPS.v.head)[:, None] + i_c[None, :]
        # All loads come before the first sum over a row, so that they are in flight together.
        b_q = tl.load(p_qkv + i_in, mask=mask, other=0.0)
        b_k = tl.load(p_qkv + H * D + i_in, mask=mask, other=0.0)
        b_dq = tl.load(p_d.q + i_dq, mask=mask, other=0.0)
        b_dk = tl.load(p_d.k + i_dk, mask=mask, other=0.0)
        b_dv = tl.load(p_d.v + i_dv, mask=mask, other=0.0)
        b_cos, b_sin = _angles(p_tables[0], p_tables[1], _positions(i_token, length, prefix, HEADS, ROWS), D, BLOCK)
        b_cos, b_sin = b_cos.to(tl.float32), b_sin.to(tl.float32)

        b_dq, b_terms = _turn_back(b_q, b_dq, b_q_weight, b_cos, b_sin, mask, eps, D)
        b_sum_q += b_terms
        tl.store(p_dqkv + i_out, b_dq.to(p_dqkv.dtype.element_ty), mask=mask)
        b_dk, b_terms = _turn_back(b_k, b_dk, b_k_weight, b_cos, b_sin, mask, eps, D)
        b_sum_k += b_terms
        tl.store(p_dqkv + H * D + i_out, b_dk.to(p_dqkv.dtype.element_ty), mask=mask)
        tl.store(p_dqkv + 2 * H * D + i_out, b_dv.to(p_dqkv.dtype.element_ty), mask=mask)
    i_sum = tl.program_id(0) * D + i_c
    if p_dweights is not None:
        tl.store(p_dweights[0] + i_sum, tl.sum(b_sum_q, 0), mask=i_c < D)
        tl.store(p_dweights[1] + i_sum, tl.sum(b_sum_k, 0), mask=i_c < D)


def _token_rows(qkv: Tensor) -> Tensor:
    """[B, S, 3, H, D] as [B S, 3 H D]; a view unless heads or samples have gaps between them."""
    return registration.as_rows(qkv.flatten(2))


@registration.operator
def qk_norm_rope_forward(
    qkv: Tensor, qkv_dot: Tensor | None,
    q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, prefix: int, eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """q, k, q_dot, k_dot."""
    samples, length, _, heads, head_dim = qkv.shape
    q, k = (qkv.new_empty(samples, length, heads, head_dim) for _ in range(2))
    q_dot = k_dot = dot_rows = None
    if qkv_dot is not None:
        q_dot, k_dot = (qkv.new_empty(qkv_dot.shape[0], length, heads, head_dim) for _ in range(2))
    if registration.shapes_only(qkv):
        return q, k, q_dot, k_dot
    rows = _token_rows(qkv)
    if qkv_dot is not None:
        dot_rows = _token_rows(qkv_dot)
    turned, width, warps = forward_tile(head_dim, qkv.element_size(), registration.chip(qkv.device))
    tokens = samples * length
    registration.launch(
        _forward, registration.cdiv(tokens * heads, turned),
        rows, dot_rows, (q_weight.contiguous(), k_weight.contiguous()), (cos.contiguous(), sin.contiguous()),
        q, k, q_dot, k_dot,
        tokens, registration.first_dot(samples, qkv_dot) * length, length, prefix,
        rows.stride(0), 0 if dot_rows is None else dot_rows.stride(0), eps,
        H=heads, D=head_dim, ROWS=turned, WIDTH=width, num_warps=warps,
        maxnreg=128 if head_dim < 96 else None,  # keeps 16 warps resident; wider heads would spill
    )  # fmt: skip
    return q, k, q_dot, k_dot


@registration.gradient_operator("qk_norm_rope")
def qk_norm_rope_backward(
    qkv: Tensor, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor,
    dq: Tensor, dk: Tensor, dv: Tensor, prefix: int, eps: float, need_weights: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """dqkv, dq_weight, dk_weight."""
    samples, length, _, heads, head_dim = qkv.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    if registration.shapes_only(qkv):
        dq_weight, dk_weight = (torch.empty_like(w) if need_weights else None for w in (q_weight, k_weight))
        return dqkv, dq_weight, dk_weight
    rows = _token_rows(qkv)
    gradients = Heads(*(registration.unit_step(d) for d in (dq, dk, dv)))
    chip = registration.chip(qkv.device)
    tile = tile_of(heads, head_dim, chip)
    tiles = registration.cdiv(samples * length, tile.tokens) * registration.cdiv(heads, tile.heads)
    programs, stages = backward_grid(tiles, tile, dq.element_size(), chip)
    weights = [q_weight, k_weight] if need_weights else []
    partials = qkv.new_empty(len(weights), programs, head_dim, dtype=torch.float32).unbind()
    registration.launch(
        _backward, programs,
        rows, (q_weight.contiguous(), k_weight.contiguous()), (cos.contiguous(), sin.contiguous()),
        gradients, dqkv, partials or None, samples * length, length, prefix, rows.stride(0), eps, tiles,
        STEPS=Heads(*(Steps(*d.stride()[:3]) for d in gradients)),
        H=heads, D=head_dim, HEADS=tile.heads, ROWS=tile.rows, BLOCK=tile.block, STAGES=stages,
        num_warps=tile.warps,
    )  # fmt: skip
    dq_weight, dk_weight = sums.add_up(partials, sums.Shares(1, programs, 1), weights) or (None, None)
    return dqkv, dq_weight, dk_weight


def _save(ctx, inputs, outputs):
    qkv, _, q_weight, k_weight, cos, sin, ctx.prefix, ctx.eps = inputs
    ctx.need_weights = ctx.needs_input_grad[2] or ctx.needs_input_grad[3]
    ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)


def _gradients(ctx, dq, dk, dv, *_):
    qkv, *parameters = ctx.saved_tensors
    given = (torch.zeros_like(qkv[:, :, i]) if d is None else d for i, d in enumerate((dq, dk, dv)))
    dqkv, *dweights = qk_norm_rope_backward(qkv, *parameters, *given, ctx.prefix, ctx.eps, ctx.need_weights)
    return dqkv, None, *dweights


def _with_v(inputs, outputs):
    """q, k, v, q_dot, k_dot. v is a view, but an output of the node, so backward gets its gradient with q's and k's."""
    q, k, *dots = outputs
    return q, k, inputs[0][:, :, 2], *dots


_qk_norm_rope = registration.differentiable(
    "QKNormRope", "qk_norm_rope", qk_norm_rope_forward, _save, _gradients, inputs=4, outputs=3, complete=_with_v
)


def qk_norm_rope(
    qkv: Dual, q_weight: Tensor, k_weight: Tensor, cos: Tensor, sin: Tensor, *, prefix_length: int, eps: float
) -> tuple[Dual, Dual, Dual]:
    """`pmf.reference.qk_norm_rope` by Triton."""
    q, k, v, q_dot, k_dot = _qk_norm_rope(*qkv, q_weight, k_weight, cos, sin, prefix_length, eps)
    v_dot = None if qkv.dot is None else qkv.dot.detach()[:, :, 2]
    return Dual(q, q_dot), Dual(k, k_dot), Dual(v, v_dot)
