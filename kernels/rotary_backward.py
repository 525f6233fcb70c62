"""Gradients of `qk_norm_rope` and `norm_rope`; rotary.py has the equations.

Every program processes every num_programs-th tile, sums the gradients of weights and biases in registers, and writes
them to its row of partial buffers; the rows are summed in a fixed order.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration, sums
from pmf.kernels.heads import Heads, Steps
from pmf.kernels.registration import Chip
from pmf.kernels.rotations import (
    Form,
    Tokens,
    contiguous,
    load_table,
    load_vectors,
    normalised,
    normalised_dot,
    plus,
    side,
    table_rows,
    times,
    token_rows,
    turned,
    widened,
)

MOST_VALUES = 8192
"""The most (padded) values that a tile has if statistics are of all heads together."""


class Sums(NamedTuple):
    """Gradients of weights and biases, each or None; in kernels, pointers to partial sums."""

    q_weight: Any
    k_weight: Any
    q_bias: Any
    k_bias: Any


@dataclass(frozen=True)
class HeadTile:
    """`tokens` times `heads` rows; `block` columns, padded, of a head or, if halves form pairs, of each half."""

    tokens: int
    heads: int
    block: int
    halves: int
    warps: int

    @property
    def rows(self) -> int:
        """Rows of the tile, one per head."""
        return self.tokens * self.heads

    @property
    def values(self) -> int:
        """Values of the tile, padded."""
        return self.rows * self.block * self.halves


@functools.cache
def tile_of(heads: int, head_dim: int, chip: Chip, half: bool, across: bool, both: bool) -> HeadTile:
    """All heads of a token if they fit (or must), several tokens if heads are few; one head if its q or k comes alone
    and the number of heads is no power of two, so that no row is empty.

    Of `both` q and k, which rotate by the same angles, read from cache for every head, a thread has 8 values each.
    Of one of them it has 16: fewer warps wait for each other, and 16 bytes of each half are read at a time.
    """
    block, halves = registration.power_of_two(side(head_dim, half)), 2 if half else 1
    width = block * halves
    padded = registration.power_of_two(heads)
    if across:
        together, tokens = padded, 1
    else:
        together = 1 if padded != heads and not both else min(padded, 4096 // width)
        tokens = max((64 if chip.interpreted else 1024 // width) // together, 1)
    per_warp = 256 if both else 512
    warps = 1 if chip.interpreted else min(max(tokens * together * width // per_warp, 1), 16)
    return HeadTile(tokens, together, block, halves, warps)


def backward_grid(tiles: int, tile: HeadTile, operands: int, item: int, chip: Chip) -> tuple[int, int]:
    """One wave of programs, and the stages of the loop over a program's tiles.

    Registers (up to 128 per thread) limit a multiprocessor to 16 warps, too few to hide the latency of HBM,
    so the operands (of `item` bytes per value) and both tables of a tile are prefetched.
    """
    if chip.interpreted:
        return min(tiles, 16), 1
    resident, values = 16 // tile.warps, tile.values
    return min(tiles, chip.processors * resident), chip.stages(resident, (operands * item + 4) * values, 4 * values)


@triton.jit
def _turn_back(
    x, dy, weight, cos, sin, mask, eps, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """dx, and the tile's terms of the gradients of weight and bias."""
    if FORM.norm is not None:
        n, b_rstd = normalised(x, mask, eps, heads, D, FORM, True)
    g = widened(dy)
    if len(cos) > 0:
        g = turned(g, cos, _negative(sin), FORM)
    if FORM.norm is None:
        n, dx = g, g
    else:
        dn = times(g, weight) if len(weight) > 0 else g
        dx = normalised_dot(n, b_rstd, dn, mask, heads, D, FORM)
    return dx, times(g, n), g


@triton.jit
def _negative(x):
    y = ()  # type: tuple
    for i in tl.static_range(len(x)):
        y = y + (-x[i],)
    return y


