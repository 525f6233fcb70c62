"""Normalise and modulate, alone or after a gated residual: `norm_modulate`, `residual_norm_modulate`.

    x_new = x + gate branch                        x_new_dot = x_dot + gate branch_dot + gate_dot branch
    n     = (x_new - mu) rstd                      n_dot     = rstd (c_dot - n mean(n c_dot))
    y     = n weight (1 + scale) + shift           y_dot     = n_dot weight (1 + scale)
                                                               + n weight scale_dot + shift_dot

mu = 0 for "rms"; c_dot = x_new_dot, minus its mean for "layer". Without a branch, x_new = x. Everything
between loads and stores is float32; x_new is rounded to the dtype of x before it is normalised.

Backward, with f = weight (1 + scale) and dx_new the gradient of x_new from its other uses:

    dx = dx_new + rstd (c - n mean(n c)), c = f dy (minus its mean)      dbranch = gate dx
    A = sum over tokens of n dy:  dscale = weight A, dweight = sum over samples of (1 + scale) A
    dshift = sum of dy            dgate = sum of dx branch

Sums over tokens: see sums.py.

Saved: x_new (x without a branch), branch if gate needs a gradient, the parameters, and rstd (for
"layer" mu too) as float32: 4 or 8 bytes per row. Nothing is saved for tangents.

Bytes moved per row of C values, x of e_x bytes, y of e_y, branch of e_b; this is the minimum, except for
the partial sums (2% at pMF's shapes) and vectors per channel or sample, read once per tile:
    norm_modulate            forward C (e_x + e_y), twice that with a tangent
                             backward C (2 e_x + e_y)
    residual_norm_modulate   forward C (2 e_x + e_b + e_y), twice that with a tangent
                             backward C (3 e_x + 2 e_b + e_y), one e_b less if gate needs no gradient
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration, sums
from pmf.kernels.registration import Chip, RowTile
from pmf.kernels.tiles import load_vector, normalise, normalise_dot
from pmf.pair import Dual

MAX_WIDTH = 8192
"""The widest row that a program keeps in registers."""


class Modulations(NamedTuple):
    """Vectors per channel or per sample, and tangents; in kernels, pointers to them, or strides between samples."""

    gate: Any
    scale: Any
    shift: Any
    gate_dot: Any = None
    scale_dot: Any = None
    shift_dot: Any = None


class Parameters(NamedTuple):
    """Parameters, or sums for their gradients; in kernels, pointers."""

    gate: Any
    weight: Any
    scale: Any
    shift: Any


def unsupported(width: int) -> str | None:
    """The reason why the kernels cannot take rows of this width, or None if they can."""
    if width <= MAX_WIDTH:
        return None
    return f'width must be at most {MAX_WIDTH} with impl="triton", got {width}'


@functools.cache
def forward_tile(width: int, alone: bool, chip: Chip) -> RowTile:
    """8 values per thread and operand: one 16-byte load of bfloat16, two of float32.

    With a tangent and a branch, four operands are in flight, enough to hide the latency of HBM at half
    occupancy. If x comes `alone`, the tile has twice the rows, to keep more loads in flight.
    Rows wider than 4096 take more values per thread instead of more than 16 warps.
    """
    block = registration.power_of_two(width)
    if chip.interpreted:
        return RowTile(32, block, 1)
    warps = min(max(block // 256, 4), 16)
    return RowTile(max((512 if alone else 256) * warps // block, 1), block, warps)


@functools.cache
def backward_tile(width: int, alone: bool, row_bytes: int, chip: Chip) -> tuple[RowTile, int, int]:
    """The forward's tile, the number of programs, and the stages of the loop over a program's tokens.

    Every program writes up to four rows of partial sums, so there should be few programs: one wave, as many as are
    resident at once. Registers (up to 128 per thread) limit a multiprocessor to 16 warps, too few to hide the latency
    of HBM, so rows of `row_bytes` are prefetched into shared memory, which also holds scratch for layout conversions.
    """
    tile = forward_tile(width, alone, chip)
    if chip.interpreted:
        return tile, 16, 1
    resident = 16 // tile.warps
    values = tile.rows * tile.block
    stages = chip.stages(resident, values * row_bytes // width, 4 * values)
    # Float32 branches and gradients double a row: a third stage would cost registers and is not needed.
    return tile, chip.processors * resident, min(stages, 2) if row_bytes > 12 * width else stages


@triton.jit
def _forward(
    p_x, p_branch, p_x_dot, p_branch_dot, p, p_weight, p_x_new, p_y, p_x_new_dot, p_y_dot, p_stats,
    length, first_dot, eps,
    STEPS: tl.constexpr, C: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sample. p, STEPS: `Modulations`, as pointers and as strides between samples."""
    tiles = tl.cdiv(length, ROWS)
    i_b = (tl.program_id(0) // tiles).to(tl.int64)
    i_s = tl.program_id(0) % tiles * ROWS
    STATISTICS: tl.constexpr = 2 if LAYER else 1
    i_r, i_c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_r = i_s + i_r < length
    m_c = (i_c < C)[None, :]
    mask = m_r[:, None] & m_c
    i_tile = i_r[:, None] * C + i_c[None, :]
    i_row = i_b * length + i_s

    # Load tangents before the first sum over a row, so that all loads are in flight together.
    i_b_dot = i_b - first_dot
    i_row_dot = i_row - first_dot * length
    m_dot = mask & (i_b_dot >= 0)
    b_x = tl.load(p_x + i_row * C + i_tile, mask=mask, other=0.0).to(tl.float32)
    b_x_dot = tl.zeros([ROWS, BLOCK], tl.float32)
    if p_branch is not None:
        b_branch = tl.load(p_branch + i_row * C + i_tile, mask=mask, other=0.0)
    if p_x_dot is not None:
        b_x_dot = tl.load(p_x_dot + i_row_dot * C + i_tile, mask=m_dot, other=0.0).to(tl.float32)
    if p_branch_dot is not None:
        b_branch_dot = tl.load(p_branch_dot + i_row_dot * C + i_tile, mask=m_dot, other=0.0)
    if p_branch is not None:
        b_gate = load_vector(p.gate + i_b * STEPS.gate, i_c, C)
        b_x_new = (b_x + b_gate * b_branch.to(tl.float32)).to(p_x_new.dtype.element_ty)
        tl.store(p_x_new + i_row * C + i_tile, b_x_new, mask=mask)
        b_x = b_x_new.to(tl.float32)
        if p_branch_dot is not None:
            b_x_dot += b_gate * b_branch_dot.to(tl.float32)
        if p.gate_dot is not None:
            p_vector = p.gate_dot + i_b_dot * STEPS.gate_dot + i_c
            b_gate_dot = tl.load(p_vector, mask=(i_c < C) & (i_b_dot >= 0), other=0.0).to(tl.float32)
            b_x_dot += b_gate_dot[None, :] * b_branch.to(tl.float32)

    b_n, b_mean, b_rstd = normalise(b_x, m_c, eps, C, LAYER)
    p_row = p_stats + (i_row + i_r[:, None]) * STATISTICS
    tl.store(p_row, b_rstd, mask=m_r[:, None])
    if LAYER:
        tl.store(p_row + 1, b_mean, mask=m_r[:, None])

    # b_weighted is n weight, which scale_dot multiplies.
    b_weighted = b_n
    b_factor = tl.full([1, BLOCK], 1.0, tl.float32)
    if p_weight is not None:
        b_factor = load_vector(p_weight, i_c, C)
        b_weighted = b_n * b_factor
    b_y = b_weighted
    if p.scale is not None:
        b_one_plus = 1.0 + load_vector(p.scale + i_b * STEPS.scale, i_c, C)
        b_factor = b_factor * b_one_plus
        b_y = b_y * b_one_plus
    if p.shift is not None:
        b_y += load_vector(p.shift + i_b * STEPS.shift, i_c, C)
    tl.store(p_y + i_row * C + i_tile, b_y.to(p_y.dtype.element_ty), mask=mask)

    if p_y_dot is not None:
        if i_b >= first_dot:
            b_y_dot = tl.zeros([ROWS, BLOCK], tl.float32)
            if p_x_new_dot is not None:
                b_x_new_dot = b_x_dot.to(p_x_new_dot.dtype.element_ty)
                tl.store(p_x_new_dot + i_row_dot * C + i_tile, b_x_new_dot, mask=mask)
                b_x_dot = b_x_new_dot.to(tl.float32)
            if (p_x_dot is not None) or (p_x_new_dot is not None):
                b_y_dot = normalise_dot(b_n, b_rstd, b_x_dot, m_c, C, LAYER) * b_factor
            if p.scale_dot is not None:
                b_y_dot += b_weighted * load_vector(p.scale_dot + i_b_dot * STEPS.scale_dot, i_c, C)
            if p.shift_dot is not None:
                b_y_dot += load_vector(p.shift_dot + i_b_dot * STEPS.shift_dot, i_c, C)
            tl.store(p_y_dot + i_row_dot * C + i_tile, b_y_dot.to(p_y_dot.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    p_dy, p_dx_new, p_x_new, p_branch, p, p_stats, p_dx, p_dbranch, p_d, samples, length, share,
    STEPS: tl.constexpr, C: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the tokens, ROWS at a time; the sums of every segment go to its row of the partial buffers.

    p: `Parameters`; p_d: `Parameters` of partial sums; STEPS: `Modulations` of strides between samples.
    """
    i_program = tl.program_id(0)
    start = i_program * share
    stop = tl.minimum(start + share, samples * length)
    STATISTICS: tl.constexpr = 2 if LAYER else 1
    i_r, i_c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_c = (i_c < C)[None, :]
    i_tile = i_r[:, None] * C + i_c[None, :]

    for i_b in range(start // length, tl.minimum(stop // length, samples - 1) + 1):
        b_gate = tl.full([1, BLOCK], 1.0, tl.float32)
        b_factor = tl.full([1, BLOCK], 1.0, tl.float32)
        p_sample_scale = p.scale
        if p.gate is not None:
            b_gate = load_vector(p.gate + tl.cast(i_b, tl.int64) * STEPS.gate, i_c, C)
        if p.weight is not None:
            b_factor = load_vector(p.weight, i_c, C)
        if p.scale is not None:
            p_sample_scale = p.scale + tl.cast(i_b, tl.int64) * STEPS.scale
            b_factor = b_factor * (1.0 + load_vector(p_sample_scale, i_c, C))
        b_sum_ndy = tl.zeros([ROWS, BLOCK], tl.float32)
        b_sum_dy = tl.zeros([ROWS, BLOCK], tl.float32)
        b_sum_dgate = tl.zeros([ROWS, BLOCK], tl.float32)
        last = tl.minimum(stop, (i_b + 1) * length)
        for i_s in tl.range(tl.maximum(start, i_b * length), last, ROWS, num_stages=STAGES):
            i_row = tl.cast(i_s, tl.int64)
            m_r = (i_s + i_r < last)[:, None]
            mask = m_r & m_c
            # All loads come before the first sum over a row, so that they are in flight together.
            b_dy = tl.load(p_dy + i_row * C + i_tile, mask=mask, other=0.0)
            b_x = tl.load(p_x_new + i_row * C + i_tile, mask=mask, other=0.0)
            if p_dx_new is not None:
                b_dx_new = tl.load(p_dx_new + i_row * C + i_tile, mask=mask, other=0.0)
            if p_d.gate is not None:
                b_branch = tl.load(p_branch + i_row * C + i_tile, mask=mask, other=0.0)
            p_row = p_stats + (i_row + i_r[:, None]) * STATISTICS
            b_rstd = tl.load(p_row, mask=m_r, other=0.0)
            b_n, b_dy = b_x.to(tl.float32), b_dy.to(tl.float32)
            if LAYER:
                b_mean = tl.load(p_row + 1, mask=m_r, other=0.0)
                b_n = tl.where(mask, b_n - b_mean, 0.0)
            b_n = b_n * b_rstd
            b_dx = normalise_dot(b_n, b_rstd, b_dy * b_factor, m_c, C, LAYER)
            if p_dx_new is not None:
                b_dx += b_dx_new.to(tl.float32)
            tl.store(p_dx + i_row * C + i_tile, b_dx.to(p_dx.dtype.element_ty), mask=mask)
            if p_dbranch is not None:
                b_dbranch = (b_dx * b_gate).to(p_dbranch.dtype.element_ty)
                tl.store(p_dbranch + i_row * C + i_tile, b_dbranch, mask=mask)
            if (p_d.weight is not None) or (p_d.scale is not None):
                b_sum_ndy += b_n * b_dy
            if p_d.shift is not None:
                b_sum_dy += b_dy
            if p_d.gate is not None:
                b_sum_dgate += b_dx * b_branch.to(tl.float32)

        # Reload weight and scale: keeping them through the loop would cost registers.
        i_sum = tl.cast(i_program + i_b, tl.int64) * C + i_c
        if p_d.gate is not None:
            tl.store(p_d.gate + i_sum, tl.sum(b_sum_dgate, 0), mask=i_c < C)
        if p_d.weight is not None:
            b_dweight = b_sum_ndy
            if p.scale is not None:
                b_dweight = b_sum_ndy * (1.0 + load_vector(p_sample_scale, i_c, C))
            tl.store(p_d.weight + i_sum, tl.sum(b_dweight, 0), mask=i_c < C)
        if p_d.scale is not None:
            b_dscale = b_sum_ndy
            if p.weight is not None:
                b_dscale = b_sum_ndy * load_vector(p.weight, i_c, C)
            tl.store(p_d.scale + i_sum, tl.sum(b_dscale, 0), mask=i_c < C)
        if p_d.shift is not None:
            tl.store(p_d.shift + i_sum, tl.sum(b_sum_dy, 0), mask=i_c < C)


def _step(modulation: Tensor | None) -> int:
    return 0 if modulation is None or modulation.ndim == 1 else modulation.stride(0)


@registration.operator
def norm_forward(
    x: Tensor, branch: Tensor | None,
    gate: Tensor | None, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    x_dot: Tensor | None, branch_dot: Tensor | None,
    gate_dot: Tensor | None, scale_dot: Tensor | None, shift_dot: Tensor | None,
    layer: bool, eps: float, out_dtype: torch.dtype,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """x_new, y, x_new_dot, y_dot and the statistics [B, S, 1 or 2]."""
    samples, length, width = x.shape
    first_dot = registration.first_dot(samples, x_dot, branch_dot, gate_dot, scale_dot, shift_dot)
    moves = x_dot is not None or branch_dot is not None or gate_dot is not None
    x_new = x_new_dot = y_dot = None
    if branch is not None:
        x_new = x.new_empty(samples, length, width)
        if moves:
            x_new_dot = x.new_empty(samples - first_dot, length, width)
    if moves or scale_dot is not None or shift_dot is not None:
        y_dot = x.new_empty(samples - first_dot, length, width, dtype=out_dtype)
    y = x.new_empty(samples, length, width, dtype=out_dtype)
    stats = x.new_empty(samples, length, 2 if layer else 1, dtype=torch.float32)
    if registration.shapes_only(x):
        return x_new, y, x_new_dot, y_dot, stats
    streams = [None if s is None else s.contiguous() for s in (x, branch, x_dot, branch_dot)]
    weight = registration.unit_step(weight)
    modulations = [registration.unit_step(m) for m in (gate, scale, shift, gate_dot, scale_dot, shift_dot)]
    tile = forward_tile(width, branch is None and x_dot is None, registration.chip(x.device))
    registration.launch(
        _forward, samples * registration.cdiv(length, tile.rows),
        *streams, Modulations(*modulations), weight, x_new, y, x_new_dot, y_dot, stats, length, first_dot, eps,
        STEPS=Modulations(*[_step(m) for m in modulations]), C=width, LAYER=layer, ROWS=tile.rows, BLOCK=tile.block,
        num_warps=tile.warps,
    )  # fmt: skip
    return x_new, y, x_new_dot, y_dot, stats


@registration.gradient_operator(
    lambda dy, dx_new, x_new, branch, gate, *_: "norm_modulate" if gate is None else "residual_norm_modulate"
)
def norm_backward(
    dy: Tensor, dx_new: Tensor | None, x_new: Tensor, branch: Tensor | None,
    gate: Tensor | None, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    stats: Tensor, branch_dtype: torch.dtype, layer: bool, needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch, dgate, dweight, dscale, dshift; `needs` says which of the last four to compute."""
    parameters = Parameters(gate, weight, scale, shift)
    samples, length, width = x_new.shape
    dx = x_new.new_empty(samples, length, width)
    dbranch = None if gate is None else x_new.new_empty(samples, length, width, dtype=branch_dtype)
    trained = [p for p, need in zip(parameters, needs, strict=True) if need]
    if registration.shapes_only(dy):
        return dx, dbranch, *_placed([p.new_empty(p.shape) for p in trained], needs)
    dy, x_new = dy.contiguous(), x_new.contiguous()
    dx_new, branch = (None if t is None else t.contiguous() for t in (dx_new, branch))
    gate, weight, scale = (registration.unit_step(p) for p in (gate, weight, scale))
    row_bytes = width * sum(s.element_size() for s in (dy, x_new, dx_new, branch) if s is not None)
    tile, programs, stages = backward_tile(width, gate is None, row_bytes, registration.chip(dy.device))
    per_sample = any(p is not None and p.ndim == 2 for p in (gate, scale, shift))
    shares = sums.divide(samples, length, per_sample, programs, tile.rows)
    partials = x_new.new_empty(len(trained), shares.segments, width, dtype=torch.float32).unbind()
    registration.launch(
        _backward, shares.programs,
        dy, dx_new, x_new, branch, Parameters(gate, weight, scale, None), stats, dx, dbranch,
        _placed(partials, needs),
        shares.samples, shares.length, shares.share,
        STEPS=Modulations(_step(gate), _step(scale), 0), C=width, LAYER=layer,
        ROWS=tile.rows, BLOCK=tile.block, STAGES=stages,
        num_warps=tile.warps, maxnreg=128,  # else some chips use 157, and not all programs are resident
    )  # fmt: skip
    return dx, dbranch, *_placed(sums.add_up(partials, shares, trained), needs)


def _placed(tensors: Sequence[Tensor], needs: list[bool]) -> Parameters:
    """The tensors as `Parameters`: one for each parameter that `needs` selects, None for the others."""
    following = iter(tensors)
    return Parameters(*(next(following) if need else None for need in needs))


def _save(ctx, inputs, outputs):
    x, branch, gate, weight, scale, shift, _, _, _, _, _, layer, _, out_dtype = inputs
    ctx.options = layer, x.dtype if branch is None else branch.dtype, out_dtype
    x_new, needs_dgate = x if branch is None else outputs[0], ctx.needs_input_grad[2]
    ctx.save_for_backward(x_new, branch if needs_dgate else None, gate, weight, scale, shift, outputs[4])


def _gradients(ctx, dx_new, dy, *_):
    saved, (layer, branch_dtype, out_dtype) = ctx.saved_tensors, ctx.options
    x_new, _, gate, *_ = saved
    if gate is None:
        dx_new = None  # compilers pass an empty tensor for the absent x_new
    if dy is None:
        dy = torch.zeros_like(x_new, dtype=out_dtype)
    return norm_backward(dy, dx_new, *saved, branch_dtype, layer, list(ctx.needs_input_grad[2:6]))


_norm, _residual_norm = (
    registration.differentiable("Norm", op, norm_forward, _save, _gradients, inputs=6, outputs=2)
    for op in ("norm_modulate", "residual_norm_modulate")
)


def norm_modulate(
    x: Dual, weight: Tensor | None, scale: Dual, shift: Dual, *, kind: str, eps: float, out_dtype: torch.dtype
) -> Dual:
    """`pmf.reference.norm_modulate` by Triton."""
    _, y, _, y_dot, _ = _norm(
        x.value, None, None, weight, scale.value, shift.value, x.dot, None, None, scale.dot, shift.dot,
        kind == "layer", eps, out_dtype,
    )  # fmt: skip
    return Dual(y, y_dot)


def residual_norm_modulate(
    x: Dual, branch: Dual, gate: Dual, weight: Tensor | None, scale: Dual, shift: Dual,
    *, kind: str, eps: float, out_dtype: torch.dtype,
) -> tuple[Dual, Dual]:  # fmt: skip
    """`pmf.reference.residual_norm_modulate` by Triton."""
    x_new, y, x_new_dot, y_dot, _ = _residual_norm(
        x.value, branch.value, gate.value, weight, scale.value, shift.value,
        x.dot, branch.dot, gate.dot, scale.dot, shift.dot, kind == "layer", eps, out_dtype,
    )  # fmt: skip
    return Dual(x_new, x_new_dot), Dual(y, y_dot)
