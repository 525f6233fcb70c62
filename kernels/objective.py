"""`pmf_objective`: both squared errors per row of the heads' tokens, and the heads' gradients.

With c = clip(t, t_clip, 1), c' = 1 above t_clip and 0 below, on rows that carry a tangent:

    du/dt = (v_c - net_u_dot) / c - c' u / c = ((s - net_c) / c - net_u_dot) / c,  s = net_u where c' = 1, else z
    x_g   = x + guidance (net_c - net_n)
    e_u   = (x_g - net_u) / c + h du/dt         e_v = (x_g - net_v) / c
    L_u   = sum of e_u^2                        L_v = sum of e_v^2

z cancels out of du/dt above t_clip, and is read only below. Rows without a tangent have du/dt = 0 and
net_c = net_v, detached. Rows without a null-class prediction have x_g = x; a null_index beyond net_n makes
its row NaN (on a GPU, the indices are not checked).

Backward, with du/dt, net_c and net_n constant:  dnet_u = -2 dL_u e_u / c,  dnet_v = -2 dL_v e_v / c.

One kernel computes the errors in float32; the forward sums them, the backward scales and writes them. It reads
each token's pixels directly from the images, and writes nothing of an image's size but the gradients. Every
program sums a stretch of one row to a pair of floats; these are then added in a fixed order.

Saved: the inputs, which the step plan and the heads hold anyway.

Bytes moved per value, tokens of e bytes and images of e_x: forward 2 e + e_x, on rows with a tangent 2 e more,
on guided rows e more; backward the same and 2 e written. Channels are adjacent in tokens, but planes in images: a
thread takes all channels of a few adjacent pixels, 16 bytes at a time from both, and transposes its values.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.patches import Shape
from pmf.kernels.registration import Chip
from pmf.kernels.tiles import transposed


class Nets(NamedTuple):
    """Predictions as tokens, and u's tangent; in kernels, pointers."""

    u: Tensor
    v: Tensor
    u_dot: Tensor | None
    c: Tensor | None
    n: Tensor | None


class Scalars(NamedTuple):
    """One value per row; in kernels, pointers."""

    t: Tensor
    h: Tensor
    guidance: Tensor
    null_index: Tensor


@dataclass(frozen=True)
class PixelTile:
    """Groups of pixels per program, and pixels per group, which are adjacent in a line of one patch."""

    groups: int
    pixels: int
    warps: int


