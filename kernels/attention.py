"""`attention`: a FlashAttention computes the value, one kernel the tangent.

    o = softmax(S) v,  S = scale q k^T, -inf where a query does not read   (kernels/flash.py)

    P     = exp(S - lse)                     S_dot = scale (q_dot k^T + q k_dot^T)
    H     = P * (S_dot - shift)              G     = P v_dot + H v
    o_dot = G - rowsum(H) o

The primal provides o and the log-sum-exp, so P is final as soon as it is computed: no online softmax, one
accumulator, and at most five products per tile (S; q_dot k^T and q k_dot^T if q and k have tangents, H v if
either has one; P v_dot if v has one). FlashAttention computes the value's backward; the tangent saves nothing.
A program visits the keys up to its sample's length, if causal up to its last query. What lies beyond a length is not
read; the value's backends read it, so k and v are cleared there. Query head h reads key head h // (H / G) in place.

Rounding. H is rounded to the dtype of v before it is multiplied. Two things keep that error small:

1. Subtracting a constant per row from S_dot does not change o_dot, because the rows of P sum to one.
   `shift` is the mean of S_dot over 16 keys spread evenly over those that the program visits. A common mode of the
   tangents (k_dot = c + small parts, as from a shift of the conditioning) adds the same q c to a whole
   row, so it cancels in S_dot - shift and does not affect the rounding of H. The mean of n random keys
   increases a row's spread by the factor sqrt(1 + 1 / n), 3% here; a single key would add 41% and might
   be an outlier, such as a prefix token; a mean weighted by P would need another pass. The cost is 16
   more keys in the products of S_dot. In float32, where sums round as coarsely as H, the 16 keys are
   weighted by the softmax of their own scores, closer to the row's mean.
2. rowsum(H) sums the rounded values, which also multiply v. An error e_j in H_j then enters o_dot as
   e_j (v_j - o) instead of e_j v_j: it cancels where attention is concentrated or values have a common part.

Sums and scores are float32; products of float32 inputs are float32 too, not TF32. For such inputs, an error of
one ulp in the log-sum-exp scales a row of P by more than the budget allows, so o_dot is divided by P's sum.

Bytes moved per sample and head: q, q_dot, o, o_dot once, 4 S_q D e; k, k_dot, v, v_dot once per tile of queries,
but from L2 after the first tile, because the programs of one head run side by side; lse 4 S_q.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import flash, registration
from pmf.kernels.heads import Heads, Steps
from pmf.kernels.registration import Chip
from pmf.kernels.tiles import product
from pmf.pair import Dual, tail, tangent_rows, without_padding

LOG2_E = tl.constexpr(1.4426950408889634)
FLOAT32_COLUMNS = tl.constexpr(16)
SHIFT_KEYS = tl.constexpr(16)
"""Number of keys whose mean is subtracted from S_dot: the smallest size of a matrix product."""


MAX_HEAD_DIM = 128
"""The widest head that the tangent's kernel keeps in registers."""


