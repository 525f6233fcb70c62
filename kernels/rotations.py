"""Tile mathematics of heads: statistics of a head or of a whole token, and the rotation of either kind of pairs.

A tile of R heads is a tuple of blocks [R, WIDTH]. If adjacent columns form a pair, the blocks lie side by side from the
first column of a head to its last. If columns i and i + D / 2 do (`half`), one block after another covers the first
half of the head, then as many cover the second: both values of a pair are in the same place of two blocks.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.tiles import rotate, row_mean


class Form(NamedTuple):
    """What a kernel computes, fixed when it is compiled."""

    norm: str | None
    """"rms", "layer", or None: rotation alone."""
    across: bool
    """Whether statistics, weights and biases are of a token's heads together, not of each head."""
    half: bool
    """Whether columns i and i + D / 2 form a pair, not columns 2 i and 2 i + 1."""
    per_sample: bool = False
    """Whether every sample has tables of its own."""


class Tokens(NamedTuple):
    """How many tokens there are in all, in a sample, and in the prefix of a sample."""

    total: int
    length: int
    prefix: int


def side(head_dim: int, half: bool) -> int:
    """Columns from the first of a head to its last or, if halves form pairs, of one half."""
    return head_dim // 2 if half else head_dim


def token_rows(qkv: Tensor) -> Tensor:
    """[B, S, ..., D] as [B S, ... D]; a view unless heads or samples have gaps between them."""
    return registration.as_rows(qkv.flatten(2))


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The tensors that are there, without gaps."""
    return tuple(None if t is None else t.contiguous() for t in tensors)


@triton.jit
def load_heads(p_heads, i_head, m_head, D: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """Load heads that begin at i_head, in blocks of WIDTH columns."""
    SIDE: tl.constexpr = D // 2 if FORM.half else D
    blocks = ()  # type: tuple
    for start in tl.static_range(0, D, SIDE):
        for i in tl.static_range(0, SIDE, WIDTH):
            i_c = i + tl.arange(0, WIDTH)[None, :]
            mask = m_head[:, None] & (i_c < SIDE)
            blocks = blocks + (tl.load(p_heads + i_head[:, None] + (start + i_c), mask=mask, other=0.0),)
    return blocks


@triton.jit
def store_block(
    p_heads, i_head, m_head, b_x, k: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr
):
    """Store block k of COUNT in the layout that `load_heads` reads."""
    WIDTH: tl.constexpr = b_x.shape[1]
    SIDE: tl.constexpr = D // 2 if FORM.half else D
    EACH: tl.constexpr = COUNT * SIDE // D
    i_c = k % EACH * WIDTH + tl.arange(0, WIDTH)
    p_block = p_heads + i_head[:, None] + (k // EACH * SIDE + i_c)[None, :]
    tl.store(p_block, b_x.to(p_heads.dtype.element_ty), mask=m_head[:, None] & (i_c < SIDE)[None, :])


@triton.jit
def load_vector_block(
    p_vector, i_h, m_h, k: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr
):  # fmt: skip
    """Block k of a weight or bias in float32: [1, WIDTH] of one for each head, [R, WIDTH] of one across heads i_h."""
    SIDE: tl.constexpr = D // 2 if FORM.half else D
    EACH: tl.constexpr = COUNT * SIDE // D
    i_c = k % EACH * WIDTH + tl.arange(0, WIDTH)
    i_vector = k // EACH * SIDE + i_c
    if FORM.across:
        mask = m_h[:, None] & (i_c < SIDE)[None, :]
        b_vector = tl.load(p_vector + (i_h[:, None] * D + i_vector[None, :]), mask=mask, other=0.0).to(tl.float32)
    else:
        b_vector = tl.load(p_vector + i_vector, mask=i_c < SIDE, other=0.0).to(tl.float32)[None, :]
    return b_vector


@triton.jit
def load_vectors(p_vector, i_h, m_h, D: tl.constexpr, WIDTH: tl.constexpr, COUNT: tl.constexpr, FORM: tl.constexpr):
    """All blocks of a weight or bias."""
    blocks = ()  # type: tuple
    for k in tl.static_range(COUNT):
        blocks = blocks + (load_vector_block(p_vector, i_h, m_h, k, WIDTH, COUNT, D, FORM),)
    return blocks


@triton.jit
def table_rows(i_token, tokens, FORM: tl.constexpr):
    """Each token's row of the tables; negative in the prefix, and beyond the last token if a sample has its own.

    tokens: `Tokens`.
    """
    i_row = i_token % tokens.length - tokens.prefix
    if FORM.per_sample:
        i_own = (i_token // tokens.length).to(tl.int64) * (tokens.length - tokens.prefix) + i_row
        i_row = tl.where((i_row >= 0) & (i_token < tokens.total), i_own, -1)
    return i_row


@triton.jit
def load_table(p_table, i_row, other, D: tl.constexpr, WIDTH: tl.constexpr, FORM: tl.constexpr):
    """Load rows of cos or sin, in float32 blocks with a column for each pair; `other` in the prefix."""
    PAIRS: tl.constexpr = WIDTH if FORM.half else WIDTH // 2
    blocks = ()  # type: tuple
    for i in tl.static_range(0, D // 2, PAIRS):
        i_pair = i + tl.arange(0, PAIRS)[None, :]
        mask = (i_row >= 0)[:, None] & (i_pair < D // 2)
        b_angle = tl.load(p_table + (i_row[:, None] * (D // 2) + i_pair), mask=mask, other=other)
        blocks = blocks + (b_angle.to(tl.float32),)
    return blocks


@triton.jit
def turned(x, cos, sin, FORM: tl.constexpr):
    """Rotate every pair (a, b): (a cos - b sin, a sin + b cos)."""
    y = ()  # type: tuple
    if FORM.half:
        COUNT: tl.constexpr = len(x) // 2
        for i in tl.static_range(COUNT):
            y = y + (x[i] * cos[i] - x[COUNT + i] * sin[i],)
        for i in tl.static_range(COUNT):
            y = y + (x[i] * sin[i] + x[COUNT + i] * cos[i],)
    else:
        for i in tl.static_range(len(x)):
            y = y + (rotate(x[i], cos[i], sin[i]),)
    return y


@triton.jit
def times(a, b):
    """The products of two tuples of blocks."""
    y = ()  # type: tuple
    for i in tl.static_range(len(a)):
        y = y + (a[i].to(tl.float32) * b[i],)
    return y


@triton.jit
def plus(a, b):
    """The sums of two tuples of blocks."""
    y = ()  # type: tuple
    for i in tl.static_range(len(a)):
        y = y + (a[i] + b[i],)
    return y


@triton.jit
def widened(x):
    """The blocks in float32."""
    y = ()  # type: tuple
    for i in tl.static_range(len(x)):
        y = y + (x[i].to(tl.float32),)
    return y


@triton.jit
def _mean(b_sum, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """The mean of each head, [R, 1], or of all heads of the one token in the tile, [1, 1]."""
    if FORM.across:
        b_mean = tl.sum(tl.sum(b_sum, 1, keep_dims=True), 0, keep_dims=True) * (1.0 / (heads * D))
    else:
        b_mean = row_mean(b_sum, D)
    return b_mean


@triton.jit
def _mean_product(a, b, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """The mean of a b, in float32."""
    b_sum = a[0].to(tl.float32) * b[0].to(tl.float32)
    for i in tl.static_range(1, len(a)):
        b_sum += a[i].to(tl.float32) * b[i].to(tl.float32)
    return _mean(b_sum, heads, D, FORM)


@triton.jit
def _centred(x, mask, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """x minus its mean for "layer", else x, in float32; zero outside the mask, [R, 1] or that of a block."""
    y = widened(x)
    if FORM.norm == "layer":
        WIDTH: tl.constexpr = x[0].shape[1]
        SIDE: tl.constexpr = D // 2 if FORM.half else D
        COUNT: tl.constexpr = len(x) * SIDE // D
        b_sum = y[0]
        for i in tl.static_range(1, len(x)):
            b_sum += y[i]
        b_mean = _mean(b_sum, heads, D, FORM)
        centred = ()  # type: tuple
        for i in tl.static_range(len(x)):
            m_c = (tl.arange(0, WIDTH) + i % COUNT * WIDTH < SIDE)[None, :]
            centred = centred + (tl.where(mask & m_c, y[i] - b_mean, 0.0),)
        y = centred
    return y


@triton.jit
def normalised(
    x, mask, eps, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr, EXACT: tl.constexpr
):  # fmt: skip
    """n = (x - mu) / sqrt(mean((x - mu)^2) + eps), mu = 0 for "rms", and 1 / sqrt(...), rounded to nearest if EXACT."""
    n = _centred(x, mask, heads, D, FORM)
    b_mean = _mean_product(n, n, heads, D, FORM)
    # rsqrt's error is the same in a whole row and would add up in gradients of parameters.
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(b_mean + eps)) if EXACT else tl.rsqrt(b_mean + eps)
    y = ()  # type: tuple
    for i in tl.static_range(len(x)):
        y = y + (n[i] * b_rstd,)
    return y, b_rstd


@triton.jit
def normalised_dot(n, b_rstd, x_dot, mask, heads: tl.constexpr, D: tl.constexpr, FORM: tl.constexpr):
    """n_dot = rstd (c_dot - n mean(n c_dot)), c_dot = x_dot minus its mean for "layer".

    The map is symmetric, so the same function takes the gradient of n to that of x.
    """
    c_dot = _centred(x_dot, mask, heads, D, FORM)
    b_mean = _mean_product(n, c_dot, heads, D, FORM)
    n_dot = ()  # type: tuple
    for i in tl.static_range(len(n)):
        n_dot = n_dot + (b_rstd * (c_dot[i] - n[i] * b_mean),)
    return n_dot
