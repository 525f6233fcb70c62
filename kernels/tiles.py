"""Tile mathematics shared by the kernels, in float32. Columns of a tile beyond its width hold zero.

(Types of tuples are in comments, because Triton reads annotations in kernels.)
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(os.environ.get("TRITON_INTERPRET") == "1")


@triton.jit
def load_vector(p_vector, i_c, C: tl.constexpr):
    """Values i_c of a vector of length C, as [1, BLOCK] float32."""
    return tl.load(p_vector + i_c, mask=i_c < C, other=0.0).to(tl.float32)[None, :]


@triton.jit
def product(b_a, b_b, b_sum):
    """b_sum + a b, accumulated in float32; float32 operands are multiplied in full, without matrix units.

    Three TF32 products on matrix units would keep 22 of 24 bits, and their sums are truncated, not rounded.
    """
    if INTERPRETED:
        # The interpreter would multiply the bit patterns of bfloat16 values; in float32, the products are exact.
        b_a, b_b = b_a.to(tl.float32), b_b.to(tl.float32)
    return tl.dot(b_a, b_b, b_sum, input_precision="ieee")


@triton.jit
def row_mean(b_x, C: tl.constexpr):
    """Mean over C columns: [R, BLOCK] -> [R, 1]."""
    return (tl.sum(b_x, 1) * (1.0 / C))[:, None]


@triton.jit
def centre(b_x, m_c, C: tl.constexpr, LAYER: tl.constexpr):
    """b_x - mean(b_x) for LAYER, else b_x; and the mean."""
    b_mean = tl.zeros([b_x.shape[0], 1], tl.float32)
    if LAYER:
        b_mean = row_mean(b_x, C)
        b_x = tl.where(m_c, b_x - b_mean, 0.0)
    return b_x, b_mean


@triton.jit
def normalise(b_x, m_c, eps, C: tl.constexpr, LAYER: tl.constexpr):
    """n = (x - mu) / sqrt(mean((x - mu)^2) + eps) of every row, mu and 1 / sqrt(...), [R, 1] each."""
    b_x, b_mean = centre(b_x, m_c, C, LAYER)
    # Rounded to nearest: rsqrt's error is the same in a whole row and would add up in gradients of parameters.
    b_rstd = tl.div_rn(1.0, tl.sqrt_rn(row_mean(b_x * b_x, C) + eps))
    return b_x * b_rstd, b_mean, b_rstd


@triton.jit
def normalise_dot(b_n, b_rstd, b_x_dot, m_c, C: tl.constexpr, LAYER: tl.constexpr):
    """n_dot = rstd (c_dot - n mean(n c_dot)), c_dot = x_dot - mean(x_dot) for LAYER, else x_dot.

    The map is symmetric, so the same function takes the gradient of n to that of x.
    """
    b_c_dot, _ = centre(b_x_dot, m_c, C, LAYER)
    return b_rstd * (b_c_dot - b_n * row_mean(b_n * b_c_dot, C))


@triton.jit
def silu(b_a):
    """silu(a) = a sigmoid(a), and its derivative."""
    b_sigmoid = tl.sigmoid(b_a)
    b_silu = b_a * b_sigmoid
    return b_silu, b_sigmoid + b_silu * (1.0 - b_sigmoid)


@triton.jit
def gelu(b_x, TANH: tl.constexpr):
    """gelu(x) = x P(x) and its derivative, with P the normal distribution's function, or for TANH an approximation."""
    if TANH:
        b_square = b_x * b_x
        b_2u = 1.5957691216057308 * (b_x + 0.044715 * b_square * b_x)  # 2 sqrt(2 / pi)
        b_e = tl.exp(-tl.abs(b_2u))
        b_larger = 1.0 / (1.0 + b_e)
        b_p = tl.where(b_2u > 0, b_larger, b_e * b_larger)
        # P (1 - P), without the cancellation of 1 - P
        b_p_dot = b_e * b_larger * b_larger * (1.5957691216057308 + 0.21406444881780067 * b_square)
    else:
        # erfc to 1.5e-7 by one exponential, which the derivative needs too (Abramowitz and Stegun, 7.1.26).
        b_e = tl.exp(-0.5 * b_x * b_x)
        b_t = 1.0 / (1.0 + 0.23164188 * tl.abs(b_x))  # 0.3275911 / sqrt(2)
        b_tail = 0.5307027145 * b_t - 0.7265760135
        b_tail = b_tail * b_t + 0.7107068705
        b_tail = b_tail * b_t - 0.142248368
        b_tail = (b_tail * b_t + 0.127414796) * b_t * b_e  # the smaller of P and 1 - P
        b_p = tl.where(b_x > 0, 1.0 - b_tail, b_tail)
        b_p_dot = 0.3989422804014327 * b_e  # 1 / sqrt(2 pi)
    return b_x * b_p, b_p + b_x * b_p_dot


@triton.jit
def rotate(b_x, b_cos, b_sin):
    """Rotate the adjacent pairs (a, b) of every row: (a cos - b sin, a sin + b cos). [R, D]; [R, D / 2]."""
    R: tl.constexpr = b_x.shape[0]
    D: tl.constexpr = b_x.shape[1]
    b_a, b_b = tl.split(tl.reshape(b_x, [R, D // 2, 2]))
    b_turned = tl.join(b_a * b_cos - b_b * b_sin, b_a * b_sin + b_b * b_cos)
    return tl.reshape(b_turned, [R, D])


@triton.jit
def _columns(b_x):
    """The columns of [R, 1], [R, 2], [R, 4] or [R, 8] as a tuple."""
    R: tl.constexpr = b_x.shape[0]
    W: tl.constexpr = b_x.shape[1]
    if W == 1:
        columns = (tl.reshape(b_x, [R]),)
    else:
        b_even, b_odd = tl.split(tl.reshape(b_x, [R, W // 2, 2]))
        even = _columns(b_even)
        odd = _columns(b_odd)
        columns = ()  # type: tuple
        for i in tl.static_range(W // 2):
            columns = columns + (even[i], odd[i])
    return columns


@triton.jit
def _beside(columns, W: tl.constexpr):
    """The inverse of `_columns`; W is the number of columns."""
    if W == 1:
        b_x = columns[0][:, None]
    else:
        even = ()  # type: tuple
        odd = ()  # type: tuple
        for i in tl.static_range(W // 2):
            even = even + (columns[2 * i],)
            odd = odd + (columns[2 * i + 1],)
        b_both = tl.join(_beside(even, W // 2), _beside(odd, W // 2))
        b_x = tl.reshape(b_both, [b_both.shape[0], W])
    return b_x


@triton.jit
def transposed(blocks, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Transpose the matrix [ROWS, COLUMNS] that each row holds, stored consecutively in its blocks [R, W].

    Returns as many blocks. No value leaves its thread, so this costs nothing.
    """
    W: tl.constexpr = blocks[0].shape[1]
    COUNT: tl.constexpr = ROWS * COLUMNS // W
    values = ()  # type: tuple
    for i in tl.static_range(COUNT):
        values = values + _columns(blocks[i])
    turned = ()  # type: tuple
    for i in tl.static_range(COUNT):
        block = ()  # type: tuple
        for j in tl.static_range(W):
            block = block + (values[(i * W + j) % ROWS * COLUMNS + (i * W + j) // ROWS],)
        turned = turned + (_beside(block, W),)
    return turned