def _steps(heads: Tensor | None) -> Steps:
    """Strides of `aligned` heads in units of 8 values, so that Triton knows that 8 divides them; zero for None."""
    return Steps(0, 0, 0) if heads is None else Steps(*(step // flash.ALIGNMENT for step in heads.stride()[:-1]))


def unsupported(head_dim: int) -> str | None:
    """The reason why the tangent's kernel cannot take heads of this width, or None if it can."""
    if head_dim % 8 or not 0 < head_dim <= MAX_HEAD_DIM:
        return f'head_dim must be a multiple of 8 up to {MAX_HEAD_DIM} with impl="triton", got {head_dim}'
    return None


@dataclass(frozen=True)
class TangentTile:
    """Queries per program, and keys per iteration."""

    queries: int
    keys: int
    warps: int
    stages: int


HOPPER_TILES = (
    TangentTile(128, 32, 8, 3),
    TangentTile(64, 32, 4, 3),
    TangentTile(64, 64, 4, 3),
    TangentTile(128, 64, 8, 2),
)
"""Tiles worth comparing on Hopper; there `tangent_tile` chooses the first (2 stages at D 88, 96), second or last."""

_forced: ContextVar[TangentTile | None] = ContextVar("attention tangent's tile", default=None)


@contextlib.contextmanager
def tangent_with(tile: TangentTile) -> Iterator[None]:
    """Inside the context, use `tile` for this thread's attention tangents instead of `tangent_tile`'s; for benchmarks.

    Results agree up to rounding. A tile that does not fit the chip raises Triton's OutOfResources.
    """
    token = _forced.set(tile)
    try:
        yield
    finally:
        _forced.reset(token)


def split(head_dim: int) -> tuple[int, int]:
    """Two powers of two that cover head_dim, (64, 16) for 80; the second is 0 if a single one is as small."""
    first = 1 << (head_dim.bit_length() - 1)
    rest = head_dim - first
    second = max(registration.power_of_two(rest), 16) if rest else 0
    whole = max(registration.power_of_two(head_dim), 16)
    return (whole, 0) if first < 16 or first + second >= whole else (first, second)


def tangent_tile(head_dim: int, length: int, dtype: torch.dtype, chip: Chip, masked: bool = False) -> TangentTile:
    """128 queries, so that keys and values are read few times, and as many keys as fit with them.

    A program holds S and S_dot (queries x keys) and the accumulator (queries x D) in float32, and q, q_dot, P and H
    as operands. On Hopper, operands are in shared memory. On Ampere, they are in registers too: 255 per thread with
    16 keys at D 128 (sm_120 spills there, so it takes fewer queries). Blackwell (sm_100) has 512 columns of tensor
    memory in all, too few for 64 keys and two accumulators.
    Keys and values take 4 x keys x D values of shared memory per stage: three stages if they fit, and at most
    96 KB, except on Hopper and sm_100. In float32, registers hold 32 queries up to D 64 without masks, else 16.

    On Hopper up to D 96, two programs per processor with 32 keys beat one with 64; up to D 64, 64 queries win if
    128 would leave many rows of the last tile empty (measured on an H200 at D 64, 80 and 128, S 276 and 4096).
    """
    padded, generation = sum(split(head_dim)), chip.capability // 10
    if chip.interpreted:
        return TangentTile(128, 64, 1, 1)
    if dtype == torch.float32:
        return TangentTile(32 if padded <= 64 and not masked else 16, 16, 8, 1)
    if generation == 9:
        if padded > 96:
            return TangentTile(128, 64, 8, 2)
        wasted = -length % 128 - -length % 64
        if padded <= 64 and 16 * wasted > length:
            return TangentTile(64, 32, 4, 3)
        return TangentTile(128, 32, 8, 3 if padded <= 80 else 2)
    if padded <= 64 and not (generation == 10 and split(head_dim)[1]):
        return TangentTile(128, 64, 8, 3)
    if padded <= 80:
        return TangentTile(128, 32, 8, 3)
    if generation == 10:
        return TangentTile(64, 64, 8, 2)
    return TangentTile(32, 32, 8, 3) if generation == 12 and padded > 96 else TangentTile(128, 16, 8, 3)


@triton.jit
def _load(p_rows, i_row, m_row, step, first, WIDTH: tl.constexpr, D: tl.constexpr, WHOLE: tl.constexpr):
    """Load columns first to first + WIDTH of some rows; zero where m_row is false and, unless WHOLE, beyond D."""
    i_d = first + tl.arange(0, WIDTH)
    mask = m_row[:, None]
    if not WHOLE:
        mask = mask & (i_d < D)[None, :]
    return tl.load(p_rows + i_row[:, None] * step + i_d[None, :], mask=mask, other=0.0)


@triton.jit
def _load_parts(p_rows, i_row, m_row, step, D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr):
    """Load rows of D values in two parts; if D1 is 0, the second repeats the first."""
    b_0 = _load(p_rows, i_row, m_row, step, 0, D0, D, D0 <= D)
    b_1 = b_0
    if D1 > 0:
        b_1 = _load(p_rows, i_row, m_row, step, D0, D1, D, D0 + D1 <= D)
    return b_0, b_1


@triton.jit
def _scores(
    b_a0, b_a1, p_a, i_m, m_m, a_step, b_b0, b_b1, p_b, i_n, m_n, b_step, b_sum,
    D: tl.constexpr, D1: tl.constexpr,
):  # fmt: skip
    """b_sum + a b^T of two tiles of rows, given as loaded parts (b_) and by their place in memory (p_, i_, m_).

    Float32 operands are reloaded a few columns at a time: all columns would not fit into registers.
    """
    if p_a.dtype.element_ty == tl.float32:
        for i_d in range(0, D, FLOAT32_COLUMNS):
            b_a = _load(p_a, i_m, m_m, a_step, i_d, FLOAT32_COLUMNS, D, False)
            b_b = _load(p_b, i_n, m_n, b_step, i_d, FLOAT32_COLUMNS, D, False)
            b_sum = product(b_a, tl.trans(b_b), b_sum)
    else:
        b_sum = product(b_a0, tl.trans(b_b0), b_sum)
        if D1 > 0:
            b_sum = product(b_a1, tl.trans(b_b1), b_sum)
    return b_sum


@triton.jit
def _head_offset(steps, i_b, i_h):
    """The offset of a head of a sample; i_b and i_h are 64-bit."""
    return (i_b * steps.sample + i_h * steps.head) * 8


@triton.jit
def _tangent(
    p, p_dot, p_o, p_lse, p_lengths, p_o_dot, steps, dot_steps, out_steps,
    heads, group, length_q, length_k, scale,
    D: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, M: tl.constexpr, N: tl.constexpr, CAUSAL: tl.constexpr,
):  # fmt: skip
    """M queries of one head of one sample against the keys that they read, N at a time.

    p, p_dot: `Heads`; steps, dot_steps: the `Steps` of each, out_steps of o and o_dot; p_lengths: None, or numbers of
    keys of the samples; group: the number of query heads that share a key head.
    """
    MOVES: tl.constexpr = (p_dot.q is not None) or (p_dot.k is not None)
    FLOAT32: tl.constexpr = p.q.dtype.element_ty == tl.float32
    tiles = tl.cdiv(length_q, M)
    i_tile = tl.program_id(0) % tiles
    if CAUSAL:
        i_tile = tiles - 1 - i_tile  # the longest programs start first
    i_m = i_tile * M + tl.arange(0, M)
    i_bh = tl.program_id(0) // tiles
    i_b, i_h = (i_bh // heads).to(tl.int64), (i_bh % heads).to(tl.int64)
    i_g = (i_bh % heads // group).to(tl.int64)
    stop = length_k
    if p_lengths is not None:
        # Lengths on a GPU are not checked; these limits keep all reads inside of k and v.
        stop = tl.minimum(tl.maximum(tl.load(p_lengths + i_b), 1), length_k).to(tl.int32)
    if CAUSAL:
        stop = tl.minimum(stop, (i_tile + 1) * M)
        b_stop = tl.minimum(i_m + 1, stop)  # of every row
    m_m = i_m < length_q
    q_step, k_step, v_step = steps.q.token * 8, steps.k.token * 8, steps.v.token * 8
    q_dot_step, k_dot_step, v_dot_step = dot_steps.q.token * 8, dot_steps.k.token * 8, dot_steps.v.token * 8

    p_k = p.k + _head_offset(steps.k, i_b, i_g)
    p_q = p.q + _head_offset(steps.q, i_b, i_h)
    b_q0, b_q1 = _load_parts(p_q, i_m, m_m, q_step, D, D0, D1)
    b_lse = tl.load(p_lse + i_bh.to(tl.int64) * length_q + i_m, mask=m_m, other=0.0) * LOG2_E
    b_sum_p = tl.zeros([M], tl.float32)
    b_sum = tl.zeros([M], tl.float32)
    b_acc0 = tl.zeros([M, D0], tl.float32)
    b_acc1 = tl.zeros([M, D1 if D1 > 0 else 16], tl.float32)

    if MOVES:
        p_v = p.v + _head_offset(steps.v, i_b, i_g)
        i_few = tl.arange(0, SHIFT_KEYS) * stop // SHIFT_KEYS
        b_few = tl.zeros([M, SHIFT_KEYS], tl.float32)
        m_few = i_few >= 0
        if p_dot.q is not None:
            p_q_dot = p_dot.q + _head_offset(dot_steps.q, i_b, i_h)
            b_q_dot0, b_q_dot1 = _load_parts(p_q_dot, i_m, m_m, q_dot_step, D, D0, D1)
            b_few0, b_few1 = _load_parts(p_k, i_few, m_few, k_step, D, D0, D1)
            b_few = _scores(
                b_q_dot0, b_q_dot1, p_q_dot, i_m, m_m, q_dot_step,
                b_few0, b_few1, p_k, i_few, m_few, k_step, b_few, D, D1,
            )  # fmt: skip
        if p_dot.k is not None:
            p_k_dot = p_dot.k + _head_offset(dot_steps.k, i_b, i_g)
            b_few0, b_few1 = _load_parts(p_k_dot, i_few, m_few, k_dot_step, D, D0, D1)
            b_few = _scores(
                b_q0, b_q1, p_q, i_m, m_m, q_step,
                b_few0, b_few1, p_k_dot, i_few, m_few, k_dot_step, b_few, D, D1,
            )  # fmt: skip
        if FLOAT32:  # weighted as the keys are: the closer the shift is to the row's mean, the less cancels at the end
            b_few0, b_few1 = _load_parts(p_k, i_few, m_few, k_step, D, D0, D1)
            b_weight = tl.zeros([M, SHIFT_KEYS], tl.float32)
            b_weight = _scores(
                b_q0, b_q1, p_q, i_m, m_m, q_step, b_few0, b_few1, p_k, i_few, m_few, k_step, b_weight, D, D1
            )
            b_weight = b_weight * (scale * LOG2_E)
            b_weight = tl.exp2(b_weight - tl.max(b_weight, 1)[:, None])
            b_shift = tl.sum(b_few * b_weight, 1) * scale / tl.sum(b_weight, 1)
        else:
            b_shift = tl.sum(b_few, 1) * (scale / SHIFT_KEYS)
    if p_dot.v is not None:
        p_v_dot = p_dot.v + _head_offset(dot_steps.v, i_b, i_g)

    for i_s in range(0, stop, N):
        i_n = i_s + tl.arange(0, N)
        m_n = i_n < stop
        b_k0, b_k1 = _load_parts(p_k, i_n, m_n, k_step, D, D0, D1)
        b_s = tl.zeros([M, N], tl.float32)
        b_s = _scores(b_q0, b_q1, p_q, i_m, m_m, q_step, b_k0, b_k1, p_k, i_n, m_n, k_step, b_s, D, D1)
        m_p = m_n[None, :]
        if CAUSAL:
            m_p = i_n[None, :] < b_stop[:, None]
        b_p = tl.where(m_p, tl.exp2(b_s * (scale * LOG2_E) - b_lse[:, None]), 0.0)
        if FLOAT32:
            b_sum_p += tl.sum(b_p, 1)
        if p_dot.v is not None:
            b_v_dot0, b_v_dot1 = _load_parts(p_v_dot, i_n, m_n, v_dot_step, D, D0, D1)
            b_p_low = b_p.to(b_v_dot0.dtype)
            b_acc0 = product(b_p_low, b_v_dot0, b_acc0)
            if D1 > 0:
                b_acc1 = product(b_p_low, b_v_dot1, b_acc1)
        if MOVES:
            b_s_dot = tl.zeros([M, N], tl.float32)
            if p_dot.q is not None:
                b_s_dot = _scores(
                    b_q_dot0, b_q_dot1, p_q_dot, i_m, m_m, q_dot_step,
                    b_k0, b_k1, p_k, i_n, m_n, k_step, b_s_dot, D, D1,
                )  # fmt: skip
            if p_dot.k is not None:
                b_k_dot0, b_k_dot1 = _load_parts(p_k_dot, i_n, m_n, k_dot_step, D, D0, D1)
                b_s_dot = _scores(
                    b_q0, b_q1, p_q, i_m, m_m, q_step,
                    b_k_dot0, b_k_dot1, p_k_dot, i_n, m_n, k_dot_step, b_s_dot, D, D1,
                )  # fmt: skip
            b_v0, b_v1 = _load_parts(p_v, i_n, m_n, v_step, D, D0, D1)
            b_h = (b_p * (b_s_dot * scale - b_shift[:, None])).to(b_v0.dtype)
            b_sum += tl.sum(b_h.to(tl.float32), 1)
            b_acc0 = product(b_h, b_v0, b_acc0)
            if D1 > 0:
                b_acc1 = product(b_h, b_v1, b_acc1)

    if MOVES:
        p_o += _head_offset(out_steps[0], i_b, i_h)
        b_o0, b_o1 = _load_parts(p_o, i_m, m_m, out_steps[0].token * 8, D, D0, D1)
        b_acc0 -= b_sum[:, None] * b_o0.to(tl.float32)
        if D1 > 0:
            b_acc1 -= b_sum[:, None] * b_o1.to(tl.float32)
    if FLOAT32:
        b_acc0 = b_acc0 / b_sum_p[:, None]
        b_acc1 = b_acc1 / b_sum_p[:, None]
    p_o_dot += _head_offset(out_steps[1], i_b, i_h) + i_m[:, None] * (out_steps[1].token * 8)
    i_d = tl.arange(0, D0)[None, :]
    tl.store(p_o_dot + i_d, b_acc0.to(p_o_dot.dtype.element_ty), mask=m_m[:, None] & (i_d < D))
    if D1 > 0:
        i_d = D0 + tl.arange(0, D1)[None, :]
        tl.store(p_o_dot + i_d, b_acc1.to(p_o_dot.dtype.element_ty), mask=m_m[:, None] & (i_d < D))


@registration.operator
def attention_tangent(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_dot: Tensor | None,
    k_dot: Tensor | None,
    v_dot: Tensor | None,
    o: Tensor,
    lse: Tensor,
    scale: float,
    key_lengths: Tensor | None = None,
    causal: bool = False,
) -> Tensor:
    """o_dot, contiguous."""
    o_dot = o.new_empty(o.shape)
    if registration.shapes_only(q):
        return o_dot
    q, k, v, q_dot, k_dot, v_dot, o = (flash.within_reach(x) for x in (q, k, v, q_dot, k_dot, v_dot, o))
    samples, length_q, heads, head_dim = q.shape
    masked = causal or key_lengths is not None
    tile = _forced.get() or tangent_tile(head_dim, length_q, q.dtype, registration.chip(q.device), masked)
    widths = split(head_dim)
    registration.launch(
        _tangent, samples * heads * registration.cdiv(length_q, tile.queries),
        Heads(q, k, v), Heads(q_dot, k_dot, v_dot), o, lse.contiguous(), registration.unit_step(key_lengths), o_dot,
        Heads(_steps(q), _steps(k), _steps(v)), Heads(_steps(q_dot), _steps(k_dot), _steps(v_dot)),
        (_steps(o), _steps(o_dot)), heads, heads // max(k.shape[2], 1), length_q, k.shape[1], scale,
        D=head_dim, D0=widths[0], D1=widths[1], M=tile.queries, N=tile.keys, CAUSAL=causal,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return o_dot


def _save(ctx, inputs, outputs):
    """Save nothing: the operator is called without gradients."""


# Raises under forward-mode differentiation, like any Function without a rule for it.
_tangent_alone = registration.differentiable(
    "AttentionTangent", "attention", attention_tangent, _save, lambda ctx, _: (), inputs=0
)


def attention(
    q: Dual, k: Dual, v: Dual, *, scale: float, causal: bool = False, key_lengths: Tensor | None = None
) -> Dual:
    """`pmf.reference.attention`: the value by a FlashAttention, the tangent by Triton."""
    q_value = flash.aligned(q.value)
    k_value, v_value = (flash.aligned(without_padding(x.value, key_lengths)) for x in (k, v))
    o, lse = flash.attention(q_value, k_value, v_value, scale, causal, key_lengths)
    dots = (q.dot, k.dot, v.dot)
    rows = tangent_rows(dots)
    if rows is None:
        return Dual(o)
    # Dynamo does not accept a Function without differentiable outputs, and would not see that this one raises.
    tangent = attention_tangent if torch.compiler.is_compiling() else _tangent_alone
    with torch.no_grad():
        last = [tail(x, rows) for x in (q_value, k_value, v_value, o, lse)]
        lengths = None if key_lengths is None else tail(key_lengths, rows)
        return Dual(o, tangent(*last[:3], *dots, *last[3:], scale, lengths, causal))
