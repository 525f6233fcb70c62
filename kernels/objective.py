"""`pmf_objective`: from the heads' tokens to both squared errors per row, and to the heads' gradients.

With c = clip(t, t_clip, 1), c' = 1 above t_clip and 0 below, on rows that carry a tangent:

    du/dt = (v_c - net_u_dot) / c - c' u / c = ((s - net_c) / c - net_u_dot) / c,  s = net_u where c' = 1, else z
    x_g   = x + guidance (net_c - net_n)
    e_u   = (x_g - net_u) / c + h du/dt         e_v = (x_g - net_v) / c
    L_u   = sum of e_u^2                        L_v = sum of e_v^2

z cancels out of du/dt above t_clip, and is read only below. Rows before carry no tangent: du/dt = 0 and
net_c = net_v, cut off from gradients. Rows without a null-class prediction have x_g = x; a null_index beyond
net_n makes its row NaN (on a GPU nobody reads the indices to check them).

Backward, with du/dt, net_c and net_n constant:  dnet_u = -2 dL_u e_u / c,  dnet_v = -2 dL_v e_v / c.

One kernel computes the errors, in float32; the forward sums them, the backward scales and writes them.
Images are read where the tokens lie in them: nothing of an image's size is written but the gradients. Every
program sums a stretch of one row to a pair of floats; those are added in a fixed order afterwards.

Saved: the inputs, which the step plan and the heads hold anyway.

Bytes moved a value, tokens of e bytes and images of e_x: forward 2 e + e_x, on rows with a tangent 2 e more,
on guided rows e more; backward the same and 2 e written. Consecutive values of a token lie apart in an image
(channels are planes there), so images are read one value a thread; a warp's reads share their sectors.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.registration import Chip


@dataclass(frozen=True)
class Tile:
    """Values of one row of the batch that a program works on."""

    block: int
    warps: int


def tile_of(chip: Chip) -> Tile:
    """8 values a thread and operand, one 16-byte load of bfloat16: five operands in flight."""
    return Tile(8192, 1) if chip.interpreted else Tile(2048, 8)


@triton.jit
def _image_offset(i_value, H: tl.constexpr, W: tl.constexpr, P: tl.constexpr, CHANNELS: tl.constexpr):
    """Where value i_value of a row's tokens, laid out (patch, row, column, channel), lies in its image."""
    i_channel = i_value % CHANNELS
    i_column = i_value // CHANNELS % P
    i_line = i_value // (CHANNELS * P) % P
    i_patch = i_value // (CHANNELS * P * P)
    i_y, i_x = i_patch // (W // P) * P + i_line, i_patch % (W // P) * P + i_column
    return (i_channel * H + i_y) * W + i_x


