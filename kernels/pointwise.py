"""Pointwise functions of MLPs: `swiglu` of x = [a, b], and `gelu`.

    y = silu(a) b                         y_dot = silu'(a) a_dot b + silu(a) b_dot
    y = gelu(x)                           y_dot = gelu'(x) x_dot

gelu(x) = x P with P = (1 + erf(x / sqrt 2)) / 2, computed to 7.5e-8, and gelu' = P + x exp(-x^2 / 2) / sqrt(2 pi).
By tanh: P = sigmoid(2 u) = (1 + tanh u) / 2 with u = sqrt(2 / pi) (x + 0.044715 x^3), gelu' = P + 2 x P (1 - P) u'.

Backward: da = dy silu'(a) b, db = dy silu(a); dx = dy gelu'(x). Saved: x, the output of the product before it; the
functions are recomputed. Nothing is saved for tangents. Computed in float32. With the product behind it (`linear`), y
is not kept for that either: backward writes it again, F e bytes more (products.py).

Bytes moved per token of F values of e bytes in y, all of it the minimum: swiglu forward 3 F e, gelu 2 F e, twice that
with a tangent; backward 5 F e and 3 F e. Rows of x may have any stride. If F is not a multiple of 8, rows lose their
16-byte alignment and accesses become narrower: pad the packed weight (`pmf.layers.Mlp` does for swiglu).
"""

from __future__ import annotations

