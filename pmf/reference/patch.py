"""Images to tokens and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from pmf.pair import ABSENT, Dual, tail, tangent_rows


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, c, H, W] to tokens [B, N, p * p * c], laid out (row, column, channel) inside a patch."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """The inverse of `patchify` for a square grid: tokens [B, N, p * p * c] to [B, c, H, W]."""
    grid = round(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=patch_size, q=patch_size, c=channels)


def patch_embed(
    images: Dual,
    weight1: Tensor,
    bias1: Tensor,
    weight2: Tensor,
    bias2: Tensor,
    positions: Tensor,
    prefix: Dual = ABSENT,
    *,
    dtype: torch.dtype | None = None,
) -> Dual:
    """[prefix, conv1x1(conv_p(images))] + positions, and its tangent; products are computed in `dtype`."""
    weight1, bias1, weight2, bias2 = (w.to(dtype or w.dtype) for w in (weight1, bias1, weight2, bias2))
    patch_size = weight1.shape[-1]

    def project(x: Tensor, bias1: Tensor | None, bias2: Tensor | None) -> Tensor:
        x = F.conv2d(x.to(weight1.dtype), weight1, bias1, stride=patch_size)
        return F.conv2d(x, weight2, bias2).flatten(2).transpose(1, 2)

    patches = project(images.value, bias1, bias2)
    tokens = patches if prefix.value is None else torch.cat([prefix.value.to(patches.dtype), patches], 1)
    tokens = tokens + positions
    rows = tangent_rows((images.dot, prefix.dot))
    if rows is None:
        return Dual(tokens)
    with torch.no_grad():
        start = 0 if prefix.value is None else prefix.value.shape[1]
        parts = tail(tokens, rows).tensor_split([start], 1)
        dots = (prefix.dot, None if images.dot is None else project(images.dot, None, None))
        found = [
            torch.zeros_like(part) if dot is None else dot.to(part.dtype) for part, dot in zip(parts, dots, strict=True)
        ]
        return Dual(tokens, torch.cat(found, 1))
