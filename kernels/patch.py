"""`patch_embed`: images to the token sequence, behind a prefix, in one kernel.

    hidden = patches weight1^T + bias1                      tokens = [prefix, hidden weight2^T + bias2] + positions
    tokens_dot = [prefix_dot, (patches_dot weight1^T) weight2^T]

A patch is p x p x c values of an image, read where it lies: no im2col. hidden (bottleneck E) stays on the
chip between the products (in float32, in the cache). Products take factors in the weights' dtype (autocast's,
where it is on) and are summed in float32; hidden is rounded to that dtype, the tokens to the wider of it and the
positions'.

Backward, with dp the gradient of the patch tokens:

    dhidden  = dp weight2      dweight2 = dp^T hidden     dbias2 = sum of dp     dbias1 = sum of dhidden
    dweight1 = dhidden^T patches                          dimages = dhidden weight1, each at its patch
    dpositions = sum over samples of dtokens              dprefix = the first rows of dtokens

They are computed in two passes: `patch_backward.py`.

Saved: images, weights, and hidden where a gradient is wanted: E values a patch. Nothing for tangents.

Bytes moved a patch, images of e_x bytes, tokens of e_y: p p c e_x + C e_y, twice that with a tangent, and E e
for hidden. Weights come out of L2, once for every tile of tokens.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl

from pmf.autocast import autocast_dtype
from pmf.kernels import registration
from pmf.kernels.patch_backward import fake_backward
from pmf.kernels.patch_backward import run_backward as _run_backward
from pmf.kernels.patches import count_of, patch_offset, shape_of, value_offset
from pmf.kernels.registration import Chip, absent, present
from pmf.kernels.tiles import product

FLOAT32_COLUMNS = tl.constexpr(32)


@dataclass(frozen=True)
class Tile:
    """Tokens a program owns, and the values of a patch and channels of a token it takes at a time."""

    tokens: int
    values: int
    channels: int
    warps: int
    stages: int


def tile_of(bottleneck: int, values: int, dtype: torch.dtype, chip: Chip) -> Tile:
    """As many tokens as leave hidden (tokens x bottleneck, float32) 64 registers a thread.

    Weights are read once a tile, so tiles should be large; images are read from HBM, so three stages of
    64 values, 256 bytes of float32, keep enough of them on the way; two where shared memory is small.
    """
    step = min(max(registration.power_of_two(values), 16), 64)
    if chip.interpreted:
        return Tile(128, min(max(registration.power_of_two(values), 16), 256), 128, 1, 1)
    if dtype == torch.float32:
        return Tile(32, min(step, 32), 32, 8, 2)
    if bottleneck <= 128:
        return Tile(128, step, 64, 8, 3)
    return Tile(64, step, 64, 8, 3 if chip.shared_memory > 99 << 10 else 2)


@triton.jit
def _patches(
    p_images, p_weight1, p_bias1, p_weight2, p_bias2, p_positions, p_tokens, p_hidden, i_tile, count, prefix,
    SHAPE: tl.constexpr, E: tl.constexpr, C: tl.constexpr,
    M: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Tokens of M of `count` patches. Biases and positions are absent for tangents.

    Float32: hidden does not fit into registers as a factor; it is put down, and read a few columns at a time.
    """
    PATCHES: tl.constexpr = (SHAPE[0] // SHAPE[2]) * (SHAPE[1] // SHAPE[2])
    K: tl.constexpr = SHAPE[3] * SHAPE[2] * SHAPE[2]
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
        tl.debug_barrier()  # other threads of the program read what is stored above
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
    """M of `count` prefix tokens: copied, positions added where they are given."""
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
    """One tile of, in this order: prefix tokens, their tangents (which take longest), patches, their tangents.

    weights: weight1, bias1, weight2, bias2.
    """
    PATCHES: tl.constexpr = (SHAPE[0] // SHAPE[2]) * (SHAPE[1] // SHAPE[2])
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


def _allocate_forward(
    images, images_dot, weight1, bias1, weight2, bias2, positions, prefix, prefix_dot, dtype, keep
):  # fmt: skip
    """tokens, tokens_dot and hidden [B, N, E]; see `absent` for those not needed."""
    out_dtype = torch.promote_types(dtype, positions.dtype)
    dots = [dot for dot in (images_dot, prefix_dot) if dot is not None]
    tokens = images.new_empty(len(images), *positions.shape, dtype=out_dtype)
    tokens_dot = images.new_empty(len(dots[0]), *positions.shape, dtype=out_dtype) if dots else absent(tokens)
    patches = count_of(shape_of(images, weight1))
    hidden = images.new_empty(len(images), patches, len(weight1), dtype=dtype) if keep else absent(images).to(dtype)
    return tokens, tokens_dot, hidden


def _run_forward(
    images, images_dot, weight1, bias1, weight2, bias2, positions, prefix, prefix_dot, dtype, keep
):  # fmt: skip
    outputs = _allocate_forward(
        images, images_dot, weight1, bias1, weight2, bias2, positions, prefix, prefix_dot, dtype, keep
    )
    tokens, tokens_dot, hidden = outputs
    if images_dot is None or (prefix is not None and prefix_dot is None):
        tokens_dot.zero_()  # what has no tangent of its own is not visited
    shape, bottleneck, width = shape_of(images, weight1), len(weight1), positions.shape[1]
    chip = registration.chip(images.device)
    tile = tile_of(bottleneck, weight1[0].numel(), dtype, chip)
    weights = tuple(w.to(dtype).contiguous() for w in (weight1, bias1, weight2, bias2))
    arguments = (images, images_dot, positions, prefix, prefix_dot)
    arguments = (None if a is None or a.numel() == 0 else a.contiguous() for a in arguments)
    images, images_dot, positions, prefix, prefix_dot = arguments
    patches, samples, samples_dot = count_of(shape), len(tokens), tokens_dot.shape[0]
    before = tokens.shape[1] - patches
    counts = (
        samples * before,
        samples_dot * before if prefix_dot is not None else 0,
        samples * patches,
        samples_dot * patches if images_dot is not None else 0,
    )
    # In float32 the kernel needs a place for hidden.
    scratch = dtype == torch.float32
    at = hidden if keep or not scratch else tokens.new_empty(samples, patches, bottleneck, dtype=dtype)
    at_dot = tokens.new_empty(samples_dot if scratch else 0, patches, bottleneck, dtype=dtype)
    registration.launch(
        _forward, sum(registration.cdiv(count, tile.tokens) for count in counts) if samples else 0,
        images, images_dot, weights, positions, prefix, prefix_dot,
        tokens, present(tokens_dot, tokens_dot.numel() > 0),
        present(at, keep or scratch), present(at_dot, scratch), samples, samples_dot, before,
        SHAPE=shape, E=bottleneck, C=width, M=tile.tokens,
        BLOCK_E=max(registration.power_of_two(bottleneck), 16), BLOCK_K=tile.values, BLOCK_C=tile.channels,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return outputs


_patch_forward = registration.define(
    "patch_forward(Tensor images, Tensor? images_dot, Tensor weight1, Tensor bias1, Tensor weight2, Tensor bias2, "
    "Tensor positions, Tensor? prefix, Tensor? prefix_dot, ScalarType dtype, bool keep) -> (Tensor, Tensor, Tensor)",
    _run_forward,
    _allocate_forward,
)
_patch_backward = registration.define(
    "patch_backward(Tensor dtokens, Tensor images, Tensor weight1, Tensor weight2, Tensor hidden, "
    "int prefix_length, bool[] needs) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    _run_backward,
    fake_backward,
)


class _PatchEmbed(torch.autograd.Function):
    """The operator's inputs -> tokens, tokens_dot, hidden."""

    @staticmethod
    def forward(
        images, images_dot, weight1, bias1, weight2, bias2, positions, prefix, prefix_dot, dtype, keep
    ):  # fmt: skip
        weights = (weight1, bias1, weight2, bias2)
        return _patch_forward(images, images_dot, *weights, positions, prefix, prefix_dot, dtype, keep)

    @staticmethod
    def setup_context(ctx, inputs, outputs):
        images, _, weight1, _, weight2, _, positions, prefix, *_ = inputs
        _, tokens_dot, hidden = outputs
        ctx.mark_non_differentiable(tokens_dot, hidden)
        ctx.set_materialize_grads(False)
        ctx.positions_dtype = positions.dtype
        ctx.prefix = None if prefix is None else (prefix.shape[1], prefix.dtype)
        needs = ctx.needs_input_grad
        ctx.needs = [needs[0], *needs[2:6]]
        ctx.save_for_backward(images, weight1, weight2, hidden)

    @staticmethod
    def backward(ctx, dtokens, *_):
        if dtokens is None:
            return (None,) * 11
        length, prefix_dtype = ctx.prefix or (0, None)
        needs = ctx.needs_input_grad
        wanted = any(ctx.needs) or needs[6]
        *parts, dpositions = _patch_backward(dtokens, *ctx.saved_tensors, length, ctx.needs) if wanted else (None,) * 6
        dimages, *dweights = (present(d, need) for d, need in zip(parts, ctx.needs, strict=True))
        dpositions = dpositions.to(ctx.positions_dtype) if needs[6] else None
        dprefix = dtokens[:, :length].to(prefix_dtype) if needs[7] else None
        return dimages, None, *dweights, dpositions, dprefix, *(None,) * 3


def patch_embed_dual(primals, tangents):
    """Triton's `pmf.ops.patch_embed_dual`: (tokens, tokens_dot)."""

    def compute(primals, tangents):
        images, weight1, bias1, weight2, bias2, positions, prefix = primals
        images_dot, prefix_dot = tangents[0], tangents[6]
        dtype = autocast_dtype(images.device.type) or weight1.dtype
        keep = torch.is_grad_enabled() and any(p is not None and p.requires_grad for p in primals)
        tokens, tokens_dot, _ = registration.apply(
            _PatchEmbed, images, images_dot, weight1, bias1, weight2, bias2, positions, prefix, prefix_dot, dtype, keep
        )
        return (tokens,), (present(tokens_dot, images_dot is not None or prefix_dot is not None),)

    names = "images* weight1 bias1 weight2 bias2 positions prefix*"
    (tokens,), (tokens_dot,) = registration.run_dual("patch_embed", names, compute, primals, tangents)
    return tokens, tokens_dot