import functools
import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.products import input_gradient, product, weight_gradients
from pmf.kernels.registration import Chip, Composition, RowTile
from pmf.kernels.tiles import gelu as gelu_of
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
def _swiglu(
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
def _swiglu_backward(p_dy, p_x, p_dx, p_y, rows, x_step, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    i_row, i_c, mask = _place(rows, F, ROWS, BLOCK)
    b_dy = tl.load(p_dy + i_row * F + i_c, mask=mask, other=0.0).to(tl.float32)
    p_a = p_x + i_row * x_step + i_c
    b_a = tl.load(p_a, mask=mask, other=0.0).to(tl.float32)
    b_b = tl.load(p_a + F, mask=mask, other=0.0).to(tl.float32)
    b_silu, b_slope = silu(b_a)
    p_da = p_dx + i_row * (2 * F) + i_c
    tl.store(p_da, (b_dy * b_slope * b_b).to(p_dx.dtype.element_ty), mask=mask)
    tl.store(p_da + F, (b_dy * b_silu).to(p_dx.dtype.element_ty), mask=mask)
    if p_y is not None:
        tl.store(p_y + i_row * F + i_c, (b_silu * b_b).to(p_y.dtype.element_ty), mask=mask)


@triton.jit
def _gelu(
    p_x, p_x_dot, p_y, p_y_dot, rows, first_dot_row, x_step, x_dot_step,
    TANH: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_c, mask = _place(rows, F, ROWS, BLOCK)
    b_x = tl.load(p_x + i_row * x_step + i_c, mask=mask, other=0.0).to(tl.float32)
    b_y, b_slope = gelu_of(b_x, TANH)
    tl.store(p_y + i_row * F + i_c, b_y.to(p_y.dtype.element_ty), mask=mask)

    if p_y_dot is not None:
        i_row_dot = i_row - first_dot_row
        if tl.max(i_row_dot) >= 0:
            mask = mask & (i_row_dot >= 0)
            b_x_dot = tl.load(p_x_dot + i_row_dot * x_dot_step + i_c, mask=mask, other=0.0).to(tl.float32)
            tl.store(p_y_dot + i_row_dot * F + i_c, (b_slope * b_x_dot).to(p_y_dot.dtype.element_ty), mask=mask)


@triton.jit
def _gelu_backward(
    p_dy, p_x, p_dx, p_y, rows, x_step,
    TANH: tl.constexpr, F: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    i_row, i_c, mask = _place(rows, F, ROWS, BLOCK)
    b_dy = tl.load(p_dy + i_row * F + i_c, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_row * x_step + i_c, mask=mask, other=0.0).to(tl.float32)
    b_y, b_slope = gelu_of(b_x, TANH)
    tl.store(p_dx + i_row * F + i_c, (b_dy * b_slope).to(p_dx.dtype.element_ty), mask=mask)
    if p_y is not None:
        tl.store(p_y + i_row * F + i_c, b_y.to(p_y.dtype.element_ty), mask=mask)


def _run_forward(kernel, x: Tensor, x_dot: Tensor | None, width: int, **constants) -> tuple[Tensor, Tensor | None]:
    """y and y_dot, with rows of `width` values."""
    y = x.new_empty(*x.shape[:-1], width)
    y_dot = None if x_dot is None else x.new_empty(*x_dot.shape[:-1], width)
    if registration.shapes_only(x):
        return y, y_dot
    x_rows = registration.as_rows(x)
    x_dot_rows = None if x_dot is None else registration.as_rows(x_dot)
    rows, tile = math.prod(x.shape[:-1]), tile_of(width, registration.chip(x.device))
    registration.launch(
        kernel, registration.cdiv(rows, tile.rows) * registration.cdiv(width, tile.block),
        x_rows, x_dot_rows, y, y_dot, rows, registration.first_dot(len(x), x_dot) * math.prod(x.shape[1:-1]),
        x_rows.stride(0), 0 if x_dot_rows is None else x_dot_rows.stride(0),
        **constants, F=width, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    return y, y_dot


def _run_backward(kernel, dy: Tensor, x: Tensor, again: bool, **constants) -> tuple[Tensor, Tensor | None]:
    """dx, and y if `again`."""
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    y = dy.new_empty(dy.shape) if again else None
    if registration.shapes_only(dy):
        return dx, y
    dy, x = dy.contiguous(), registration.as_rows(x)
    width = dy.shape[-1]
    tile = tile_of(width, registration.chip(dy.device))
    registration.launch(
        kernel, registration.cdiv(len(x), tile.rows) * registration.cdiv(width, tile.block),
        dy, x, dx, y, len(x), x.stride(0), **constants,
        F=width, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip
    return dx, y


@registration.operator
def swiglu_forward(x: Tensor, x_dot: Tensor | None) -> tuple[Tensor, Tensor]:
    """y and y_dot."""
    return _run_forward(_swiglu, x, x_dot, x.shape[-1] // 2)


@registration.gradient_operator("swiglu")
def swiglu_backward(dy: Tensor, x: Tensor, again: bool) -> tuple[Tensor, Tensor]:
    """dx, and y if `again`."""
    return _run_backward(_swiglu_backward, dy, x, again)


@registration.operator
def gelu_forward(x: Tensor, x_dot: Tensor | None, tanh: bool) -> tuple[Tensor, Tensor]:
    """y and y_dot."""
    return _run_forward(_gelu, x, x_dot, x.shape[-1], TANH=tanh)


@registration.gradient_operator("gelu")
def gelu_backward(dy: Tensor, x: Tensor, tanh: bool, again: bool) -> tuple[Tensor, Tensor]:
    """dx, and y if `again`."""
    return _run_backward(_gelu_backward, dy, x, again, TANH=tanh)


def _backward(dy: Tensor, x: Tensor, tanh: bool | None, again: bool) -> tuple[Tensor, Tensor | None]:
    """dx, and y if `again`, of gelu, or of swiglu for tanh None."""
    return swiglu_backward(dy, x, again) if tanh is None else gelu_backward(dy, x, tanh, again)


def _save(ctx, inputs, outputs):
    x, _, *tanh = inputs
    ctx.tanh = tanh[0] if tanh else None
    ctx.save_for_backward(x)


def _gradients(ctx, dy, *_):
    return (None if dy is None else _backward(dy, *ctx.saved_tensors, ctx.tanh, False)[0],)


_swiglu_alone = registration.differentiable("SwiGLU", "swiglu", swiglu_forward, _save, _gradients, inputs=1)
_gelu_alone = registration.differentiable("GELU", "gelu", gelu_forward, _save, _gradients, inputs=1)


# With the product behind them: x, W, b, x_dot -> out, out_dot.


def _swiglu_then_product(run):
    function = run(swiglu_forward)
    return lambda x, matrix, bias, x_dot: product(*function(x, x_dot), matrix, bias)


def _gelu_then_product(run):
    function = run(gelu_forward)
    return lambda x, matrix, bias, x_dot, tanh: product(*function(x, x_dot, tanh), matrix, bias)


def _save_with_product(ctx, inputs, outputs):
    x, matrix, _, _, *tanh = inputs
    ctx.tanh = tanh[0] if tanh else None
    ctx.save_for_backward(x, matrix)


def _gradients_with_product(ctx, dout, *_):
    if dout is None:
        return None, None, None
    (x, matrix), (before, *needs) = ctx.saved_tensors, ctx.needs_input_grad[:3]
    dx, y = _backward(input_gradient(dout, matrix, before), x, ctx.tanh, needs[0])
    return dx, *weight_gradients(dout, y, needs)


_swiglu_linear, _gelu_linear = (
    registration.differentiable(name, op, Composition(both), _save_with_product, _gradients_with_product, inputs=3)
    for name, op, both in (
        ("SwiGLULinear", "swiglu", _swiglu_then_product),
        ("GELULinear", "gelu", _gelu_then_product),
    )
)


def swiglu(x: Dual, *, linear: tuple[Tensor, Tensor | None] | None = None) -> Dual:
    """`pmf.reference.swiglu` by Triton."""
    return Dual(*(_swiglu_alone(*x) if linear is None else _swiglu_linear(x.value, *linear, x.dot)))


def gelu(x: Dual, *, approximate: str, linear: tuple[Tensor, Tensor | None] | None = None) -> Dual:
    """`pmf.reference.gelu` by Triton."""
    tanh = approximate == "tanh"
    return Dual(*(_gelu_alone(*x, tanh) if linear is None else _gelu_linear(x.value, *linear, x.dot, tanh)))
