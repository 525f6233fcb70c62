"""`patch_embed`: images to the token sequence, after a prefix, in one kernel.

    hidden = patches weight1^T + bias1                      tokens = [prefix, hidden weight2^T + bias2] + positions
    tokens_dot = [prefix_dot, (patches_dot weight1^T) weight2^T]

A patch is p x p x c values, read directly from its image: no im2col. hidden (bottleneck E) stays on the chip
between the products (in float32, in the cache). Products take operands in the weights' dtype (the autocast dtype,
if autocast is on) and are accumulated in float32; hidden is rounded to that dtype, the tokens to the wider of it
and the positions' dtype.

Backward, with dp the gradient of the patch tokens:

    dhidden  = dp weight2      dweight2 = dp^T hidden     dbias2 = sum of dp     dbias1 = sum of dhidden
    dweight1 = dhidden^T patches                          dimages = dhidden weight1, each at its patch
    dpositions = sum over samples of dtokens              dprefix = the first rows of dtokens

They are computed in two passes: `patch_backward.py`.

Saved: images, weights, and hidden if a gradient is needed: E values per patch. Nothing for tangents.

Bytes moved per patch, images of e_x bytes, tokens of e_y: p p c e_x + C e_y, twice that with a tangent, and E e
for hidden. Weights are read from L2, once per tile of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.patch_backward import patch_backward
from pmf.kernels.patches import Shape, patch_offset, value_offset
from pmf.kernels.registration import Chip
from pmf.kernels.tiles import product
from pmf.pair import Dual
from pmf.private import transforming

FLOAT32_COLUMNS = tl.constexpr(32)
SIZES = (2, 4, 8, 16, 32)
"""Patch sizes that the kernels take."""
MAX_BOTTLENECK = 256
"""The widest bottleneck that a program keeps in registers between the two products."""


def unsupported(patch: int, bottleneck: int) -> str | None:
    """The reason why the kernels cannot take patches and a bottleneck of these sizes, or None if they can."""
    if patch not in SIZES:
        return f'patch size must be one of {SIZES} with impl="triton", got {patch}'
    if bottleneck > MAX_BOTTLENECK:
        return f'bottleneck must be at most {MAX_BOTTLENECK} with impl="triton", got {bottleneck}'
    return None


@dataclass(frozen=True)
class PatchTile:
    """Tokens per program, and the values of a patch and channels of a token per iteration."""

    tokens: int
    values: int
    channels: int
    warps: int
    stages: int


def tile_of(bottleneck: int, values: int, dtype: torch.dtype, chip: Chip) -> PatchTile:
    """As many tokens as let hidden (tokens x bottleneck, float32) take 64 registers per thread.

    Weights are read once per tile, so tiles should be large. Images are read from HBM, so three stages of
    64 values (256 bytes of float32) keep enough loads in flight; two if shared memory is small.
    """
    step = min(max(registration.power_of_two(values), 16), 64)
    if chip.interpreted:
        return PatchTile(128, min(max(registration.power_of_two(values), 16), 256), 128, 1, 1)
    if dtype == torch.float32:
        return PatchTile(32, min(step, 32), 32, 8, 2)
    if bottleneck <= 128:
        return PatchTile(128, step, 64, 8, 3)
    return PatchTile(64, step, 64, 8, 3 if chip.shared_memory > 99 << 10 else 2)


@triton.jit
def _patches(
    p_images, p_weight1, p_bias1, p_weight2, p_bias2, p_positions, p_tokens, p_hidden, i_tile, count, prefix,
    SHAPE: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """The tokens of M of `count` patches. Biases and positions are absent for tangents.

    In float32, hidden does not fit into registers as an operand; it is stored, and read a few columns at a time.
    """
    PATCHES: tl.constexpr = (SHAPE.height // SHAPE.patch) * (SHAPE.width // SHAPE.patch)
    K: tl.constexpr = SHAPE.channels * SHAPE.patch * SHAPE.patch
    i_m, i_e = i_tile * M + tl.arange(0, M), tl.arange(0, BLOCK_E)
    m_m = (i_m < count)[:, None]
    m_e = i_e < E
    p_patch = p_images + patch_offset(i_m, SHAPE)[:, None]
    b_hidden = tl.zeros([M, BLOCK_E], tl.float32)
    for i_start in range(0, K, BLOCK_K):
        i_k = i_start + tl.arange(0, BLOCK_K)
        m_k = i_k < K
        b_x = tl.load(p_patch + value_offset(i_k, SHAPE)[None, :], mask=m_m & m_k[None, :], other=0.0)
        p_w = p_weight1 + i_e[None, :] * K + i_k[:, None]
        b_w = tl.load(p_w, mask=m_k[:, None] & m_e[None, :], other=0.0)
        b_hidden = product(b_x.to(b_w.dtype), b_w, b_hidden)
    if p_bias1 is not None:
        b_hidden += tl.load(p_bias1 + i_e, mask=m_e, other=0.0).to(tl.float32)[None, :]
    b_low = b_hidden.to(p_weight2.dtype.element_ty)
    if p_hidden is not None:
        tl.store(p_hidden + i_m.to(tl.int64)[:, None] * E + i_e[None, :], b_low, mask=m_m & m_e[None, :])

    FLOAT32: tl.constexpr = p_weight2.dtype.element_ty == tl.float32
    if FLOAT32:
        tl.debug_barrier()  # other threads of the program read the hidden values stored above
    i_n = (prefix + i_m % PATCHES)[:, None]
    p_row = p_tokens + ((i_m // PATCHES).to(tl.int64)[:, None] * (prefix + PATCHES) + i_n) * C
    for i_start in range(0, C, BLOCK_C):
        i_c = i_start + tl.arange(0, BLOCK_C)
        m_c = i_c < C
        b_y = tl.zeros([M, BLOCK_C], tl.float32)
        if FLOAT32:
            for i_few in range(0, E, FLOAT32_COLUMNS):
                i_h = i_few + tl.arange(0, FLOAT32_COLUMNS)
                m_h = i_h < E
                b_few = tl.load(
                    p_hidden + i_m.to(tl.int64)[:, None] * E + i_h[None, :], mask=m_m & m_h[None, :], other=0.0
                )
                p_w = p_weight2 + i_c[None, :] * E + i_h[:, None]
                b_w = tl.load(p_w, mask=m_h[:, None] & m_c[None, :], other=0.0)
                b_y = product(b_few, b_w, b_y)
        else:
            p_w = p_weight2 + i_c[None, :] * E + i_e[:, None]
            b_w = tl.load(p_w, mask=m_e[:, None] & m_c[None, :], other=0.0)
            b_y = product(b_low, b_w, b_y)
        mask = m_m & m_c[None, :]
        if p_bias2 is not None:
            b_y += tl.load(p_bias2 + i_c, mask=m_c, other=0.0).to(tl.float32)[None, :]
        if p_positions is not None:
            b_y += tl.load(p_positions + i_n * C + i_c[None, :], mask=mask, other=0.0).to(tl.float32)
        tl.store(p_row + i_c[None, :], b_y.to(p_tokens.dtype.element_ty), mask=mask)


@triton.jit
def _prefix(
    p_prefix, p_positions, p_tokens, i_tile, count, prefix, length,
    C: tl.constexpr, M: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Copy M of `count` prefix tokens, and add positions if given."""
    i_m = (i_tile * M + tl.arange(0, M))[:, None]
    i_n = i_m % prefix
    p_in, p_row = p_prefix + i_m.to(tl.int64) * C, p_tokens + ((i_m // prefix).to(tl.int64) * length + i_n) * C
    for i_start in range(0, C, BLOCK_C):
        i_c = i_start + tl.arange(0, BLOCK_C)[None, :]
        mask = (i_m < count) & (i_c < C)
        b_y = tl.load(p_in + i_c, mask=mask, other=0.0).to(tl.float32)
        if p_positions is not None:
            b_y += tl.load(p_positions + i_n * C + i_c, mask=mask, other=0.0).to(tl.float32)
        tl.store(p_row + i_c, b_y.to(p_tokens.dtype.element_ty), mask=mask)


@triton.jit
def _forward(
    p_images, p_images_dot, weights, p_positions, p_prefix, p_prefix_dot,
    p_tokens, p_tokens_dot, p_hidden, p_hidden_dot, samples, samples_dot, prefix,
    SHAPE: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile. Tiles are ordered: prefix tokens, their tangents (which take longest), patches, their tangents.

    weights: weight1, bias1, weight2, bias2.
    """
    PATCHES: tl.constexpr = (SHAPE.height // SHAPE.patch) * (SHAPE.width // SHAPE.patch)
    length = prefix + PATCHES
    i_tile = tl.program_id(0)
    if p_prefix is not None:
        tiles = tl.cdiv(samples * prefix, M)
        if i_tile < tiles:
            _prefix(p_prefix, p_positions, p_tokens, i_tile, samples * prefix, prefix, length, C, M, BLOCK_C)
        i_tile -= tiles
    if p_prefix_dot is not None:
        tiles = tl.cdiv(samples_dot * prefix, M)
        if (i_tile >= 0) & (i_tile < tiles):
            _prefix(p_prefix_dot, None, p_tokens_dot, i_tile, samples_dot * prefix, prefix, length, C, M, BLOCK_C)
        i_tile -= tiles
    tiles = tl.cdiv(samples * PATCHES, M)
    if (i_tile >= 0) & (i_tile < tiles):
        _patches(
            p_images, weights[0], weights[1], weights[2], weights[3], p_positions, p_tokens, p_hidden,
            i_tile, samples * PATCHES, prefix, SHAPE, E, C, M, BLOCK_E, BLOCK_K, BLOCK_C,
        )  # fmt: skip
    i_tile -= tiles
    if p_images_dot is not None:
        if i_tile >= 0:
            _patches(
                p_images_dot, weights[0], None, weights[2], None, None, p_tokens_dot, p_hidden_dot,
                i_tile, samples_dot * PATCHES, prefix, SHAPE, E, C, M, BLOCK_E, BLOCK_K, BLOCK_C,
            )  # fmt: skip


@registration.operator
def patch_forward(
    images: Tensor, images_dot: Tensor | None,
    weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor,
    prefix: Tensor | None, prefix_dot: Tensor | None, dtype: torch.dtype, keep: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """tokens, tokens_dot and, with `keep`, hidden [B, N, E]."""
    out_dtype = torch.promote_types(dtype, positions.dtype)
    shape, samples, bottleneck = Shape.of(images, weight1), len(images), len(weight1)
    samples_dot = samples - registration.first_dot(samples, images_dot, prefix_dot)
    tokens = images.new_empty(samples, *positions.shape, dtype=out_dtype)
    tokens_dot = hidden = None
    if images_dot is not None or prefix_dot is not None:
        tokens_dot = images.new_empty(samples_dot, *positions.shape, dtype=out_dtype)
    if keep:
        hidden = images.new_empty(samples, shape.patches, bottleneck, dtype=dtype)
    if registration.shapes_only(images):
        return tokens, tokens_dot, hidden
    if tokens_dot is not None and (images_dot is None or (prefix is not None and prefix_dot is None)):
        tokens_dot.zero_()  # the kernel does not visit tokens without a tangent
    tile = tile_of(bottleneck, weight1[0].numel(), dtype, registration.chip(images.device))
    weights = tuple(w.to(dtype).contiguous() for w in (weight1, bias1, weight2, bias2))
    images, images_dot, positions, prefix, prefix_dot = (
        None if x is None or x.numel() == 0 else x.contiguous()
        for x in (images, images_dot, positions, prefix, prefix_dot)
    )
    before, width = tokens.shape[1] - shape.patches, tokens.shape[2]
    counts = (
        samples * before,
        samples_dot * before if prefix_dot is not None else 0,
        samples * shape.patches,
        samples_dot * shape.patches if images_dot is not None else 0,
    )
    place, place_dot = hidden, None
    if dtype == torch.float32:  # the kernel must store hidden
        place = tokens.new_empty(samples, shape.patches, bottleneck) if hidden is None else hidden
        place_dot = tokens.new_empty(samples_dot, shape.patches, bottleneck)
    registration.launch(
        _forward, sum(registration.cdiv(count, tile.tokens) for count in counts) if samples else 0,
        images, images_dot, weights, positions, prefix, prefix_dot,
        tokens, tokens_dot, place, place_dot, samples, samples_dot, before,
        SHAPE=shape, E=bottleneck, C=width, M=tile.tokens,
        BLOCK_E=max(registration.power_of_two(bottleneck), 16), BLOCK_K=tile.values, BLOCK_C=tile.channels,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return tokens, tokens_dot, hidden


def _save(ctx, inputs, outputs):
    images, _, weight1, _, weight2, _, positions, prefix, *_ = inputs
    ctx.positions_dtype = positions.dtype
    ctx.prefix = None if prefix is None else (prefix.shape[1], prefix.dtype)
    needs = ctx.needs_input_grad
    ctx.needs = [needs[0], *needs[2:6]]
    ctx.save_for_backward(images, weight1, weight2, outputs[2])


def _gradients(ctx, dtokens, *_):
    if dtokens is None:
        return (None,) * 8
    length, prefix_dtype = ctx.prefix or (0, None)
    needs = ctx.needs_input_grad
    wanted = any(ctx.needs) or needs[6]
    gradients = patch_backward(dtokens, *ctx.saved_tensors, length, ctx.needs) if wanted else (None,) * 6
    dimages, *dweights, dpositions = gradients
    dpositions = dpositions.to(ctx.positions_dtype) if needs[6] else None
    dprefix = dtokens[:, :length].to(prefix_dtype) if needs[7] else None
    return dimages, None, *dweights, dpositions, dprefix


_patch_embed = registration.differentiable("PatchEmbed", "patch_embed", patch_forward, _save, _gradients, inputs=8)


def _wrapped() -> bool:
    """Whether tensors are wrapped by a transform; a wrapper does not tell whether its tensor requires a gradient."""
    return not torch.compiler.is_compiling() and transforming()


def patch_embed(
    images: Dual,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    positions: Tensor,
    prefix: Dual,
    *,
    dtype: torch.dtype,
) -> Dual:
    """`pmf.reference.patch_embed` by Triton."""
    weights = (weight1, bias1, weight2, bias2, positions)
    recorded = (images.value, *weights, prefix.value)
    keep = torch.is_grad_enabled() and (any(x is not None and x.requires_grad for x in recorded) or _wrapped())
    tokens, tokens_dot, _ = _patch_embed(images.value, images.dot, *weights, prefix.value, prefix.dot, dtype, keep)
    return Dual(tokens, tokens_dot)
