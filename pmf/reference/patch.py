"""Images to tokens and back."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """[B, c, H, W] to tokens [B, N, p * p * c], laid out (row, column, channel) inside a patch."""
    return rearrange(images, "b c (h p) (w q) -> b (h w) (p q c)", p=patch_size, q=patch_size)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """The inverse of `patchify` for a square grid: tokens [B, N, p * p * c] to [B, c, H, W]."""
    grid = round(tokens.shape[1] ** 0.5)
    return rearrange(tokens, "b (h w) (p q c) -> b c (h p) (w q)", h=grid, p=patch_size, q=patch_size, c=channels)


def patch_embed_dual(
    primals: tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None],
    tangents: tuple[Tensor | None, None, None, None, None, None, Tensor | None],
) -> tuple[Tensor, Tensor | None]:
    """[prefix, conv1x1(conv_p(images))] + positions, and its tangent; see `pmf.ops.patch_embed`."""
    images, weight1, bias1, weight2, bias2, positions, prefix = primals
    images_dot, prefix_dot = tangents[0], tangents[6]
    patch_size = weight1.shape[-1]

    def project(x: Tensor, bias1: Tensor | None, bias2: Tensor | None) -> Tensor:
        x = F.conv2d(x.to(weight1.dtype), weight1, bias1, stride=patch_size)
        return F.conv2d(x, weight2, bias2).flatten(2).transpose(1, 2)

    patches = project(images, bias1, bias2)
    tokens = patches if prefix is None else torch.cat([prefix.to(patches.dtype), patches], 1)
    tokens = tokens + positions
    if images_dot is None and prefix_dot is None:
        return tokens, None
    with torch.no_grad():
        rows = (images_dot if images_dot is not None else prefix_dot).shape[0]
        tokens_dot = torch.zeros_like(tokens[tokens.shape[0] - rows :])
        start = 0 if prefix is None else prefix.shape[1]
        if images_dot is not None:
            tokens_dot[:, start:] = project(images_dot, None, None)
        if prefix_dot is not None:
            tokens_dot[:, :start] = prefix_dot
        return tokens, tokens_dot
