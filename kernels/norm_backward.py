"""The gradients of `norm_modulate` and `residual_norm_modulate`; norm.py has the equations."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration, sums
from pmf.kernels.modulations import Parameters, as_rows, forward_tile, load_tile, per_token, step_of
from pmf.kernels.registration import Chip, RowTile
from pmf.kernels.tiles import load_vector, normalise_dot


class Results(NamedTuple):
    """What the kernel writes for each token; in kernels, pointers."""

    dx: Any
    dbranch: Any
    y: Any


class Form(NamedTuple):
    """What the kernel computes; a constexpr."""

    layer: bool
    add: bool
    """Whether x_new is to be added up again, from x and the branch."""


@functools.cache
def backward_tile(
    width: int, alone: bool, row_bytes: int, token_bytes: int, shift_bytes: int, chip: Chip
) -> tuple[RowTile, int, int]:
    """The forward's tile, the number of programs, and the stages of the loop over a program's tokens.

    Every program writes up to four rows of partial sums, so there should be few programs: one wave, as many as are
    resident at once. Registers (up to 128 per thread) limit a multiprocessor to 16 warps, too few to hide the latency
    of HBM, so rows of `row_bytes`, and of `token_bytes` of modulations per token, are prefetched into shared memory
    with one row of `shift_bytes`. It also holds scratch for layout conversions.
    """
    tile = forward_tile(width, alone, chip)
    if chip.interpreted:
        return tile, 16, 1
    resident = 16 // tile.warps
    values = tile.rows * tile.block
    staged = (values * (row_bytes + token_bytes) + tile.block * shift_bytes) // width
    stages = chip.stages(resident, staged, 4 * values)
    # Float32 branches and gradients double a row: a third stage would cost registers and is not needed.
    return tile, chip.processors * resident, min(stages, 2) if row_bytes > 12 * width else stages


@triton.jit
def _backward(
    p_dy, p_dx_new, p_x, p_branch, p, p_stats, p_out, p_d, samples, length, share,
    STEPS: tl.constexpr, TOKEN: tl.constexpr, C: tl.constexpr, FORM: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the tokens, ROWS at a time; the sums of every segment go to its row of the partial buffers.

    p_x: x_new, or x if FORM.add. p: `Parameters`; p_out: `Results`; p_d: `Parameters` of partial sums, or of gradients
    per token; STEPS, TOKEN: see `_forward`.
    """
    i_program = tl.program_id(0)
    start = i_program * share
    stop = tl.minimum(start + share, samples * length)
    STATISTICS: tl.constexpr = 2 if FORM.layer else 1
    i_r, i_c = tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_c = (i_c < C)[None, :]
    i_tile = i_r[:, None] * C + i_c[None, :]

    for i_b in range(start // length, tl.minimum(stop // length, samples - 1) + 1):
        b_gate = tl.full([1, BLOCK], 1.0, tl.float32)
        b_factor = tl.full([1, BLOCK], 1.0, tl.float32)
        p_sample_scale = p.scale
        if (p.gate is not None) and (not TOKEN.gate):
            b_gate = load_vector(p.gate + tl.cast(i_b, tl.int64) * STEPS.gate, i_c, C)
        if p.weight is not None:
            b_factor = load_vector(p.weight, i_c, C)
        if (p.scale is not None) and (not TOKEN.scale):
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
            b_x = tl.load(p_x + i_row * C + i_tile, mask=mask, other=0.0)
            if p_dx_new is not None:
                b_dx_new = tl.load(p_dx_new + i_row * C + i_tile, mask=mask, other=0.0)
            if (p_d.gate is not None) or FORM.add:
                b_branch = tl.load(p_branch + i_row * C + i_tile, mask=mask, other=0.0)
            b_tile_gate = b_gate
            if TOKEN.gate:
                b_tile_gate = load_tile(p.gate, i_row, mask, STEPS.gate, ROWS, BLOCK)
            b_tile_factor = b_factor
            if TOKEN.scale:
                b_one_plus = 1.0 + load_tile(p.scale, i_row, mask, STEPS.scale, ROWS, BLOCK)
                b_tile_factor = b_factor * b_one_plus
            if FORM.add:
                b_x = (b_x.to(tl.float32) + b_tile_gate * b_branch.to(tl.float32)).to(p_x.dtype.element_ty)
            p_row = p_stats + (i_row + i_r[:, None]) * STATISTICS
            b_rstd = tl.load(p_row, mask=m_r, other=0.0)
            b_n, b_dy = b_x.to(tl.float32), b_dy.to(tl.float32)
            if FORM.layer:
                b_mean = tl.load(p_row + 1, mask=m_r, other=0.0)
                b_n = tl.where(mask, b_n - b_mean, 0.0)
            b_n = b_n * b_rstd
            b_dx = normalise_dot(b_n, b_rstd, b_dy * b_tile_factor, m_c, C, FORM.layer)
            if p_dx_new is not None:
                b_dx += b_dx_new.to(tl.float32)
            tl.store(p_out.dx + i_row * C + i_tile, b_dx.to(p_out.dx.dtype.element_ty), mask=mask)
            if p_out.dbranch is not None:
                b_dbranch = (b_dx * b_tile_gate).to(p_out.dbranch.dtype.element_ty)
                tl.store(p_out.dbranch + i_row * C + i_tile, b_dbranch, mask=mask)
            if p_out.y is not None:
                b_y = b_n * b_tile_factor
                if TOKEN.shift:
                    b_y += load_tile(p.shift, i_row, mask, STEPS.shift, ROWS, BLOCK)
                elif p.shift is not None:  # loaded for every tile: keeping it through the loop would cost registers
                    b_y += load_vector(p.shift + tl.cast(i_b, tl.int64) * STEPS.shift, i_c, C)
                tl.store(p_out.y + i_row * C + i_tile, b_y.to(p_out.y.dtype.element_ty), mask=mask)
            b_ndy = b_n * b_dy
            if TOKEN.scale and (p_d.scale is not None):
                b_dscale = b_ndy
                if p.weight is not None:
                    b_dscale = b_ndy * b_factor
                tl.store(p_d.scale + i_row * C + i_tile, b_dscale.to(p_d.scale.dtype.element_ty), mask=mask)
            if (p_d.weight is not None) or ((p_d.scale is not None) and (not TOKEN.scale)):
                if TOKEN.scale:
                    b_ndy = b_ndy * b_one_plus
                b_sum_ndy += b_ndy
            if TOKEN.shift and (p_d.shift is not None):
                tl.store(p_d.shift + i_row * C + i_tile, b_dy.to(p_d.shift.dtype.element_ty), mask=mask)
            elif p_d.shift is not None:
                b_sum_dy += b_dy
            if TOKEN.gate and (p_d.gate is not None):
                b_dgate = (b_dx * b_branch.to(tl.float32)).to(p_d.gate.dtype.element_ty)
                tl.store(p_d.gate + i_row * C + i_tile, b_dgate, mask=mask)
            elif p_d.gate is not None:
                b_sum_dgate += b_dx * b_branch.to(tl.float32)

        # Reload weight and scale: keeping them through the loop would cost registers.
        i_sum = tl.cast(i_program + i_b, tl.int64) * C + i_c
        if (p_d.gate is not None) and (not TOKEN.gate):
            tl.store(p_d.gate + i_sum, tl.sum(b_sum_dgate, 0), mask=i_c < C)
        if p_d.weight is not None:
            b_dweight = b_sum_ndy
            if (p.scale is not None) and (not TOKEN.scale):
                b_dweight = b_sum_ndy * (1.0 + load_vector(p_sample_scale, i_c, C))
            tl.store(p_d.weight + i_sum, tl.sum(b_dweight, 0), mask=i_c < C)
        if (p_d.scale is not None) and (not TOKEN.scale):
            b_dscale = b_sum_ndy
            if p.weight is not None:
                b_dscale = b_sum_ndy * load_vector(p.weight, i_c, C)
            tl.store(p_d.scale + i_sum, tl.sum(b_dscale, 0), mask=i_c < C)
        if (p_d.shift is not None) and (not TOKEN.shift):
            tl.store(p_d.shift + i_sum, tl.sum(b_sum_dy, 0), mask=i_c < C)


@registration.gradient_operator(lambda *arguments: "residual_norm_modulate" if arguments[11] else "norm_modulate")
def norm_backward(
    dy: Tensor, dx_new: Tensor | None, x: Tensor, branch: Tensor | None,
    gate: Tensor | None, weight: Tensor | None, scale: Tensor | None, shift: Tensor | None,
    stats: Tensor, branch_dtype: torch.dtype | None, layer: bool, residual: bool, needs: list[bool],
    add: bool, again: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """dx, dbranch (None if branch_dtype is), dgate, dweight, dscale, dshift, and y if `again`.

    x is x_new, unless backward is to `add` it up. `needs` selects from the four gradients of parameters.
    """
    parameters = Parameters(gate, weight, scale, shift)
    samples, length, width = x.shape
    out = Results(
        x.new_empty(samples, length, width),
        None if branch_dtype is None else x.new_empty(samples, length, width, dtype=branch_dtype),
        dy.new_empty(samples, length, width) if again else None,
    )
    trained = [p for p, need in zip(parameters, needs, strict=True) if need]
    if registration.shapes_only(dy):
        return out.dx, out.dbranch, *_placed([p.new_empty(p.shape) for p in trained], needs), out.y
    dy, x = dy.contiguous(), x.contiguous()
    dx_new, branch = (None if t is None else t.contiguous() for t in (dx_new, branch))
    token = Parameters(*map(per_token, parameters))
    row_bytes = width * sum(s.element_size() for s in (dy, x, dx_new, branch) if s is not None)
    read = (gate, scale, shift if again else None)
    token_bytes = width * sum(p.element_size() for p in read if p is not None and per_token(p))
    shift_bytes = 0 if shift is None or not again or token.shift else width * shift.element_size()
    chip = registration.chip(dy.device)
    tile, programs, stages = backward_tile(width, not residual, row_bytes, token_bytes, shift_bytes, chip)
    gate, weight, scale, shift = (as_rows(p) for p in parameters)
    shares = sums.divide(samples, length, any(p is not None and p.ndim == 2 for p in parameters), programs, tile.rows)
    summed = [p for p in trained if not per_token(p)]
    partials = list(x.new_empty(len(summed), shares.segments, width, dtype=torch.float32).unbind())
    found = [p.new_empty(p.shape) if per_token(p) else partials.pop(0) for p in trained]
    registration.launch(
        _backward, shares.programs,
        dy, dx_new, x, branch, Parameters(gate, weight, scale, shift if again else None), stats, out,
        _placed(found, needs), shares.samples, shares.length, shares.share,
        STEPS=Parameters(step_of(gate), 0, step_of(scale), step_of(shift)), TOKEN=token, C=width,
        FORM=Form(layer, add), ROWS=tile.rows, BLOCK=tile.block, STAGES=stages,
        num_warps=tile.warps, maxnreg=128,  # else some chips use 157, and not all programs are resident
    )  # fmt: skip
    added = iter(sums.add_up([p for p in found if p.ndim == 2], shares, summed))
    return out.dx, out.dbranch, *_placed([p if p.ndim == 3 else next(added) for p in found], needs), out.y


def _placed(tensors: Sequence[Tensor], needs: list[bool]) -> Parameters:
    """The tensors as `Parameters`: one for each parameter that `needs` selects, None for the others."""
    following = iter(tensors)
    return Parameters(*(next(following) if need else None for need in needs))