@triton.jit
def _errors(
    p_net_u, p_net_v, p_net_u_dot, p_net_c, p_net_n, p_z, p_x, p_t, p_h, p_guidance, p_null_index,
    p_sums, p_scales, p_dnet_u, p_dnet_v,
    first_dot, null_rows, t_clip,
    SHAPE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """BLOCK values of one row. SHAPE: height, width, patch size and channels of the images.

    Forward: sums of squares to p_sums [2, B, chunks]. Backward: gradients, times p_scales [2, B].
    """
    VALUES: tl.constexpr = SHAPE[0] * SHAPE[1] * SHAPE[3]
    CHUNKS: tl.constexpr = (VALUES + BLOCK - 1) // BLOCK
    i_chunk = tl.program_id(0) % CHUNKS
    i_b = (tl.program_id(0) // CHUNKS).to(tl.int64)
    batch = tl.num_programs(0) // CHUNKS
    i_v = i_chunk * BLOCK + tl.arange(0, BLOCK)
    mask = i_v < VALUES
    i_image = i_b * VALUES + _image_offset(i_v, SHAPE[0], SHAPE[1], SHAPE[2], SHAPE[3])
    i_token = i_b * VALUES + i_v

    t = tl.load(p_t + i_b).to(tl.float32)
    inverse_c = 1.0 / tl.minimum(tl.maximum(t, t_clip), 1.0)
    b_u = tl.load(p_net_u + i_token, mask=mask, other=0.0).to(tl.float32)
    b_v = tl.load(p_net_v + i_token, mask=mask, other=0.0).to(tl.float32)
    b_x = tl.load(p_x + i_image, mask=mask, other=0.0).to(tl.float32)
    b_c = b_v
    b_turn = tl.zeros([BLOCK], tl.float32)  # h du/dt
    if p_net_u_dot is not None:
        if i_b >= first_dot:
            i_token_dot = (i_b - first_dot) * VALUES + i_v
            b_u_dot = tl.load(p_net_u_dot + i_token_dot, mask=mask, other=0.0).to(tl.float32)
            b_c = tl.load(p_net_c + i_token_dot, mask=mask, other=0.0).to(tl.float32)
            b_start = b_u
            if t <= t_clip:
                b_start = tl.load(p_z + i_image, mask=mask, other=0.0).to(tl.float32)
            h = tl.load(p_h + i_b).to(tl.float32)
            b_turn = h * (((b_start - b_c) * inverse_c - b_u_dot) * inverse_c)
    if p_net_n is not None:
        i_null = tl.load(p_null_index + i_b).to(tl.int64)
        if i_null >= 0:
            inside = i_null < null_rows  # what lies beyond is not read, and the row's errors become NaN
            b_n = tl.load(p_net_n + i_null * VALUES + i_v, mask=mask & inside, other=0.0).to(tl.float32)
            b_n = tl.where(mask & (i_null >= null_rows), float("nan"), b_n)
            b_x += tl.load(p_guidance + i_b).to(tl.float32) * (b_c - b_n)
    b_error_u = (b_x - b_u) * inverse_c + b_turn
    b_error_v = (b_x - b_v) * inverse_c

    if p_sums is not None:
        # Beyond the row every operand is zero, and so is the error.
        tl.store(p_sums + i_b * CHUNKS + i_chunk, tl.sum(b_error_u * b_error_u))
        tl.store(p_sums + (batch + i_b) * CHUNKS + i_chunk, tl.sum(b_error_v * b_error_v))
    if p_scales is not None:
        b_du = b_error_u * (tl.load(p_scales + i_b) * (-2.0 * inverse_c))
        b_dv = b_error_v * (tl.load(p_scales + batch + i_b) * (-2.0 * inverse_c))
        tl.store(p_dnet_u + i_token, b_du.to(p_dnet_u.dtype.element_ty), mask=mask)
        tl.store(p_dnet_v + i_token, b_dv.to(p_dnet_v.dtype.element_ty), mask=mask)


def _launch(nets, z, x, scalars, t_clip, patch_size, *outputs):
    """Run the kernel on the inputs and (sums, scales, dnet_u, dnet_v)."""
    first_dot = registration.first_dot(len(z), nets[2])
    nets = [None if net is None or net.numel() == 0 else net.contiguous() for net in nets]
    t, h, guidance, null_index = (s.contiguous() for s in scalars)
    batch, channels, height, width = z.shape
    tile = tile_of(registration.chip(z.device))
    registration.launch(
        _errors, batch * triton.cdiv(z[0].numel(), tile.block) if z.numel() else 0,
        *nets, z.contiguous(), x.contiguous(), t, h, guidance, null_index, *outputs,
        first_dot, 0 if nets[4] is None else len(nets[4]), t_clip,
        SHAPE=(height, width, patch_size, channels), BLOCK=tile.block, num_warps=tile.warps,
    )  # fmt: skip


def _fake_forward(
    net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index, t_clip, patch_size
):  # fmt: skip
    """L_u and L_v, [2, B]."""
    return z.new_empty(2, z.shape[0], dtype=torch.float32)


def _run_forward(
    net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index, t_clip, patch_size
):  # fmt: skip
    chunks = triton.cdiv(z[0].numel(), tile_of(registration.chip(z.device)).block) if len(z) else 1
    sums = z.new_empty(2, z.shape[0], chunks, dtype=torch.float32)
    nets = (net_u, net_v, net_u_dot, net_c, net_n)
    _launch(nets, z, x, (t, h, guidance, null_index), t_clip, patch_size, sums, None, None, None)
    return sums.sum(2)


def _fake_backward(
    scales, net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index, t_clip, patch_size
):  # fmt: skip
    """dnet_u, dnet_v; `scales` [2, B] are the gradients of L_u and L_v."""
    return net_u.new_empty(net_u.shape), net_v.new_empty(net_v.shape)


def _run_backward(
    scales, net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index, t_clip, patch_size
):  # fmt: skip
    gradients = net_u.new_empty(net_u.shape), net_v.new_empty(net_v.shape)
    nets, scalars = (net_u, net_v, net_u_dot, net_c, net_n), (t, h, guidance, null_index)
    _launch(nets, z, x, scalars, t_clip, patch_size, None, scales.float().contiguous(), *gradients)
    return gradients


_INPUTS = (
    "Tensor net_u, Tensor net_v, Tensor? net_u_dot, Tensor? net_c, Tensor? net_n, Tensor z, Tensor x, "
    "Tensor t, Tensor h, Tensor guidance, Tensor null_index, float t_clip, int patch_size"
)
_objective_forward = registration.define(f"objective_forward({_INPUTS}) -> Tensor", _run_forward, _fake_forward)
_objective_backward = registration.define(
    f"objective_backward(Tensor scales, {_INPUTS}) -> (Tensor, Tensor)", _run_backward, _fake_backward
)


class _Objective(torch.autograd.Function):
    """The operator's inputs -> L_u and L_v [2, B]."""

    @staticmethod
    def forward(
        net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index, t_clip, patch_size
    ):  # fmt: skip
        nets = (net_u, net_v, net_u_dot, net_c, net_n)
        return _objective_forward(*nets, z, x, t, h, guidance, null_index, t_clip, patch_size)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs[:11])
        ctx.options = inputs[11:]

    @staticmethod
    def backward(ctx, scales):
        gradients = _objective_backward(scales, *ctx.saved_tensors, *ctx.options)
        return *gradients, *(None,) * 11


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
    """Triton's `pmf.ops.pmf_objective`: L_u, L_v per row."""
    inputs = (net_u, net_v, net_u_dot, net_c, net_n, z, x, t, h, guidance, null_index)

    def compute(primals, tangents):
        constants = (None if value is None else value.detach() for value in primals[2:])
        losses = registration.apply(_Objective, *primals[:2], *constants, t_clip, patch_size)
        return (losses[0], losses[1]), tangents[:2]

    names = "net_u net_v net_u_dot net_c net_n z x t h guidance null_index"
    return registration.run_dual("pmf_objective", names, compute, inputs, (None,) * len(inputs))[0]
