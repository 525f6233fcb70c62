"""Normalise and modulate, alone or behind a gated residual: `norm_modulate`, `residual_norm_modulate`.

    x_new = x + gate branch                        x_new_dot = x_dot + gate branch_dot + gate_dot branch
    n     = (x_new - mu) rstd                      n_dot     = rstd (c_dot - n mean(n c_dot))
    y     = n weight (1 + scale) + shift           y_dot     = n_dot weight (1 + scale)
                                                               + n weight scale_dot + shift_dot

mu = 0 for "rms"; c_dot = x_new_dot, minus its mean for "layer". Without a branch, x_new = x. Everything
between reading and writing is float32; x_new is rounded to the dtype of x before it is normalised.

Backward, with f = weight (1 + scale) and dx_new the gradient that reaches x_new from elsewhere:

    dx = dx_new + rstd (c - n mean(n c)), c = f dy (minus its mean)      dbranch = gate dx
    A = sum over tokens of n dy:  dscale = weight A, dweight = sum over samples of (1 + scale) A
    dshift = sum of dy            dgate = sum of dx branch

Sums over tokens: see sums.py.

Saved: x_new (x without a branch), branch where gate needs a gradient, the parameters, and rstd (for
"layer" mu too) as float32: 4 or 8 bytes a row. Nothing is saved for tangents.

Bytes moved a row of C values, x of e_x bytes, y of e_y, branch of e_b; all of it is the minimum but for
the partial sums (2% at pMF's shapes) and vectors per channel or sample, read once for every tile:
    norm_modulate            forward C (e_x + e_y), twice that with a tangent
                             backward C (2 e_x + e_y)
    residual_norm_modulate   forward C (2 e_x + e_b + e_y), twice that with a tangent
                             backward C (3 e_x + 2 e_b + e_y), one e_b less where gate needs no gradient
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration, sums
from pmf.kernels.registration import Chip, Tile, absent, present
from pmf.kernels.tiles import load_vector, normalise, normalise_dot


@functools.cache
def forward_tile(width: int, alone: bool, chip: Chip) -> Tile:
    """8 values a thread and operand: one 16-byte load of bfloat16, two of float32.

    With a tangent and a branch that is four operands in flight, enough to hide the latency of HBM at
    half occupancy. Where x comes `alone`, twice the rows have as much in flight.
    Rows wider than 4096 take more values a thread instead of more than 16 warps.
    """
    block = registration.power_of_two(width)
    if chip.interpreted:
        return Tile(32, block, 1)
    warps = min(max(block // 256, 4), 16)
    return Tile(max((512 if alone else 256) * warps // block, 1), block, warps)


@functools.cache
def backward_tile(width: int, alone: bool, row_bytes: int, chip: Chip) -> tuple[Tile, int, int]:
    """The forward's tile, the number of programs, and the stages of the loop over a program's tokens.

    Every program writes up to four rows of partial sums, so there should be few: as many as reside at
    once, in one wave. Registers (up to 128 a thread) admit 16 warps a multiprocessor, too few to hide
    the latency of HBM by themselves: rows of `row_bytes` are loaded ahead. Scratch changes layouts.
    """
    tile = forward_tile(width, alone, chip)
    if chip.interpreted:
        return tile, 16, 1
    resident = 16 // tile.warps
    values = tile.rows * tile.block
    stages = chip.stages(resident, values * row_bytes // width, 4 * values)
    # Where branch and gradients are float32 too, one row is as much as two, and a third stage costs registers.
    return tile, chip.processors * resident, min(stages, 2) if row_bytes > 12 * width else stages


@triton.jit
def _forward(
    p_x, p_branch, p_gate, p_weight, p_scale, p_shift,
    p_x_dot, p_branch_dot, p_gate_dot, p_scale_dot, p_shift_dot,
    p_x_new, p_y, p_x_new_dot, p_y_dot, p_stats,
    length, first_dot, eps,
    STRIDES: tl.constexpr, C: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sample. STRIDES: from sample to sample of gate, scale, shift and their tangents."""
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

    # Tangents are read before the first sum over a row, so that all rows are under way together.
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
        b_gate = load_vector(p_gate + i_b * STRIDES[0], i_c, C)
        b_x_new = (b_x + b_gate * b_branch.to(tl.float32)).to(p_x_new.dtype.element_ty)
        tl.store(p_x_new + i_row * C + i_tile, b_x_new, mask=mask)
        b_x = b_x_new.to(tl.float32)
        if p_branch_dot is not None:
            b_x_dot += b_gate * b_branch_dot.to(tl.float32)
        if p_gate_dot is not None:
            p_vector = p_gate_dot + i_b_dot * STRIDES[3] + i_c
            b_gate_dot = tl.load(p_vector, mask=(i_c < C) & (i_b_dot >= 0), other=0.0).to(tl.float32)
            b_x_dot += b_gate_dot[None, :] * b_branch.to(tl.float32)

    b_n, b_mean, b_rstd = normalise(b_x, m_c, eps, C, LAYER)
    p_row = p_stats + (i_row + i_r[:, None]) * STATISTICS
    tl.store(p_row, b_rstd, mask=m_r[:, None])
    if LAYER:
        tl.store(p_row + 1, b_mean, mask=m_r[:, None])

    # Up to here b_weighted is n weight; scale_dot multiplies that.
    b_weighted = b_n
    b_factor = tl.full([1, BLOCK], 1.0, tl.float32)
    if p_weight is not None:
        b_factor = load_vector(p_weight, i_c, C)
        b_weighted = b_n * b_factor
    b_y = b_weighted
    if p_scale is not None:
        b_one_plus = 1.0 + load_vector(p_scale + i_b * STRIDES[1], i_c, C)
        b_factor = b_factor * b_one_plus
        b_y = b_y * b_one_plus
    if p_shift is not None:
        b_y += load_vector(p_shift + i_b * STRIDES[2], i_c, C)
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
            if p_scale_dot is not None:
                b_y_dot += b_weighted * load_vector(p_scale_dot + i_b_dot * STRIDES[4], i_c, C)
            if p_shift_dot is not None:
                b_y_dot += load_vector(p_shift_dot + i_b_dot * STRIDES[5], i_c, C)
            tl.store(p_y_dot + i_row_dot * C + i_tile, b_y_dot.to(p_y_dot.dtype.element_ty), mask=mask)


