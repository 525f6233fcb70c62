"""Normalise and modulate, alone or after a gated residual: `norm_modulate`, `residual_norm_modulate`.

    x_new = x + gate branch                        x_new_dot = x_dot + gate branch_dot + gate_dot branch
    n     = (x_new - mu) rstd                      n_dot     = rstd (c_dot - n mean(n c_dot))
    y     = n weight (1 + scale) + shift           y_dot     = n_dot weight (1 + scale)
                                                               + n weight scale_dot + shift_dot

mu = 0 for "rms"; c_dot = x_new_dot, minus its mean for "layer". Without a branch, x_new = x; without a gate it is one.
gate, scale and shift are per channel [C], per sample [B, C] or per token [B, S, C]. Everything
between loads and stores is float32; x_new is rounded to the dtype of x before it is normalised.

Backward, with f = weight (1 + scale) and dx_new the gradient of x_new from its other uses:

    dx = dx_new + rstd (c - n mean(n c)), c = f dy (minus its mean)      dbranch = gate dx
    A = sum over tokens of n dy:  dscale = weight A, dweight = sum over samples of (1 + scale) A
    dshift = sum of dy            dgate = sum of dx branch

Sums over tokens: see sums.py. A parameter per token has the terms as its gradient; only dweight is a sum then.

Saved: x_new (x without a branch), branch if gate needs a gradient, the parameters, and rstd (for
"layer" mu too) as float32: 4 or 8 bytes per row. Nothing is saved for tangents. With `recompute_sum`, x and branch are
saved, and backward adds them up again; this takes less memory if something else keeps x. With the product behind the
norm (`linear`), y is not kept for that: backward writes it again, C e_y bytes more (products.py).

Bytes moved per row of C values, x of e_x bytes, y of e_y, branch of e_b, and each parameter per token once more,
its gradient too; this is the minimum, except for the partial sums (2% at pMF's shapes) and vectors per channel or
sample, read once per tile:
    norm_modulate            forward C (e_x + e_y), twice that with a tangent
                             backward C (2 e_x + e_y)
    residual_norm_modulate   forward C (2 e_x + e_b + e_y), twice that with a tangent
                             backward C (3 e_x + 2 e_b + e_y), one e_b less if gate needs no gradient
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import products, registration
from pmf.kernels.modulations import Modulations, as_rows, forward_tile, load_tile, per_token, step_of
from pmf.kernels.norm_backward import norm_backward
from pmf.kernels.registration import Composition
from pmf.kernels.tiles import load_vector, normalise, normalise_dot
from pmf.pair import Dual

MAX_WIDTH = 8192
"""The widest row that a program keeps in registers."""


def unsupported(width: int) -> str | None:
    """The reason why the kernels cannot take rows of this width, or None if they can."""
    if width <= MAX_WIDTH:
        return None
    return f'width must be at most {MAX_WIDTH} with impl="triton", got {width}'


@triton.jit
def _forward(
    p_x, p_branch, p_x_dot, p_branch_dot, p, p_weight, p_x_new, p_y, p_x_new_dot, p_y_dot, p_stats,
    length, first_dot, eps,
    STEPS: tl.constexpr, TOKEN: tl.constexpr, C: tl.constexpr, LAYER: tl.constexpr, ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """ROWS tokens of one sample. p, STEPS, TOKEN: `Modulations`, as pointers, as strides, and whether per token."""
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
    i_row_dot = i_b_dot * length + i_s
    m_dot = mask & (i_b_dot >= 0)
    b_x = tl.load(p_x + i_row * C + i_tile, mask=mask, other=0.0).to(tl.float32)
    b_x_dot = tl.zeros([ROWS, BLOCK], tl.float32)
    if p_branch is not None:
        b_branch = tl.load(p_branch + i_row * C + i_tile, mask=mask, other=0.0)
    if p_x_dot is not None:
        b_x_dot = tl.load(p_x_dot + i_row_dot * C + i_tile, mask=m_dot, other=0.0).to(tl.float32)
    if p_branch_dot is not None:
        b_branch_dot = tl.load(p_branch_dot + i_row_dot * C + i_tile, mask=m_dot, other=0.0)
    if TOKEN.scale:
        b_scale = load_tile(p.scale, i_row, mask, STEPS.scale, ROWS, BLOCK)
    if TOKEN.shift:
        b_shift = load_tile(p.shift, i_row, mask, STEPS.shift, ROWS, BLOCK)
    if TOKEN.scale_dot:
        b_scale_dot = load_tile(p.scale_dot, i_row_dot, m_dot, STEPS.scale_dot, ROWS, BLOCK)
    if TOKEN.shift_dot:
        b_shift_dot = load_tile(p.shift_dot, i_row_dot, m_dot, STEPS.shift_dot, ROWS, BLOCK)
    if p_branch is not None:
        b_gate = tl.full([1, BLOCK], 1.0, tl.float32)
        if TOKEN.gate:
            b_gate = load_tile(p.gate, i_row, mask, STEPS.gate, ROWS, BLOCK)
        elif p.gate is not None:
            b_gate = load_vector(p.gate + i_b * STEPS.gate, i_c, C)
        b_x_new = (b_x + b_gate * b_branch.to(tl.float32)).to(p_x_new.dtype.element_ty)
        tl.store(p_x_new + i_row * C + i_tile, b_x_new, mask=mask)
        b_x = b_x_new.to(tl.float32)
        if p_branch_dot is not None:
            b_x_dot += b_gate * b_branch_dot.to(tl.float32)
        if TOKEN.gate_dot:
            b_gate_dot = load_tile(p.gate_dot, i_row_dot, m_dot, STEPS.gate_dot, ROWS, BLOCK)
            b_x_dot += b_gate_dot * b_branch.to(tl.float32)
        elif p.gate_dot is not None:
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
        if not TOKEN.scale:
            b_scale = load_vector(p.scale + i_b * STEPS.scale, i_c, C)
        b_one_plus = 1.0 + b_scale
        b_factor = b_factor * b_one_plus
        b_y = b_y * b_one_plus
    if p.shift is not None:
        if not TOKEN.shift:
            b_shift = load_vector(p.shift + i_b * STEPS.shift, i_c, C)
        b_y += b_shift
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
                if not TOKEN.scale_dot:
                    b_scale_dot = load_vector(p.scale_dot + i_b_dot * STEPS.scale_dot, i_c, C)
                b_y_dot += b_weighted * b_scale_dot
            if p.shift_dot is not None:
                if not TOKEN.shift_dot:
                    b_shift_dot = load_vector(p.shift_dot + i_b_dot * STEPS.shift_dot, i_c, C)
                b_y_dot += b_shift_dot
            tl.store(p_y_dot + i_row_dot * C + i_tile, b_y_dot.to(p_y_dot.dtype.element_ty), mask=mask)


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
    given = (gate, scale, shift, gate_dot, scale_dot, shift_dot)
    modulations = [as_rows(m) for m in given]
    token = Modulations(*map(per_token, given))
    tile = forward_tile(width, branch is None and x_dot is None, registration.chip(x.device))
    registration.launch(
        _forward, samples * registration.cdiv(length, tile.rows),
        *streams, Modulations(*modulations), weight, x_new, y, x_new_dot, y_dot, stats, length, first_dot, eps,
        STEPS=Modulations(*map(step_of, modulations)), TOKEN=token,
        C=width, LAYER=layer, ROWS=tile.rows, BLOCK=tile.block, num_warps=tile.warps,
        maxnreg=112 if any(token) and tile.block <= 4096 else None,  # else Triton 3.6 keeps to 80 and spills
    )  # fmt: skip
    return x_new, y, x_new_dot, y_dot, stats


def _then_product(run):
    """(..., matrix, bias, tangents, ...) -> x_new, out, x_new_dot, out_dot and the statistics."""
    norm = run(norm_forward)

    def forward(
        x, branch, gate, weight, scale, shift, matrix, bias,
        x_dot, branch_dot, gate_dot, scale_dot, shift_dot, layer, eps, out_dtype,
    ):  # fmt: skip
        inputs = x, branch, gate, weight, scale, shift, x_dot, branch_dot, gate_dot, scale_dot, shift_dot
        x_new, y, x_new_dot, y_dot, stats = norm(*inputs, layer, eps, out_dtype)
        out, out_dot = products.product(y, y_dot, matrix, bias)
        return x_new, out, x_new_dot, out_dot, stats

    return forward


def _keep(ctx, inputs: tuple, outputs: tuple, add: bool, *more: Tensor) -> None:
    """Save what the gradients of the norm read, and `more`."""
    x, branch, gate, weight, scale, shift, *_, layer, _, out_dtype = inputs
    ctx.options = layer, x.dtype if branch is None else branch.dtype, branch is not None, out_dtype, add
    summed = x if branch is None or add else outputs[0]
    kept = branch if add or ctx.needs_input_grad[2] else None
    ctx.save_for_backward(summed, kept, gate, weight, scale, shift, outputs[4], *more)


def _norm_gradients(ctx, saved: Sequence, dx_new: Tensor | None, dy: Tensor | None, again: bool = False) -> tuple:
    """The gradients of x, branch and parameters, and y if `again`."""
    (x, _, gate, *_), (layer, branch_dtype, residual, out_dtype, add) = saved, ctx.options
    if not residual:
        dx_new = None  # compilers pass an empty tensor for the absent x_new
    if dy is None:
        dy = torch.zeros_like(x, dtype=out_dtype)
    alike = gate is None and branch_dtype == x.dtype  # then dbranch is dx
    written = branch_dtype if residual and not alike else None
    needs = list(ctx.needs_input_grad[2:6])
    dx, dbranch, *others = norm_backward(dy, dx_new, *saved, written, layer, residual, needs, add, again)
    return dx, dx if residual and alike else dbranch, *others


def _saving(add: bool, with_product: bool) -> Callable:
    def save(ctx, inputs, outputs):
        _keep(ctx, inputs, outputs, add, *inputs[6:7] if with_product else ())

    return save


def _gradients(ctx, dx_new, dy, *_):
    return _norm_gradients(ctx, ctx.saved_tensors, dx_new, dy)[:6]


def _gradients_with_product(ctx, dx_new, dout, *_):
    *saved, matrix = ctx.saved_tensors
    if dout is None:
        return *_norm_gradients(ctx, saved, dx_new, None)[:6], None, None
    needs = ctx.needs_input_grad[6:8]
    dy = products.input_gradient(dout, matrix, any(ctx.needs_input_grad[:6]))
    *found, y = _norm_gradients(ctx, saved, dx_new, dy, again=needs[0])
    return *found, *products.weight_gradients(dout, y, needs)


def _recorded(op: str, add: bool = False) -> tuple[Callable, Callable]:
    """The norm alone, and with the product behind it."""
    alone = registration.differentiable("Norm", op, norm_forward, _saving(add, False), _gradients, inputs=6, outputs=2)
    parts = Composition(_then_product), _saving(add, True), _gradients_with_product
    return alone, registration.differentiable("NormLinear", op, *parts, inputs=8, outputs=2)


_norm = _recorded("norm_modulate")
_residual_norm = _recorded("residual_norm_modulate")
_residual_norm_of_terms = _recorded("residual_norm_modulate", add=True)


def norm_modulate(
    x: Dual, weight: Tensor | None, scale: Dual, shift: Dual,
    *, kind: str, eps: float, out_dtype: torch.dtype, linear: tuple[Tensor, Tensor | None] | None = None,
) -> Dual:  # fmt: skip
    """`pmf.reference.norm_modulate` by Triton."""
    alone, with_product = _norm
    values = x.value, None, None, weight, scale.value, shift.value
    moving = x.dot, None, None, scale.dot, shift.dot, kind == "layer", eps, out_dtype
    given = (*values, *moving) if linear is None else (*values, *linear, *moving)
    _, y, _, y_dot, _ = (alone if linear is None else with_product)(*given)
    return Dual(y, y_dot)


def residual_norm_modulate(
    x: Dual, branch: Dual, gate: Dual, weight: Tensor | None, scale: Dual, shift: Dual,
    *, kind: str, eps: float, out_dtype: torch.dtype, linear: tuple[Tensor, Tensor | None] | None = None,
    recompute_sum: bool = False,
) -> tuple[Dual, Dual]:  # fmt: skip
    """`pmf.reference.residual_norm_modulate` by Triton."""
    alone, with_product = _residual_norm_of_terms if recompute_sum else _residual_norm
    values = x.value, branch.value, gate.value, weight, scale.value, shift.value
    moving = x.dot, branch.dot, gate.dot, scale.dot, shift.dot, kind == "layer", eps, out_dtype
    given = (*values, *moving) if linear is None else (*values, *linear, *moving)
    x_new, y, x_new_dot, y_dot, _ = (alone if linear is None else with_product)(*given)
    return Dual(x_new, x_new_dot), Dual(y, y_dot)