def tile_of(patch_size: int, channels: int, dtype: torch.dtype, chip: Chip) -> PixelTile:
    """One group of pixels per thread: adjacent ones, at most as many as there are values in 16 bytes of tokens.

    8 pixels of 3 channels are three 16-byte loads of an operand, 24 values per thread. More channels take fewer
    pixels: registers hold at most 32 values of an operand. A program is one warp, so that no warp waits for another.
    """
    side_by_side = patch_size & -patch_size  # the largest power of two that divides it
    few = min(side_by_side, 8 if dtype.itemsize == 2 else 4, max(32 // registration.power_of_two(channels), 1))
    return PixelTile(1024, few, 1) if chip.interpreted else PixelTile(32, few, 1)


@triton.jit
def _image_offset(i_pixel, W: tl.constexpr, P: tl.constexpr):
    """The offset in a channel of the image of pixel i_pixel of a row's tokens, laid out (patch, row, column)."""
    i_patch = i_pixel // (P * P)
    return (i_patch // (W // P) * P + i_pixel // P % P) * W + i_patch % (W // P) * P + i_pixel % P


@triton.jit
def _load_tokens(p_net, i_first, m_group, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Load pixels whose values begin at i_first, as CHANNELS blocks [groups, PIXELS]."""
    blocks = ()  # type: tuple
    for i in tl.static_range(CHANNELS):
        i_value = i_first[:, None] + (i * PIXELS + tl.arange(0, PIXELS))[None, :]
        blocks = blocks + (tl.load(p_net + i_value, mask=m_group[:, None], other=0.0),)
    return transposed(blocks, PIXELS, CHANNELS)


@triton.jit
def _load_image(p_image, i_first, m_group, PIXELS: tl.constexpr, CHANNELS: tl.constexpr, AREA: tl.constexpr):
    """Load the same pixels of an image; i_first is their offset in its first channel."""
    blocks = ()  # type: tuple
    for i in tl.static_range(CHANNELS):
        i_value = (i_first + i * AREA)[:, None] + tl.arange(0, PIXELS)[None, :]
        blocks = blocks + (tl.load(p_image + i_value, mask=m_group[:, None], other=0.0),)
    return blocks


@triton.jit
def _store_tokens(p_net, blocks, scale, i_first, m_group, PIXELS: tl.constexpr, CHANNELS: tl.constexpr):
    """Store the blocks times `scale`; the inverse of `_load_tokens`."""
    scaled = ()  # type: tuple
    for i in tl.static_range(CHANNELS):
        scaled = scaled + ((blocks[i] * scale).to(p_net.dtype.element_ty),)
    ordered = transposed(scaled, CHANNELS, PIXELS)
    for i in tl.static_range(CHANNELS):
        i_value = i_first[:, None] + (i * PIXELS + tl.arange(0, PIXELS))[None, :]
        tl.store(p_net + i_value, ordered[i], mask=m_group[:, None])


@triton.jit
def _errors(
    p_net, p_z, p_x, p_scalar, p_sums, p_scales, p_dnet_u, p_dnet_v, first_dot, null_rows, t_clip,
    SHAPE: tl.constexpr, GROUPS: tl.constexpr, PIXELS: tl.constexpr,
):  # fmt: skip
    """GROUPS groups of pixels of one row. p_net: `Nets`; p_scalar: `Scalars`; SHAPE: `Shape`.

    Forward: sums of squares to p_sums [2, B, chunks]. Backward: gradients, times p_scales [2, B]. All loads are
    issued before the first result is needed: operands that a row lacks are masked, not branched around.
    """
    CHANNELS: tl.constexpr = SHAPE.channels
    AREA: tl.constexpr = SHAPE.height * SHAPE.width
    VALUES: tl.constexpr = AREA * CHANNELS
    CHUNKS: tl.constexpr = (AREA + GROUPS * PIXELS - 1) // (GROUPS * PIXELS)
    i_chunk = tl.program_id(0) % CHUNKS
    i_b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    batch = tl.num_programs(0) // CHUNKS
    i_group = i_chunk * GROUPS + tl.arange(0, GROUPS)
    mask = i_group < AREA // PIXELS
    i_token = i_b * VALUES + i_group * (PIXELS * CHANNELS)
    i_image = i_b * VALUES + _image_offset(i_group * PIXELS, SHAPE.width, SHAPE.patch)

    t = tl.load(p_scalar.t + i_b).to(tl.float32)
    h = tl.load(p_scalar.h + i_b).to(tl.float32)
    guidance = tl.load(p_scalar.guidance + i_b).to(tl.float32)
    i_null = tl.load(p_scalar.null_index + i_b).to(tl.int64)
    moves, guided = i_b >= first_dot, i_null >= 0
    below = moves & (t <= t_clip)

    u = _load_tokens(p_net.u, i_token, mask, PIXELS, CHANNELS)
    v = _load_tokens(p_net.v, i_token, mask, PIXELS, CHANNELS)
    x = _load_image(p_x, i_image, mask, PIXELS, CHANNELS, AREA)
    u_dot, c, z, n = u, v, x, v  # placeholders for absent operands
    if p_net.u_dot is not None:
        i_token_dot = (i_b - first_dot) * VALUES + i_group * (PIXELS * CHANNELS)
        u_dot = _load_tokens(p_net.u_dot, i_token_dot, mask & moves, PIXELS, CHANNELS)
        c = _load_tokens(p_net.c, i_token_dot, mask & moves, PIXELS, CHANNELS)
        z = _load_image(p_z, i_image, mask & below, PIXELS, CHANNELS, AREA)
    if p_net.n is not None:
        inside = guided & (i_null < null_rows)  # never read beyond net_n
        n = _load_tokens(p_net.n, i_token + (i_null - i_b) * VALUES, mask & inside, PIXELS, CHANNELS)

    inverse_c = 1.0 / tl.minimum(tl.maximum(t, t_clip), 1.0)
    b_sum_u = tl.zeros([GROUPS, PIXELS], tl.float32)
    b_sum_v = tl.zeros([GROUPS, PIXELS], tl.float32)
    errors_u = ()  # type: tuple
    errors_v = ()  # type: tuple
    for i in tl.static_range(CHANNELS):
        b_x, b_u, b_v = x[i].to(tl.float32), u[i].to(tl.float32), v[i].to(tl.float32)
        b_c = b_v
        b_turn = tl.zeros([GROUPS, PIXELS], tl.float32)  # h du/dt
        if p_net.u_dot is not None:
            b_start = tl.where(below, z[i].to(tl.float32), b_u)
            b_c = tl.where(moves, c[i].to(tl.float32), b_v)
            b_slope = ((b_start - b_c) * inverse_c - u_dot[i].to(tl.float32)) * inverse_c
            b_turn = tl.where(moves, h * b_slope, 0.0)
        if p_net.n is not None:
            b_n = tl.where(i_null < null_rows, n[i].to(tl.float32), float("nan"))  # the row's errors become NaN
            b_x += tl.where(guided, guidance * (b_c - b_n), 0.0)
        b_error_u = (b_x - b_u) * inverse_c + b_turn
        b_error_v = (b_x - b_v) * inverse_c
        # Beyond the row every operand is zero, and so is the error.
        b_sum_u += b_error_u * b_error_u
        b_sum_v += b_error_v * b_error_v
        errors_u = errors_u + (b_error_u,)
        errors_v = errors_v + (b_error_v,)

    if p_sums is not None:
        tl.store(p_sums + i_b * CHUNKS + i_chunk, tl.sum(b_sum_u))
        tl.store(p_sums + (batch + i_b) * CHUNKS + i_chunk, tl.sum(b_sum_v))
    if p_scales is not None:
        scale_u = tl.load(p_scales + i_b) * (-2.0 * inverse_c)
        scale_v = tl.load(p_scales + batch + i_b) * (-2.0 * inverse_c)
        _store_tokens(p_dnet_u, errors_u, scale_u, i_token, mask, PIXELS, CHANNELS)
        _store_tokens(p_dnet_v, errors_v, scale_v, i_token, mask, PIXELS, CHANNELS)


def _tile(x: Tensor, net: Tensor, patch_size: int) -> tuple[PixelTile, int]:
    """The tile, and the number of programs per row."""
    tile = tile_of(patch_size, x.shape[1], net.dtype, registration.chip(x.device))
    return tile, registration.cdiv(x.shape[2] * x.shape[3], tile.groups * tile.pixels)


def _launch(nets: Nets, z, x, scalars: Scalars, t_clip, patch_size, *, sums=None, scales=None, gradients=(None, None)):
    """Run the kernel: sums of squares to `sums` [2, B, chunks], or gradients, times `scales` [2, B]."""
    batch, channels, height, width = z.shape
    first_dot = registration.first_dot(batch, nets.u_dot)
    tile, chunks = _tile(z, nets.u, patch_size)
    nets = Nets(*(None if net is None or net.numel() == 0 else net.contiguous() for net in nets))
    registration.launch(
        _errors, batch * chunks,
        nets, z.contiguous(), x.contiguous(), Scalars(*(s.contiguous() for s in scalars)), sums, scales, *gradients,
        first_dot, 0 if nets.n is None else len(nets.n), t_clip,
        SHAPE=Shape(height, width, patch_size, channels), GROUPS=tile.groups, PIXELS=tile.pixels, num_warps=tile.warps,
    )  # fmt: skip


@registration.operator
def objective_forward(
    net_u: Tensor,
    net_v: Tensor,
    net_u_dot: Tensor | None,
    net_c: Tensor | None,
    net_n: Tensor | None,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    h: Tensor,
    guidance: Tensor,
    null_index: Tensor,
    t_clip: float,
    patch_size: int,
) -> Tensor:
    """L_u and L_v, [2, B]."""
    if registration.shapes_only(z):
        return z.new_empty(2, z.shape[0], dtype=torch.float32)
    sums = z.new_empty(2, z.shape[0], _tile(z, net_u, patch_size)[1], dtype=torch.float32)
    nets, scalars = Nets(net_u, net_v, net_u_dot, net_c, net_n), Scalars(t, h, guidance, null_index)
    _launch(nets, z, x, scalars, t_clip, patch_size, sums=sums)
    return sums.sum(2)


@registration.gradient_operator("pmf_objective")
def objective_backward(
    scales: Tensor,
    net_u: Tensor,
    net_v: Tensor,
    net_u_dot: Tensor | None,
    net_c: Tensor | None,
    net_n: Tensor | None,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    h: Tensor,
    guidance: Tensor,
    null_index: Tensor,
    t_clip: float,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """dnet_u, dnet_v; `scales` [2, B] are the gradients of L_u and L_v."""
    gradients = net_u.new_empty(net_u.shape), net_v.new_empty(net_v.shape)
    if registration.shapes_only(scales):
        return gradients
    nets, scalars = Nets(net_u, net_v, net_u_dot, net_c, net_n), Scalars(t, h, guidance, null_index)
    scales = scales.float().contiguous()
    _launch(nets, z, x, scalars, t_clip, patch_size, scales=scales, gradients=gradients)
    return gradients


def _save(ctx, inputs, output):
    ctx.save_for_backward(*inputs[:11])
    ctx.options = inputs[11:]


def _gradients(ctx, scales):
    return objective_backward(scales, *ctx.saved_tensors, *ctx.options)


_objective = registration.differentiable("Objective", "pmf_objective", objective_forward, _save, _gradients, inputs=2)


def pmf_objective(
    net_u: Tensor,
    net_v: Tensor,
    net_u_dot: Tensor | None,
    net_c: Tensor | None,
    net_n: Tensor | None,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    h: Tensor,
    guidance: Tensor,
    null_index: Tensor,
    *,
    t_clip: float,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """`pmf.reference.pmf_objective` by Triton."""
    inputs = (net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index)
    constants = (None if value is None else value.detach() for value in inputs)
    losses = _objective(net_u, net_v, *constants, t_clip, patch_size)
    return losses[0], losses[1]
