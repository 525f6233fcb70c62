"""Patches where they lie in images: shapes and offsets for the kernels of `patch_embed`."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

Shape = tuple[int, int, int, int]
"""Height, width, patch size and channels of images."""


def shape_of(images: Tensor, weight1: Tensor) -> Shape:
    """The shape of images [B, c, H, W] for patches of the size of weight1 [E, c, p, p]."""
    return *images.shape[2:], weight1.shape[-1], images.shape[1]


def count_of(shape: Shape) -> int:
    """Patches of an image."""
    return (shape[0] // shape[2]) * (shape[1] // shape[2])


@triton.jit
def patch_offset(i_patch, SHAPE: tl.constexpr):
    """Where patches begin in a batch of images."""
    across = SHAPE[1] // SHAPE[2]
    patches = across * (SHAPE[0] // SHAPE[2])
    i_b, i_n = (i_patch // patches).to(tl.int64), i_patch % patches
    return i_b * (SHAPE[3] * SHAPE[0] * SHAPE[1]) + (i_n // across * SHAPE[1] + i_n % across) * SHAPE[2]


@triton.jit
def value_offset(i_k, SHAPE: tl.constexpr):
    """Where value i_k of a patch (channel, row, column) lies, counted from the patch's first."""
    P: tl.constexpr = SHAPE[2]
    return i_k // (P * P) * (SHAPE[0] * SHAPE[1]) + i_k // P % P * SHAPE[1] + i_k % P
