"""SwiGLU's pointwise half: `swiglu`.

    y = silu(a) b for x = [a, b]          y_dot = silu'(a) a_dot b + silu(a) b_dot

Backward: da = dy silu'(a) b, db = dy silu(a). Saved: x, the output of the product before it; silu is
recomputed. Nothing is saved for tangents. Computed in float32.

Bytes moved per token of 2 F values of e bytes, all of it the minimum: forward 3 F e, twice that with a
tangent, backward 5 F e. Rows of x may have any stride. If F is not a multiple of 8, rows lose their
16-byte alignment and accesses become narrower: pad the packed weight (`pmf.layers.SwiGLU` does).
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.registration import Chip, RowTile
from pmf.kernels.tiles import silu
from pmf.pair import Dual


@functools.cache
def tile_of(width: int, chip: Chip) -> RowTile:
    """8 values per thread and operand, 4 warps: one 16-byte load of bfloat16, two of float32.

    Columns come in blocks of at most 512, which pads 2736 or 3416 columns by 5 to 12%. F is a constexpr, because
    Triton only knows of run-time integers whether 16 divides them, and 3416 is only a multiple of 8.
    """
    if chip.interpreted:
        return RowTile(32, registration.power_of_two(width), 1)
    block = min(registration.power_of_two(width), 512)
    return RowTile(1024 // block, block, 4)


@triton.jit
def _place(rows, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """This program's rows [ROWS, 1] (64-bit) and columns [1, BLOCK], and where both are inside."""
    blocks: tl.constexpr = tl.cdiv(F, BLOCK)
    i_row = (tl.program_id(0) // blocks).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    i_c = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)[None, :]
    return i_row, i_c, (i_row < rows) & (i_c < F)


@triton.jit
def _forward(
    p_x, p_x_dot, p_y, p_y_dot, rows, first_dot_row, x_step, x_dot_step,
    F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_c, mask = _place(rows, F, ROWS, BLOCK)
    p_a = p_x + i_row * x_step + i_c
    b_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_a + F, mask=mask, other=0.0).to(tl.float32)
    b_silu, b_slope = silu(b_a)
    tl.store(p_y + i_row * F + i_c, (b_silu * b_b).to(p_y.dtype.element_ty), mask=mask)

    if p_y_dot is not None:
        i_row_dot = i_row - first_dot_row
        if tl.max(i_row_dot) >= 0:
            mask = mask & (i_row_dot >= 0)
            p_a_dot = p_x_dot + i_row_dot * x_dot_step + i_c
            b_a_dot = tl.load(p_a_dot, mask=mask, other=0.0).to(tl.float32)
            b_b_dot = tl.load(p_a_dot + F, mask=mask, other=0.0).to(tl.float32)
            b_y_dot = b_slope * b_a_dot * b_b + b_silu * b_b_dot
            tl.store(p_y_dot + i_row_dot * F + i_c, b_y_dot.to(p_y_dot.dtype.element_ty), mask=mask)


@triton.jit
def _backward(p_dy, p_x, p_dx, rows, x_step, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i_row, i_c, mask = _place(rows, F, ROWS, BLOCK)
    b_dy = tl.load(p_dy + i_row * F + i_c, mask=mask, other=0.0).to(tl.float32)
    p_a = p_x + i_row * x_step + i_c
    b_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_a + F, mask=mask, other=0.0).to(tl.float32)
    b_silu, b_slope = silu(b_a)
    p_da = p_dx + i_row * (2 * F) + i_c
    tl.store(p_da, (b_dy * b_slope * b_b).to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_da + F, (b_dy * b_silu).to(p_dx.dtype.element_ty), mask=mask)


@registration.operator
def swiglu_forward(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and y_dot."""
    samples, length, width = x.shape[0], x.shape[1], x.shape[2] // 2
    y = x.new_empty(samples, length, width)
    y_dot = None if x_dot is None else x.new_empty(x_dot.shape[0], length, width)
    if registration.shapes_only(x):
        return y, y_dot
    x_rows = registration.as_rows(x)
    x_dot_rows = None if x_dot is None else registration.as_rows(x_dot)
    tile = tile_of(width, registration.chip(x.device))
    registration.launch(
        _forward,
        registration.cdiv(samples * length, tile.rows) * registration.cdiv(width, tile.block),
        x_rows,
        x_dot_rows,
        y,
        y_dot,
        samples * length,
        registration.first_dot(samples, x_dot) * length,
        x_rows.stride(0),
        0 if x_dot_rows is None else x_dot_rows.stride(0),
        F=width,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return y, y_dot


@registration.gradient_operator("swiglu")
def swiglu_backward(dy: Tensor, x: Tensor) -> Tensor:
    """dx."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    if registration.shapes_only(dy):
        return dx
    dy, x = dy.contiguous(), registration.as_rows(x)
    width = dy.shape[-1]
    tile = tile_of(width, registration.chip(dy.device))
    registration.launch(
        _backward,
        registration.cdiv(x.shape[0], tile.rows) * registration.cdiv(width, tile.block),
        dy,
        x,
        dx,
        x.shape[0],
        x.stride(0),
        F=width,
        ROWS=tile.rows,
        BLOCK=tile.block,
        num_warps=tile.warps,
    )
    return dx


def _save(ctx, inputs, outputs):
    ctx.save_for_backward(inputs[0])


def _gradients(ctx, dy, *_):
    return (None if dy is None else swiglu_backward(dy, *ctx.saved_tensors),)


_swiglu = registration.differentiable("SwiGLU", "swiglu", swiglu_forward, _save, _gradients, inputs=1)


def swiglu(x: Dual) -> Dual:
    """`pmf.reference.swiglu` by Triton."""
    return Dual(*_swiglu(*x))