@triton.jit
def _backward(
    p_dy, p_dx_new, p_x_new, p_branch, p_gate, p_weight, p_scale, p_stats,
    p_dx, p_dbranch, p_dgate, p_dweight, p_dscale, p_dshift,
    samples, length, share,
    STRIDES: tl.constexpr, C: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    STAGES: tl.constexpr,
):  # fmt: skip
    """A share of the tokens, ROWS at a time; the sums of every segment go to its row of the partial buffers."""
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
        p_sample_scale = p_scale
        if p_gate is not None:
            b_gate = load_vector(p_gate + tl.cast(i_b, tl.int64) * STRIDES[0], i_c, C)
        if p_weight is not None:
            b_factor = load_vector(p_weight, i_c, C)
        if p_scale is not None:
            p_sample_scale = p_scale + tl.cast(i_b, tl.int64) * STRIDES[1]
            b_factor = b_factor * (1.0 + load_vector(p_sample_scale, i_c, C))
        b_sum_ndy = tl.zeros([ROWS, BLOCK], tl.float32)
        b_sum_dy = tl.zeros([ROWS, BLOCK], tl.float32)
        b_sum_dgate = tl.zeros([ROWS, BLOCK], tl.float32)
        last = tl.minimum(stop, (i_b + 1) * length)
        for i_s in tl.range(tl.maximum(start, i_b * length), last, ROWS, num_stages=STAGES):
            i_row = tl.cast(i_s, tl.int64)
            m_r = (i_s + i_r < last)[:, None]
            mask = m_r & m_c
            # Every load comes before the first sum over a row, so that all are under way together.
            b_dy = tl.load(p_dy + i_row * C + i_tile, mask=mask, other=0.0)
            b_x = tl.load(p_x_new + i_row * C + i_tile, mask=mask, other=0.0)
            if p_dx_new is not None:
                b_dx_new = tl.load(p_dx_new + i_row * C + i_tile, mask=mask, other=0.0)
            if p_dgate is not None:
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
            if (p_dweight is not None) or (p_dscale is not None):
                b_sum_ndy += b_n * b_dy
            if p_dshift is not None:
                b_sum_dy += b_dy
            if p_dgate is not None:
                b_sum_dgate += b_dx * b_branch.to(tl.float32)

        # Weight and scale are read again: through the loop they would cost registers.
        i_sum = tl.cast(i_program + i_b, tl.int64) * C + i_c
        if p_dgate is not None:
            tl.store(p_dgate + i_sum, tl.sum(b_sum_dgate, 0), mask=i_c < C)
        if p_dweight is not None:
            b_dweight = b_sum_ndy
            if p_scale is not None:
                b_dweight = b_sum_ndy * (1.0 + load_vector(p_sample_scale, i_c, C))
            tl.store(p_dweight + i_sum, tl.sum(b_dweight, 0), mask=i_c < C)
        if p_dscale is not None:
            b_dscale = b_sum_ndy
            if p_weight is not None:
                b_dscale = b_sum_ndy * load_vector(p_weight, i_c, C)
            tl.store(p_dscale + i_sum, tl.sum(b_dscale, 0), mask=i_c < C)
        if p_dshift is not None:
            tl.store(p_dshift + i_sum, tl.sum(b_sum_dy, 0), mask=i_c < C)


