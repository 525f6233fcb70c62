"""The gradients of `patch_embed`, in two passes: one over the gradient of the tokens, one over the images.

With dp the gradient of the patch tokens (dtokens after the prefix):

    dhidden  = dp weight2      dweight2 = dp^T hidden     dweight1 = dhidden^T patches
    dpositions = sum over samples of dtokens              dimages  = dhidden weight1, each at its patch
    dbias2   = sum of dpositions after the prefix         dbias1   = dbias2 weight2

The first pass runs two kinds of programs side by side. Some own positions and channels and loop over the samples:
they sum dtokens and dp^T hidden. The others own patches and loop over the channels: they compute dhidden. Both
visit the samples in the same order, so that one kind finds in L2 what the other read from memory. Operands are
rounded to the products' dtype in registers: nothing of the tokens' size is written. The second pass reads patches
directly from the images and sums dhidden^T patches over stretches of patches, each in registers.

Sums over parts of the samples or patches are float32, and are added in a fixed order. Bytes moved, tokens and
images of e_y and e_x bytes: the minimum, B S C e_y + B N (E e + p p c e_x), plus 2 B N E e for dhidden, and 8 E C
or 8 E p p c for every part. Weights, and dhidden for all but one column of tiles, are read from L2.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.patches import Shape, patch_offset, value_offset
from pmf.kernels.registration import Chip
from pmf.kernels.tiles import product


@dataclass(frozen=True)
class GradientTile:
    """First pass: positions or patches per program, and channels. Second pass: values of a patch.

    block_e covers the bottleneck; dweight1 takes `positions` patches at a time.
    """

    positions: int
    patches: int
    channels: int
    values: int
    block_e: int
    warps: int
    stages: int


def tile_of(bottleneck: int, values: int, dtype: torch.dtype, chip: Chip) -> GradientTile:
    """Sums [channels or values, bottleneck] take 64 registers per thread; loads of three iterations are in flight."""
    block_e = max(registration.power_of_two(bottleneck), 16)
    few = min(max(registration.power_of_two(values), 16), 64)
    if chip.interpreted:
        return GradientTile(128, 128, 128, min(max(registration.power_of_two(values), 16), 256), block_e, 1, 1)
    if dtype == torch.float32:
        return GradientTile(32, 32, 32, min(few, 32), block_e, 8, 2)
    return GradientTile(32, 64, 64, few, block_e, 8 if block_e > 128 else 4, 3)


@triton.jit
def _sum_over_samples(
    p_dtokens, p_hidden, p_dpositions, p_dweight2, i_program, samples, part, prefix,
    PATCHES: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """M positions and BLOCK_C channels: their sum over one part of the samples, and dp^T hidden if hidden is given.

    p_dpositions [parts, S, C]; p_dweight2 [parts, tiles of positions, C, E].
    """
    length = prefix + PATCHES
    blocks = tl.cdiv(C, BLOCK_C)
    i_m = i_program // blocks % tl.cdiv(length, M)
    i_part = i_program // blocks // tl.cdiv(length, M)
    i_n = i_m * M + tl.arange(0, M)
    i_c = i_program % blocks * BLOCK_C + tl.arange(0, BLOCK_C)
    i_e = tl.arange(0, BLOCK_E)
    mask = (i_n < length)[:, None] & (i_c < C)[None, :]
    m_patch = (i_n >= prefix) & (i_n < length)
    b_sum = tl.zeros([M, BLOCK_C], tl.float32)
    b_dw = tl.zeros([BLOCK_C, BLOCK_E], tl.float32)
    for i_b in range(i_part * part, tl.minimum(i_part * part + part, samples)):
        p_row = p_dtokens + (i_b * length + i_n[:, None]).to(tl.int64) * C + i_c[None, :]
        b_d = tl.load(p_row, mask=mask, other=0.0)
        b_sum += b_d.to(tl.float32)
        if p_hidden is not None:
            p_h = p_hidden + (i_b * PATCHES + i_n[:, None] - prefix).to(tl.int64) * E + i_e[None, :]
            b_h = tl.load(p_h, mask=m_patch[:, None] & (i_e < E)[None, :], other=0.0)
            b_dp = tl.where(m_patch[:, None], b_d, 0.0).to(b_h.dtype)
            b_dw = product(tl.trans(b_dp), b_h, b_dw)
    p_sum = p_dpositions + (i_part.to(tl.int64) * length + i_n[:, None]) * C + i_c[None, :]
    tl.store(p_sum, b_sum, mask=mask)
    if p_hidden is not None:
        i_row = (i_program // blocks).to(tl.int64) * C + i_c
        tl.store(p_dweight2 + i_row[:, None] * E + i_e[None, :], b_dw, mask=(i_c < C)[:, None] & (i_e < E)[None, :])


@triton.jit
def _hidden_gradient(
    p_dtokens, p_weight2, p_dhidden, i_tile, count, prefix,
    PATCHES: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """dp weight2 of M of `count` patches."""
    i_m, i_e = i_tile * M + tl.arange(0, M), tl.arange(0, BLOCK_E)
    m_m, m_e = (i_m < count)[:, None], i_e < E
    i_row = (i_m // PATCHES).to(tl.int64) * (prefix + PATCHES) + prefix + i_m % PATCHES
    b_dh = tl.zeros([M, BLOCK_E], tl.float32)
    for i_start in range(0, C, BLOCK_C):
        i_c = i_start + tl.arange(0, BLOCK_C)
        b_d = tl.load(p_dtokens + i_row[:, None] * C + i_c[None, :], mask=m_m & (i_c < C)[None, :], other=0.0)
        b_w = tl.load(p_weight2 + i_c[:, None] * E + i_e[None, :], mask=(i_c < C)[:, None] & m_e[None, :], other=0.0)
        b_dh = product(b_d.to(b_w.dtype), b_w, b_dh)
    p_dh = p_dhidden + i_m.to(tl.int64)[:, None] * E + i_e[None, :]
    tl.store(p_dh, b_dh.to(p_dhidden.dtype.element_ty), mask=m_m & m_e[None, :])


@triton.jit
def _token_gradients(
    p_dtokens, p_hidden, p_weight2, p_dpositions, p_dweight2, p_dhidden, samples, parts, prefix,
    PATCHES: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, M_HIDDEN: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The first pass: sums first, as they take longest; then dhidden, a tile from each part of the samples in turn."""
    part = tl.cdiv(samples, parts)
    sums = parts * tl.cdiv(prefix + PATCHES, M) * tl.cdiv(C, BLOCK_C)
    i_program = tl.program_id(0)
    if i_program < sums:
        _sum_over_samples(
            p_dtokens, p_hidden, p_dpositions, p_dweight2, i_program, samples, part, prefix,
            PATCHES, E, C, M, BLOCK_E, BLOCK_C,
        )  # fmt: skip
    if p_dhidden is not None:
        if i_program >= sums:
            i_tile = i_program - sums
            tiles = tl.cdiv(samples * PATCHES, M_HIDDEN)
            i_tile = i_tile % parts * tl.cdiv(tiles, parts) + i_tile // parts
            if i_tile < tiles:
                _hidden_gradient(
                    p_dtokens, p_weight2, p_dhidden, i_tile, samples * PATCHES, prefix,
                    PATCHES, E, C, M_HIDDEN, BLOCK_E, BLOCK_C,
                )  # fmt: skip


