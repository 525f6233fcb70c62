"""Sums over tokens, for gradients of parameters: equal shares of work, and one launch that adds up the partial sums.

A backward kernel divides all tokens into shares of `share` tokens, one per program. If a parameter is per sample, so
are its sums: a program closes a segment at the end of every sample and of its share. Program p writes the sums of
sample b to row p + b of a partial buffer. From one segment to the next, p or b grows by one; if a share ends with its
sample, both do, and an empty segment (zeros) fills the row between. So every row is written exactly once, and the rows
of a sample are adjacent. Everything is added in a fixed order, in float32.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import triton
import triton.language as tl
from torch import Tensor

from pmf.kernels import registration


@dataclass(frozen=True)
class Shares:
    """`samples` of `length` tokens, `share` tokens per program; one sample of all tokens if no sums are per sample."""

    samples: int
    length: int
    share: int

    @property
    def programs(self) -> int:
        """Number of programs of the backward kernel."""
        return registration.cdiv(self.samples * self.length, self.share)

    @property
    def segments(self) -> int:
        """Number of rows of the partial buffer."""
        return self.programs + self.samples - 1 if self.programs else 0


def divide(samples: int, length: int, per_sample: bool, programs: int, rows: int) -> Shares:
    """Divide the tokens into `programs` equal shares, or fewer if a share would not fill a tile of `rows`."""
    share = max(registration.cdiv(samples * length, programs), rows)
    return Shares(samples, length, share) if per_sample else Shares(1, samples * length, share)


@triton.jit
def _sum(p_partial, p_sum, first, stop, i_c, C: tl.constexpr, ROWS: tl.constexpr):
    """Add up columns i_c of rows first to stop - 1."""
    i_r = tl.arange(0, ROWS)
    b_sum = tl.zeros([ROWS, i_c.shape[0]], tl.float32)
    for i_row in range(first, stop, ROWS):
        mask = (i_row + i_r < stop)[:, None] & (i_c < C)[None, :]
        i_tile = (i_row + i_r).to(tl.int64)[:, None] * C + i_c[None, :]
        b_sum += tl.load(p_partial + i_tile, mask=mask, other=0.0)
    tl.store(p_sum + i_c, tl.sum(b_sum, 0).to(p_sum.dtype.element_ty), mask=i_c < C)


@triton.jit
def _add_up(
    p_partials, p_sums, samples, length, share, segments,
    PER_SAMPLE: tl.constexpr, ROWS: tl.constexpr, C: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """A tile's columns of one sum (and of one sample, if PER_SAMPLE); the programs of each sum are consecutive."""
    i_program = tl.program_id(0)
    for k in tl.static_range(len(p_sums)):
        blocks = tl.cdiv(C, TILE // ROWS[k])
        i_b = i_program // blocks
        i_c = i_program % blocks * (TILE // ROWS[k]) + tl.arange(0, TILE // ROWS[k])
        if PER_SAMPLE[k]:
            if (i_program >= 0) & (i_b < samples):
                first = i_b * length // share + i_b
                last = ((i_b + 1) * length - 1) // share + i_b
                _sum(p_partials[k], p_sums[k] + i_b.to(tl.int64) * C, first, last + 1, i_c, C, ROWS[k])
            i_program -= samples * blocks
        else:
            if (i_program >= 0) & (i_program < blocks):
                _sum(p_partials[k], p_sums[k], 0, segments, i_c, C, ROWS[k])
            i_program -= blocks


def add_up(partials: Sequence[Tensor], shares: Shares, like: Sequence[Tensor]) -> list[Tensor]:
    """The sums of partial buffers [segments, C] in the shapes and dtypes of `like`: [C], or [B, C] if per sample."""
    sums = [p.new_empty(p.shape) for p in like]
    if not sums or not shares.programs:
        return [s.zero_() for s in sums]
    chip, width = registration.chip(partials[0].device), like[0].shape[-1]
    tile, warps = (1 << 16, 1) if chip.interpreted else (4096, 8)
    per_sample = tuple(p.ndim == 2 for p in like)
    programs, rows = _division(shares, width, per_sample, tile)
    registration.launch(
        _add_up, programs, tuple(partials), tuple(sums), shares.samples, shares.length, shares.share, shares.segments,
        PER_SAMPLE=per_sample, ROWS=rows, C=width, TILE=tile, num_warps=warps,
    )  # fmt: skip
    return sums


@functools.lru_cache(1024)
def _division(shares: Shares, width: int, per_sample: tuple[bool, ...], tile: int) -> tuple[int, tuple[int, ...]]:
    """Number of programs for all sums together, and the number of rows that a program of each adds up at a time."""
    terms = (registration.cdiv(shares.length, shares.share) + 1 if each else shares.segments for each in per_sample)
    rows = tuple(min(max(registration.power_of_two(n), 8), 256) for n in terms)
    groups = (shares.samples if each else 1 for each in per_sample)
    programs = sum(n * registration.cdiv(width, tile // r) for n, r in zip(groups, rows, strict=True))
    return programs, rows