@triton.jit
def _zeros(COUNT: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    y = ()  # type: tuple
    for _ in tl.static_range(COUNT):
        y = y + (tl.zeros([ROWS, BLOCK], tl.float32),)
    return y


@triton.jit
def _load(p_heads, i_head, mask, SIDE: tl.constexpr, FORM: tl.constexpr):
    """A block of whole heads or, if halves form pairs, one of each half."""
    blocks = (tl.load(p_heads + i_head, mask=mask, other=0.0),)  # type: tuple
    if FORM.half:
        blocks = blocks + (tl.load(p_heads + SIDE + i_head, mask=mask, other=0.0),)
    return blocks


@triton.jit
def _store(p_heads, i_head, mask, x, SIDE: tl.constexpr):
    """Store what `_load` reads."""
    for k in tl.static_range(len(x)):
        tl.store(p_heads + k * SIDE + i_head, x[k].to(p_heads.dtype.element_ty), mask=mask)


@triton.jit
def _store_sums(p_sum, x, i_h, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """Write the program's sums to its row."""
    BLOCK: tl.constexpr = x[0].shape[1]
    SIDE: tl.constexpr = D // 2 if FORM.half else D
    i_c = tl.arange(0, BLOCK)
    for k in tl.static_range(len(x)):
        i_column = k * SIDE + i_c
        if FORM.across:
            i_sum = tl.program_id(0) * (heads * D) + i_h[:, None] * D + i_column[None, :]
            tl.store(p_sum + i_sum, x[k], mask=(i_h < heads)[:, None] & (i_c < SIDE)[None, :])
        else:
            tl.store(p_sum + tl.program_id(0) * D + i_column, tl.sum(x[k], 0), mask=i_c < SIDE)


@triton.jit
def _backward(
    p_qkv, p_weights, p_tables, p_d, p_dqkv, p_sums, tokens, step, eps, tiles,
    STEPS: tl.constexpr, H: tl.constexpr, G: tl.constexpr, D: tl.constexpr, OUT: tl.constexpr, FORM: tl.constexpr,
    HEADS: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Process every num_programs-th tile: heads of q, and of k and v if p_d has their gradients.

    p_weights: of q and k; p_tables: cos and sin; p_d: `Heads` of gradients, STEPS their `Steps`; p_sums: `Sums`;
    tokens: `Tokens`; OUT: the stride between tokens of dqkv.
    """
    GROUPS: tl.constexpr = tl.cdiv(H, HEADS)
    COUNT: tl.constexpr = 2 if FORM.half else 1
    SIDE: tl.constexpr = D // COUNT
    i_c = tl.arange(0, BLOCK)
    i_r = tl.arange(0, ROWS)
    q_weight, k_weight = (), ()
    if p_weights[0] is not None and not FORM.across:
        q_weight = load_vectors(p_weights[0], i_r, i_r < H, D, BLOCK, COUNT, FORM)
    if p_weights[1] is not None:
        k_weight = load_vectors(p_weights[1], i_r, i_r < G, D, BLOCK, COUNT, FORM)
    sum_q = _zeros(COUNT, ROWS, BLOCK)
    sum_k = _zeros(COUNT, ROWS, BLOCK)
    sum_q_bias = _zeros(COUNT, ROWS, BLOCK)
    sum_k_bias = _zeros(COUNT, ROWS, BLOCK)
    for i_tile in tl.range(tl.program_id(0), tiles, tl.num_programs(0), num_stages=STAGES):
        i_token, i_h = i_tile // GROUPS * (ROWS // HEADS) + i_r // HEADS, i_tile % GROUPS * HEADS + i_r % HEADS
        mask = ((i_token < tokens.total) & (i_h < H))[:, None] & (i_c < SIDE)[None, :]
        m_k = mask & (i_h < G)[:, None] if G < H else mask
        i_b, i_s = (i_token // tokens.length).to(tl.int64), (i_token % tokens.length).to(tl.int64)
        i_head = i_h.to(tl.int64)
        i_row = i_h[:, None] * D + i_c[None, :]
        i_in = i_token.to(tl.int64)[:, None] * step + i_row
        i_out = i_token.to(tl.int64)[:, None] * OUT + i_row
        i_dq = (i_b * STEPS.q.sample + i_s * STEPS.q.token + i_head * STEPS.q.head)[:, None] + i_c[None, :]
        # All loads come before the first sum over a row, so that they are in flight together.
        q = _load(p_qkv, i_in, mask, SIDE, FORM)
        if p_d.k is not None:
            i_dk = (i_b * STEPS.k.sample + i_s * STEPS.k.token + i_head * STEPS.k.head)[:, None] + i_c[None, :]
            k = _load(p_qkv + H * D, i_in, m_k, SIDE, FORM)
        dq = _load(p_d.q, i_dq, mask, SIDE, FORM)
        if p_d.k is not None:
            dk = _load(p_d.k, i_dk, m_k, SIDE, FORM)
        if p_d.v is not None:
            i_dv = (i_b * STEPS.v.sample + i_s * STEPS.v.token + i_head * STEPS.v.head)[:, None] + i_c[None, :]
            dv = _load(p_d.v, i_dv, m_k, SIDE, FORM)
        cos, sin = (), ()
        if p_tables is not None:
            i_table = table_rows(i_token, tokens, FORM)
            if HEADS == ROWS:
                i_table = tl.max(i_table, 0, keep_dims=True)
            cos = load_table(p_tables[0], i_table, 1.0, D, BLOCK, FORM)
            sin = load_table(p_tables[1], i_table, 0.0, D, BLOCK, FORM)

        weight = q_weight
        if p_weights[0] is not None and FORM.across:  # as many as values: reloading them spares registers
            weight = load_vectors(p_weights[0], i_r, i_r < H, D, BLOCK, COUNT, FORM)
        dx, terms, bias_terms = _turn_back(q, dq, weight, cos, sin, mask, eps, H, D, FORM)
        if p_sums.q_weight is not None:
            sum_q = plus(sum_q, terms)
        if p_sums.q_bias is not None:
            sum_q_bias = plus(sum_q_bias, bias_terms)
        _store(p_dqkv, i_out, mask, dx, SIDE)
        if p_d.k is not None:
            dx, terms, bias_terms = _turn_back(k, dk, k_weight, cos, sin, m_k, eps, G, D, FORM)
            if p_sums.k_weight is not None:
                sum_k = plus(sum_k, terms)
            if p_sums.k_bias is not None:
                sum_k_bias = plus(sum_k_bias, bias_terms)
            _store(p_dqkv + H * D, i_out, m_k, dx, SIDE)
        if p_d.v is not None:
            _store(p_dqkv + (H + G) * D, i_out, m_k, dv, SIDE)
    if p_sums.q_weight is not None:
        _store_sums(p_sums.q_weight, sum_q, i_r, H, D, FORM)
    if p_sums.k_weight is not None:
        _store_sums(p_sums.k_weight, sum_k, i_r, G, D, FORM)
    if p_sums.q_bias is not None:
        _store_sums(p_sums.q_bias, sum_q_bias, i_r, H, D, FORM)
    if p_sums.k_bias is not None:
        _store_sums(p_sums.k_bias, sum_k_bias, i_r, G, D, FORM)


@registration.gradient_operator(lambda *arguments: "qk_norm_rope" if arguments[10] else "norm_rope")
def heads_backward(
    qkv: Tensor,
    q_weight: Tensor | None, k_weight: Tensor | None, q_bias: Tensor | None, k_bias: Tensor | None,
    cos: Tensor | None, sin: Tensor | None, dq: Tensor, dk: Tensor | None, dv: Tensor | None,
    kv_heads: int, prefix: int, eps: float, norm: str | None, across: bool, half: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dqkv, dq_weight, dk_weight, dq_bias, dk_bias; `needs` says which of the last four to compute."""
    _, length, heads, head_dim = dq.shape
    dqkv = torch.empty_like(qkv, memory_format=torch.contiguous_format)
    parameters = (q_weight, k_weight, q_bias, k_bias)
    trained = [p if need else None for p, need in zip(parameters, needs, strict=True)]
    if registration.shapes_only(qkv):
        return dqkv, *Sums(*(None if p is None else torch.empty_like(p) for p in trained))
    form, tables = Form(norm, across, half, cos is not None and cos.ndim == 3), contiguous(cos, sin)
    run = functools.partial(_run, tables=tables, length=length, prefix=prefix, eps=eps, form=form)
    rows, out = token_rows(qkv), token_rows(dqkv)
    d, weights = Heads(*map(registration.unit_step, (dq, dk, dv))), contiguous(q_weight, k_weight)
    if dk is None or not (half or across or kv_heads < heads):
        return dqkv, *run(rows, out, d, weights, trained)
    # Two blocks of a head, or weights for each head, take too many registers for both, and fewer heads of k would leave
    # threads idle: first q, and v, which is only copied, then k.
    of_q = run(rows, out, Heads(d.q, None, d.v), weights, [trained[0], None, trained[2], None])
    k, dk_out = (x[:, heads * head_dim :] for x in (rows, out))
    of_k = run(k, dk_out, Heads(d.k, None, None), (weights[1], None), [trained[1], None, trained[3], None])
    return dqkv, of_q.q_weight, of_k.q_weight, of_q.q_bias, of_k.q_bias


def _run(
    rows: Tensor, out: Tensor, d: Heads, weights: tuple, trained: Sequence[Tensor | None],
    *, tables: tuple, length: int, prefix: int, eps: float, form: Form,
) -> Sums:  # fmt: skip
    """Write the gradients of q and of what else `d` has to `out`; return those of the weights and biases `trained`."""
    samples, _, heads, head_dim = d.q.shape
    kv_heads = 0 if d.v is None else d.v.shape[2]
    chip = registration.chip(rows.device)
    tile = tile_of(heads, head_dim, chip, form.half, form.across, d.k is not None)
    tiles = registration.cdiv(samples * length, tile.tokens) * registration.cdiv(heads, tile.heads)
    operands = 2 * (d.k is not None) + (d.v is not None) + 2
    programs, stages = backward_grid(tiles, tile, operands, d.q.element_size(), chip)
    partials = [None if p is None else rows.new_empty(programs, p.shape[0], dtype=torch.float32) for p in trained]
    registration.launch(
        _backward, programs,
        rows, weights, None if tables[0] is None else tables, d, out, Sums(*partials),
        Tokens(samples * length, length, prefix), rows.stride(0), eps, tiles,
        STEPS=Heads(*(None if x is None else Steps(*x.stride()[:3]) for x in d)),
        H=heads, G=kv_heads, D=head_dim, OUT=out.stride(0), FORM=form,
        HEADS=tile.heads, ROWS=tile.rows, BLOCK=tile.block, STAGES=stages, num_warps=tile.warps,
        maxnreg=128 if d.k is None else None,
    )  # fmt: skip
    return _added_up(partials, programs, trained)


def _added_up(partials: Sequence[Tensor | None], programs: int, trained: Sequence[Tensor | None]) -> Sums:
    """The sums of the partial buffers that are there, those of equal width by one launch."""
    found: list[Tensor | None] = [None] * len(trained)
    for width in dict.fromkeys(p.shape[0] for p in trained if p is not None):
        chosen = [i for i, p in enumerate(trained) if p is not None and p.shape[0] == width]
        shares = sums.Shares(1, programs, 1)
        added = sums.add_up([partials[i] for i in chosen], shares, [trained[i] for i in chosen])
        for i, total in zip(chosen, added, strict=True):
            found[i] = total
    return Sums(*found)