@triton.jit
def _weight_gradient(
    p_dhidden, p_images, p_partial, count, stretch,
    SHAPE: tl.constexpr, E: tl.constexpr, M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dhidden^T patches over one stretch of patches and BLOCK_K values: a part of p_partial [stretches, E, K]."""
    K: tl.constexpr = SHAPE.channels * SHAPE.patch * SHAPE.patch
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    i_stretch = tl.program_id(0) // TILES
    i_k, i_e = tl.program_id(0) % TILES * BLOCK_K + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_E)
    offset = value_offset(i_k, SHAPE)[None, :]
    stop = tl.minimum(i_stretch * stretch + stretch, count)
    b_dw = tl.zeros([BLOCK_E, BLOCK_K], tl.float32)
    for i_start in range(i_stretch * stretch, stop, M):
        i_m = i_start + tl.arange(0, M)
        m_m = (i_m < stop)[:, None]
        p_dh = p_dhidden + i_m.to(tl.int64)[:, None] * E + i_e[None, :]
        b_dh = tl.load(p_dh, mask=m_m & (i_e < E)[None, :], other=0.0)
        p_x = p_images + patch_offset(i_m, SHAPE)[:, None] + offset
        b_x = tl.load(p_x, mask=m_m & (i_k < K)[None, :], other=0.0)
        b_dw = product(tl.trans(b_dh), b_x.to(b_dh.dtype), b_dw)
    p_dw = p_partial + (i_stretch.to(tl.int64) * E + i_e[:, None]) * K + i_k[None, :]
    tl.store(p_dw, b_dw, mask=(i_e < E)[:, None] & (i_k < K)[None, :])


@triton.jit
def _image_gradient(
    p_dhidden, p_weight1, p_dimages, count,
    SHAPE: tl.constexpr, E: tl.constexpr, M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dhidden weight1 of M patches and BLOCK_K values, written to their places in the image."""
    K: tl.constexpr = SHAPE.channels * SHAPE.patch * SHAPE.patch
    TILES: tl.constexpr = (K + BLOCK_K - 1) // BLOCK_K
    i_m = tl.program_id(0) // TILES * M + tl.arange(0, M)
    i_k = tl.program_id(0) % TILES * BLOCK_K + tl.arange(0, BLOCK_K)
    b_dx = tl.zeros([M, BLOCK_K], tl.float32)
    m_m, m_k = (i_m < count)[:, None], (i_k < K)[None, :]
    for i_start in range(0, E, BLOCK_E):
        i_e = i_start + tl.arange(0, BLOCK_E)
        p_dh = p_dhidden + i_m.to(tl.int64)[:, None] * E + i_e[None, :]
        b_dh = tl.load(p_dh, mask=m_m & (i_e < E)[None, :], other=0.0)
        b_w = tl.load(p_weight1 + i_e[:, None] * K + i_k[None, :], mask=(i_e < E)[:, None] & m_k, other=0.0)
        b_dx = product(b_dh, b_w, b_dx)
    p_dx = p_dimages + patch_offset(i_m, SHAPE)[:, None] + value_offset(i_k, SHAPE)[None, :]
    tl.store(p_dx, b_dx.to(p_dimages.dtype.element_ty), mask=m_m & m_k)


def _of_tokens(dtokens, hidden, weight2, prefix, tile, processors, *, wants_dweight2, wants_dhidden):
    """The first pass: dpositions, dweight2 (both float32) and dhidden; None for those not wanted."""
    samples, length, width = dtokens.shape
    patches, bottleneck = hidden.shape[1:]
    blocks = registration.cdiv(length, tile.positions) * registration.cdiv(width, tile.channels)
    parts = min(max(2 * processors // blocks, 1), samples)
    parts = registration.cdiv(samples, registration.cdiv(samples, parts))  # so that none is empty
    dpositions = dtokens.new_empty(parts, length, width, dtype=torch.float32)
    shape = (parts * registration.cdiv(length, tile.positions), width, bottleneck)
    dweight2 = dtokens.new_empty(shape, dtype=torch.float32) if wants_dweight2 else None
    dhidden = torch.empty_like(hidden) if wants_dhidden else None
    tiles = registration.cdiv(registration.cdiv(samples * patches, tile.patches), parts) * parts if wants_dhidden else 0
    registration.launch(
        _token_gradients, parts * blocks + tiles, dtokens, hidden if wants_dweight2 else None, weight2,
        dpositions, dweight2, dhidden, samples, parts, prefix,
        PATCHES=patches, E=bottleneck, C=width, M=tile.positions, M_HIDDEN=tile.patches,
        BLOCK_E=tile.block_e, BLOCK_C=tile.channels, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return dpositions.sum(0), dweight2 if dweight2 is None else dweight2.sum(0), dhidden


def _of_weight1(dhidden, images, weight1, tile, processors) -> Tensor:
    """dweight1 in float32, by about one program per processor so that all end together."""
    shape, count = Shape.of(images, weight1), dhidden.shape[0] * dhidden.shape[1]
    tiles = registration.cdiv(weight1[0].numel(), tile.values)
    step = tile.positions
    stretch = registration.cdiv(count, max(processors // tiles, 1) * step) * step
    partial = images.new_empty(registration.cdiv(count, stretch), *weight1.shape, dtype=torch.float32)
    registration.launch(
        _weight_gradient, len(partial) * tiles, dhidden, images, partial, count, stretch,
        SHAPE=shape, E=len(weight1), M=step, BLOCK_E=tile.block_e, BLOCK_K=tile.values,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return partial.sum(0)


def _of_images(dhidden, images, weight1, tile) -> Tensor:
    """dimages, in the dtype of the images."""
    dimages = images.new_empty(images.shape)
    count = dhidden.shape[0] * dhidden.shape[1]
    registration.launch(
        _image_gradient, registration.cdiv(count, tile.patches) * registration.cdiv(weight1[0].numel(), tile.values),
        dhidden, weight1.to(dhidden.dtype).contiguous(), dimages, count,
        SHAPE=Shape.of(images, weight1), E=len(weight1), M=tile.patches, BLOCK_E=min(tile.block_e, 64),
        BLOCK_K=tile.values, num_warps=tile.warps, num_stages=2,
    )  # fmt: skip
    return dimages


@registration.gradient_operator("patch_embed")
def patch_backward(
    dtokens: Tensor,
    images: Tensor,
    weight1: Tensor,
    weight2: Tensor,
    hidden: Tensor,
    prefix_length: int,
    needs: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """dimages, dweight1, dbias1, dweight2, dbias2, each if `needs` selects it, and dpositions in float32."""
    like = (images, weight1, weight1[:, 0, 0, 0], weight2, weight2[:, 0, 0, 0])
    if registration.shapes_only(dtokens) or not len(images):
        dpositions = dtokens.new_zeros(dtokens.shape[1:], dtype=torch.float32)
        zeros = [x.new_zeros(x.shape) if need else None for x, need in zip(like, needs, strict=True)]
        return zeros[0], zeros[1], zeros[2], zeros[3], zeros[4], dpositions
    wants_dimages, wants_dweight1, wants_dbias1, wants_dweight2, wants_dbias2 = needs
    chip = registration.chip(images.device)
    tile = tile_of(len(weight1), weight1[0].numel(), hidden.dtype, chip)
    dpositions, dweight2, dhidden = _of_tokens(
        dtokens.contiguous(), hidden, weight2.to(hidden.dtype).contiguous(), prefix_length, tile, chip.processors,
        wants_dweight2=wants_dweight2, wants_dhidden=wants_dimages or wants_dweight1,
    )  # fmt: skip
    dimages = _of_images(dhidden, images, weight1, tile) if wants_dimages else None
    dweight1 = _of_weight1(dhidden, images.contiguous(), weight1, tile, chip.processors) if wants_dweight1 else None
    dbias2 = dpositions[prefix_length:].sum(0) if wants_dbias1 or wants_dbias2 else None
    dbias1 = (weight2.flatten(1).float() * dbias2[:, None]).sum(0) if wants_dbias1 else None
    dweight2 = dweight2.reshape(weight2.shape) if wants_dweight2 else None
    found = (dimages, dweight1, dbias1, dweight2, dbias2 if wants_dbias2 else None)
    dimages, dweight1, dbias1, dweight2, dbias2 = (
        None if dx is None else dx.to(x.dtype) for dx, x in zip(found, like, strict=True)
    )
    return dimages, dweight1, dbias1, dweight2, dbias2, dpositions
