"""Gate, scale and shift of a norm, per channel [C], per sample [B, C] or per token [B, S, C]; and tiles of rows."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration
from pmf.kernels.registration import Chip, RowTile


class Modulations(NamedTuple):
    """Vectors per channel, sample or token, and tangents; in kernels, pointers to them, strides between their rows
    (samples or tokens), or whether they are per token.
    """

    gate: Any
    scale: Any
    shift: Any
    gate_dot: Any = None
    scale_dot: Any = None
    shift_dot: Any = None


class Parameters(NamedTuple):
    """Parameters, or sums for their gradients; in kernels, pointers."""

    gate: Any
    weight: Any
    scale: Any
    shift: Any


@functools.cache
def forward_tile(width: int, alone: bool, chip: Chip) -> RowTile:
    """8 values per thread and operand: one 16-byte load of bfloat16, two of float32.

    With a tangent and a branch, four operands are in flight, enough to hide the latency of HBM at half
    occupancy. If x comes `alone`, the tile has twice the rows, to keep more loads in flight.
    Rows wider than 4096 take more values per thread instead of more than 16 warps.
    """
    block = registration.power_of_two(width)
    if chip.interpreted:
        return RowTile(32, block, 1)
    warps = min(max(block // 256, 4), 16)
    return RowTile(max((512 if alone else 256) * warps // block, 1), block, warps)


@triton.jit
def load_tile(p_modulation, i_row, mask, STEP: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr):
    """A modulation per token of ROWS tokens, in float32."""
    i_r = tl.arange(0, ROWS)[:, None]
    if ROWS * STEP >= 2**31:
        i_r = i_r.to(tl.int64)
    i_tile = i_r * STEP + tl.arange(0, BLOCK)[None, :]
    return tl.load(p_modulation + i_row * STEP + i_tile, mask=mask, other=0.0).to(tl.float32)


def step_of(modulation: Tensor | None) -> int:
    """The stride between the rows of a modulation; 0 if one vector is for all."""
    return 0 if modulation is None or modulation.ndim == 1 else modulation.stride(0)


def per_token(modulation: Tensor | None) -> bool:
    """Whether a modulation is [B, S, C]."""
    return modulation is not None and modulation.ndim == 3


def as_rows(modulation: Tensor | None) -> Tensor | None:
    """A modulation per channel, or as rows of samples or of tokens, with unit stride along channels."""
    return registration.as_rows(modulation) if per_token(modulation) else registration.unit_step(modulation)
