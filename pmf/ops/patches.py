"""Images to tokens."""

from __future__ import annotations

from typing import overload

import torch
from torch import Tensor

from pmf import reference
from pmf.autocast import product_dtype
from pmf.errors import InputError
from pmf.fields import checked_integer
from pmf.inputs import Inputs, Moving, Pair
from pmf.pair import Dual


def check_sides(op: str, name: str, height: int, width: int, patch: int) -> None:
    """Errors: `InputError` on images with sides that are no multiples of the patch size."""
    if height % patch != 0 or width % patch != 0:
        sides = f"sides that are multiples of the patch size {patch}, got {height} x {width}"
        raise InputError(f"{op}: {name} must have {sides}")


def _sizes(op: str, name: str, given: Tensor, *letters: str) -> tuple[int, ...]:
    """The sizes of a tensor of any dtype, one for each letter. Errors: `InputError` on another number of them."""
    sizes = getattr(given, "shape", None)
    if sizes is None or len(sizes) != len(letters):
        got = type(given).__name__ if sizes is None else list(sizes)
        raise InputError(f"{op}: {name} must be a tensor [{', '.join(letters)}], got {got}")
    return sizes


def patchify(images: Tensor, patch_size: int) -> Tensor:
    """Images [B, c, H, W] to tokens [B, N, p * p * c], laid out (row, column, channel) inside a patch; any dtype.

    Errors: `InputError` on a patch size p that does not divide both sides.
    """
    patch_size = checked_integer("patchify", "patch_size", patch_size)
    _, _, height, width = _sizes("patchify", "images", images, "B", "c", "H", "W")
    check_sides("patchify", "images", height, width, patch_size)
    return reference.patchify(images, patch_size)


def unpatchify(tokens: Tensor, patch_size: int, channels: int) -> Tensor:
    """The inverse of `patchify` for a square grid: tokens [B, N, p * p * c] to [B, c, H, W].

    Errors: `InputError` on a number of tokens that is no square, and on another width.
    """
    patch_size = checked_integer("unpatchify", "patch_size", patch_size)
    channels = checked_integer("unpatchify", "channels", channels)
    _, count, width = _sizes("unpatchify", "tokens", tokens, "B", "N", "p * p * c")
    if count == 0 or round(count**0.5) ** 2 != count:
        raise InputError(f"unpatchify: tokens must be as many as a square grid has, got {count}")
    if width != patch_size**2 * channels:
        wanted = f"{patch_size**2 * channels} values for patch_size {patch_size} and channels {channels}"
        raise InputError(f"unpatchify: tokens must have {wanted}, got {width}")
    return reference.unpatchify(tokens, patch_size, channels)


@overload
def patch_embed(
    images: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor,
    prefix: Tensor | None = None, *, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def patch_embed(
    images: Pair, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, positions: Tensor,
    prefix: Moving | None = None, *, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def patch_embed(images, weight1, bias1, weight2, bias2, positions, prefix=None, *, impl=None):
    """Image to token sequence: [prefix, (patches weight1 + bias1) weight2 + bias2] + positions.

    Args: images [B, c, H, W]; weight1 [E, c, p, p], the p x p convolution of stride p; bias1 [E];
    weight2 [C, E, 1, 1]; bias2 [C]; positions [S, C]; prefix [B, P, C] or None (P = 0);
    S = P + (H / p) (W / p).
    Returns [B, S, C]. Tangents: of images and prefix.
    """
    fixed = {"weight1": weight1, "bias1": bias1, "weight2": weight2, "bias2": bias2, "positions": positions}
    inputs = Inputs("patch_embed", {"images": images, "prefix": prefix}, fixed)
    images, prefix = (dual.value for dual in inputs.duals)
    inputs.shape("images", images, None, None, None, None)
    batch, channels, height, width = images.shape
    inputs.shape("weight1", weight1, None, channels, None, None)
    inner, _, patch, _ = weight1.shape
    inputs.shape("weight1", weight1, inner, channels, patch, patch)
    check_sides("patch_embed", "images", height, width, patch)
    inputs.shape("bias1", bias1, inner)
    inputs.shape("weight2", weight2, None, inner, 1, 1)
    outer = weight2.shape[0]
    inputs.shape("bias2", bias2, outer)
    prefix_length = 0
    if prefix is not None:
        inputs.shape("prefix", prefix, batch, None, outer)
        prefix_length = prefix.shape[1]
    inputs.shape("positions", positions, prefix_length + (height // patch) * (width // patch), outer)
    run = inputs.implementation(impl, patch, inner)
    images, prefix = inputs.duals
    dtype = weight1.dtype if weight1.dtype == torch.float64 else product_dtype(weight1)
    return inputs.give(run.patch_embed(images, **fixed, prefix=prefix, dtype=dtype))
