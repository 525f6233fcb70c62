"""Gaussian noise that is a function of a seed and nothing else: the same bits on every device, in every batch.

A counter-based generator in integer arithmetic, then a table and sums that are exact in float32:

    w_j = F(j; keys of the seed)         32 bits, F as in `_scramble`
    each half of w_j -> (a, b)           one of 65,536 points of the plane, `_points`
    H/2 (a_1, a_2, a_3, a_4), the same for b     four points of two words; H is the Hadamard matrix

H/2 is orthogonal, so that independent points give independent values. The distribution function of a value is that
of N(0, 1) to 1e-6, tails to 1 % up to five deviations; every coordinate is a multiple of 2^-20, so that sums round
nowhere and no order, instruction set or device changes a bit. 8 values take two words, about 25 operations a batch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

_LOW = 0xFFFF


def seeded_noise(
    seeds: Sequence[int], image_shape: tuple[int, int, int], device: torch.device | str | None = None
) -> Tensor:
    """Unit-variance noise [n, c, H, W], float32, on `device` (None: the CPU), each image from its own seed.

    An image is a function of its seed in [0, 2^32) and its number of values: the same bits in any batch, process
    and on any device. It is made on the device itself, which waits for nothing.
    """
    device, count = torch.device(device or "cpu"), math.prod(image_shape)
    block = -(-count // 8)  # values beside each other that one row of H makes, halved: points have two coordinates
    noise = torch.empty(len(seeds), 4, 2 * block, device=device)
    keys = _keys(torch.tensor(list(seeds), dtype=torch.int64)).to(device, non_blocking=True)
    positions, points = _positions(block, device), _points(device)
    # On the CPU few images at a time, in buffers that stay in the cache.
    rows = max(1, min(len(seeds), (2**19 if device.type == "cpu" else 2**25) // (8 * block)))
    words, halves = (torch.empty(rows, 2, block, dtype=torch.int32, device=device) for _ in range(2))
    buffers = [torch.empty(rows, 2, 2 * block, device=device) for _ in range(3)]
    for start in range(0, len(seeds), rows):
        part = noise[start : start + rows]
        low, high, *found = (buffer[: len(part)] for buffer in (words, halves, *buffers))
        _scramble(positions, keys[start : start + rows], low, high)
        _mix(low, high, points, found, part)
    return noise.flatten(1)[:, :count].reshape(-1, *image_shape).contiguous()


def _scramble(positions: Tensor, keys: Tensor, low: Tensor, high: Tensor) -> None:
    """The halves of w = F(position): exclusive or with a key, then twice a product with an odd key and an xor-shift.

    int32 wraps around on every device; `>>` keeps the sign, hence the masks.
    """
    torch.bitwise_xor(positions, keys[:, 0], out=low).mul_(keys[:, 1])
    torch.bitwise_right_shift(low, 16, out=high).bitwise_and_(_LOW)
    low.bitwise_xor_(high).mul_(keys[:, 2])
    torch.bitwise_right_shift(low, 16, out=high).bitwise_and_(_LOW)
    low.bitwise_xor_(high).bitwise_and_(_LOW)


def _mix(low: Tensor, high: Tensor, points: Tensor, found: list[Tensor], out: Tensor) -> None:
    """The points that the halves name, mixed by H; `points` holds H's factor 1/2."""
    first, second, total = found
    for half, place in ((low, first), (high, second)):  # a point is one element of eight bytes: half the look-ups
        torch.index_select(points, 0, half.view(-1), out=place.view(torch.int64).view(-1))
    torch.add(first, second, out=total)
    torch.sub(first, second, out=second)
    for pair, place in ((total, out[:, :2]), (second, out[:, 2:])):
        torch.add(pair[:, 0], pair[:, 1], out=place[:, 0])
        torch.sub(pair[:, 0], pair[:, 1], out=place[:, 1])


def _hash(x: Tensor) -> Tensor:
    """A bijection of int32 in which every bit of the input changes about half of the output's."""
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B - 2**32)):
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * factor
    return x ^ ((x >> 16) & _LOW)


def _keys(seeds: Tensor) -> Tensor:
    """Three keys of every seed, int32 [n, 3, 1, 1], the two that multiply odd."""
    steps = torch.arange(1, 4, dtype=torch.int32) * (0x9E3779B9 - 2**32)
    keys = _hash(_hash(seeds.to(torch.int32))[:, None] + steps)
    return (keys | torch.tensor([0, 1, 1], dtype=torch.int32))[:, :, None, None]


@functools.lru_cache(maxsize=4)
def _positions(block: int, device: torch.device) -> Tensor:
    """The numbers of an image's words, scrambled once for all seeds: int32 [2, block]."""
    return _hash(_hash(torch.arange(2 * block, dtype=torch.int32))).view(2, block).to(device)


@functools.lru_cache(maxsize=4)
def _points(device: torch.device) -> Tensor:
    """65,536 points of the plane, halved, as [65536] elements of eight bytes.

    16,384 in a quarter, and their mirror images: 14 bits name a point, two its signs. Each coordinate runs through
    the quantiles of |N(0, 1)|, the second in an order of reversed bits, so that they fill the quarter evenly; the
    constant makes the moments of both together those of independent ones, up to order eight, to 1e-4 of a deviation.
    """
    number = torch.arange(2**14)
    quantiles = torch.special.ndtri(0.5 + (number.double() + 0.5) / 2**15)
    quantiles[-2:] = torch.tensor([3.84588575, 4.30821938])  # for the second and fourth moments 1 and 3
    quantiles = (quantiles / 2 * 2**20).round() / 2**20
    reversed_bits = sum(((number >> bit) & 1) << (13 - bit) for bit in range(14))
    quarter = torch.stack([quantiles, quantiles[reversed_bits ^ 10835]], 1)
    signs = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]])
    points = (signs[:, None] * quarter).float().view(-1, 2).contiguous()
    return points.view(torch.int64).view(-1).to(device)
