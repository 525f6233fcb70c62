"""Shapes and offsets of patches in images, for kernels."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Shape(NamedTuple):
    """The shape of images, and the side of their patches."""

    height: int
    width: int
    patch: int
    channels: int

    @classmethod
    def of(cls, images: Tensor, weight1: Tensor) -> Shape:
        """The shape of images [B, c, H, W], with the patch size of weight1 [E, c, p, p]."""
        _, channels, height, width = images.shape
        return cls(height, width, weight1.shape[-1], channels)

    @property
    def patches(self) -> int:
        """Number of patches per image."""
        return (self.height // self.patch) * (self.width // self.patch)


@triton.jit
def patch_offset(i_patch, SHAPE: tl.constexpr):
    """The offsets of patches in a batch of images."""
    across = SHAPE.width // SHAPE.patch
    patches = across * (SHAPE.height // SHAPE.patch)
    i_b, i_n = (i_patch // patches).to(tl.int64), i_patch % patches
    return (
        i_b * (SHAPE.channels * SHAPE.height * SHAPE.width) + (i_n // across * SHAPE.width + i_n % across) * SHAPE.patch
    )


@triton.jit
def value_offset(i_k, SHAPE: tl.constexpr):
    """The offset of value i_k of a patch (channel, row, column) from the patch's first value."""
    P: tl.constexpr = SHAPE.patch
    return i_k // (P * P) * (SHAPE.height * SHAPE.width) + i_k // P % P * SHAPE.width + i_k % P