def _strides(*modulations: Tensor | None) -> tuple[int, ...]:
    """Steps from sample to sample: 0 where there is one vector for all."""
    return tuple(m.stride(0) if m is not None and m.ndim == 2 else 0 for m in modulations)


def _allocate_forward(
    x, branch, gate, weight, scale, shift,
    x_dot, branch_dot, gate_dot, scale_dot, shift_dot, layer, eps, out_dtype,
):  # fmt: skip
    """x_new, y, x_new_dot, y_dot and the statistics [B, S, 1 or 2]; see `absent` for those not needed."""
    samples, length, width = x.shape
    dots = (x_dot, branch_dot, gate_dot, scale_dot, shift_dot)
    rows = samples - registration.first_dot(samples, *dots)

    def like(wanted: bool, samples: int, dtype: torch.dtype) -> Tensor:
        return x.new_empty(samples, length, width, dtype=dtype) if wanted else absent(x)

    x_new_has_dot = branch is not None and any(dot is not None for dot in dots[:3])
    return (
        like(branch is not None, samples, x.dtype),
        like(True, samples, out_dtype),
        like(x_new_has_dot, rows, x.dtype),
        like(any(dot is not None for dot in dots), rows, out_dtype),
        x.new_empty(samples, length, 2 if layer else 1, dtype=torch.float32),
    )


def _run_forward(
    x, branch, gate, weight, scale, shift,
    x_dot, branch_dot, gate_dot, scale_dot, shift_dot, layer, eps, out_dtype,
):  # fmt: skip
    streams = (x, branch, x_dot, branch_dot)
    x, branch, x_dot, branch_dot = (None if s is None else s.contiguous() for s in streams)
    modulations = [registration.unit_step(m) for m in (gate, scale, shift, gate_dot, scale_dot, shift_dot)]
    gate, scale, shift, gate_dot, scale_dot, shift_dot = modulations
    dots = (x_dot, branch_dot, gate_dot, scale_dot, shift_dot)
    outputs = _allocate_forward(x, branch, gate, weight, scale, shift, *dots, layer, eps, out_dtype)
    x_new, y, x_new_dot, y_dot, stats = outputs
    samples, length, width = x.shape
    tile = forward_tile(width, branch is None and x_dot is None, registration.chip(x.device))
    registration.launch(
        _forward, samples * registration.cdiv(length, tile.rows),
        x, branch, gate, weight, scale, shift, *dots,
        present(x_new, branch is not None), y,
        present(x_new_dot, x_new_dot.numel() > 0), present(y_dot, y_dot.numel() > 0), stats,
        length, registration.first_dot(samples, *dots), eps,
        STRIDES=_strides(*modulations), C=width, LAYER=layer, ROWS=tile.rows, BLOCK=tile.block,
        num_warps=tile.warps,
    )  # fmt: skip
    return outputs


def _fake_backward(dy, dx_new, x_new, branch, gate, weight, scale, shift, stats, branch_dtype, layer, needs):
    """dx, dbranch, dgate, dweight, dscale, dshift; `needs` says which of the last four to compute."""
    parameters = zip((gate, weight, scale, shift), needs, strict=True)
    return (
        torch.empty_like(x_new, memory_format=torch.contiguous_format),
        x_new.new_empty(x_new.shape if gate is not None else 0, dtype=branch_dtype),
        *(p.new_empty(p.shape) if need else absent(x_new) for p, need in parameters),
    )


def _run_backward(dy, dx_new, x_new, branch, gate, weight, scale, shift, stats, branch_dtype, layer, needs):
    dy, x_new = dy.contiguous(), x_new.contiguous()
    dx_new, branch = (None if t is None else t.contiguous() for t in (dx_new, branch))
    gate, scale = registration.unit_step(gate), registration.unit_step(scale)
    samples, length, width = x_new.shape
    dx = torch.empty_like(x_new)
    dbranch = x_new.new_empty(x_new.shape if gate is not None else 0, dtype=branch_dtype)
    streams = [s for s in (dy, x_new, dx_new, branch) if s is not None]
    row_bytes = width * sum(s.element_size() for s in streams)
    tile, programs, stages = backward_tile(width, gate is None, row_bytes, registration.chip(dy.device))
    per_sample = any(p is not None and p.ndim == 2 for p in (gate, scale, shift))
    shares = sums.divide(samples, length, per_sample, programs, tile.rows)
    parameters = (gate, weight, scale, shift)
    trained = [p for p, need in zip(parameters, needs, strict=True) if need]
    partials = x_new.new_empty(len(trained), shares.segments, width, dtype=torch.float32).unbind()
    buffers = iter(partials)
    registration.launch(
        _backward, shares.programs,
        dy, dx_new, x_new, branch, gate, weight, scale, stats,
        dx, present(dbranch, gate is not None), *(next(buffers) if need else None for need in needs),
        shares.samples, shares.length, shares.share,
        STRIDES=_strides(gate, scale), C=width, LAYER=layer, ROWS=tile.rows, BLOCK=tile.block, STAGES=stages,
        num_warps=tile.warps, maxnreg=128,  # else some chips take 157, and fewer programs reside than are launched
    )  # fmt: skip
    totals = iter(sums.add_up(partials, shares, trained))
    return dx, dbranch, *(next(totals) if need else absent(dx) for need in needs)


_PARAMETERS = "Tensor? gate, Tensor? weight, Tensor? scale, Tensor? shift"
_norm_forward = registration.define(
    f"norm_forward(Tensor x, Tensor? branch, {_PARAMETERS}, Tensor? x_dot, Tensor? branch_dot, "
    "Tensor? gate_dot, Tensor? scale_dot, Tensor? shift_dot, bool layer, float eps, ScalarType out_dtype) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_forward,
    _allocate_forward,
)
_norm_backward = registration.define(
    f"norm_backward(Tensor dy, Tensor? dx_new, Tensor x_new, Tensor? branch, {_PARAMETERS}, Tensor stats, "
    "ScalarType branch_dtype, bool layer, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    _fake_backward,
)


class _Norm(torch.autograd.Function):
    """(x, branch, gate, weight, scale, shift, tangents of all but weight, options) -> `_allocate_forward`."""

    @staticmethod
    def forward(
        x, branch, gate, weight, scale, shift, x_dot, branch_dot, gate_dot, scale_dot, shift_dot,
        layer, eps, out_dtype,
    ):  # fmt: skip
        dots = (x_dot, branch_dot, gate_dot, scale_dot, shift_dot)
        return _norm_forward(x, branch, gate, weight, scale, shift, *dots, layer, eps, out_dtype)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        x, branch, gate, weight, scale, shift = inputs[:6]
        x_new, _, x_new_dot, y_dot, stats = outputs
        ctx.layer, _, ctx.out_dtype = inputs[11:]
        ctx.branch_dtype = x.dtype if branch is None else branch.dtype
        ctx.needs = list(ctx.needs_input_grad[2:6])
        ctx.set_materialize_grads(False)
        alone = branch is None
        ctx.mark_non_differentiable(*((x_new,) if alone else ()), x_new_dot, y_dot, stats)
        ctx.save_for_backward(
            x if alone else x_new, branch if ctx.needs[0] else None, gate, weight, scale, shift, stats
        )

    @staticmethod
    def backward(ctx, dx_new, dy, *_):
        saved = ctx.saved_tensors
        x_new, _, gate, *_ = saved
        if gate is None:
            dx_new = None  # compilers hand in an empty tensor for the absent x_new
        if dy is None:
            dy = torch.zeros_like(x_new, dtype=ctx.out_dtype)
        dx, dbranch, *parameters = _norm_backward(dy, dx_new, *saved, ctx.branch_dtype, ctx.layer, ctx.needs)
        dparameters = (present(d, need) for d, need in zip(parameters, ctx.needs, strict=True))
        return dx, present(dbranch, gate is not None), *dparameters, *(None,) * 8


def _per_sample(dot: Tensor | None, samples: int) -> Tensor | None:
    """The tangent of a modulation [C] (which only forward-mode differentiation gives) as [B, C]."""
    return dot.expand(samples, -1) if dot is not None and dot.ndim == 1 else dot


def _norm_dual(primals, tangents, kind, eps, out_dtype):
    """((x_new, y), (x_new_dot, y_dot)); without a branch x_new and its tangent are empty."""
    x_dot, branch_dot, gate_dot, _, scale_dot, shift_dot = tangents
    per_sample = (_per_sample(dot, primals[0].shape[0]) for dot in (gate_dot, scale_dot, shift_dot))
    gate_dot, scale_dot, shift_dot = per_sample
    dots = (x_dot, branch_dot, gate_dot, scale_dot, shift_dot)
    x_new, y, x_new_dot, y_dot, _ = registration.apply(_Norm, *primals, *dots, kind == "layer", eps, out_dtype)
    x_new_moves = any(dot is not None for dot in dots[:3])
    y_moves = any(dot is not None for dot in dots)
    return (x_new, y), (present(x_new_dot, x_new_moves), present(y_dot, y_moves))


def residual_norm_modulate_dual(primals, tangents, *, kind, eps, out_dtype):
    """Triton's `pmf.ops.residual_norm_modulate_dual`: ((x_new, y), (x_new_dot, y_dot))."""

    def compute(primals, tangents):
        return _norm_dual(primals, tangents, kind, eps, out_dtype)

    names = "x* branch* gate* weight scale* shift*"
    return registration.run_dual("residual_norm_modulate", names, compute, primals, tangents)


def norm_modulate_dual(primals, tangents, *, kind, eps, out_dtype):
    """Triton's `pmf.ops.norm_modulate_dual`: (y, y_dot)."""

    def compute(primals, tangents):
        (x, *parameters), (x_dot, *dots) = primals, tangents
        primals, tangents = (x, None, None, *parameters), (x_dot, None, None, *dots)
        (_, y), (_, y_dot) = _norm_dual(primals, tangents, kind, eps, out_dtype)
        return (y,), (y_dot,)

    (y,), (y_dot,) = registration.run_dual("norm_modulate", "x* weight scale* shift*", compute, primals, tangents)
    return y, y_dot
