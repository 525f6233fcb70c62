"""Convert images for a network's input and output: value ranges, the crop of published statistics, PNG files."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.nn.functional import pad

from pmf.atomic_files import write_atomically
from pmf.errors import check_path, extra, require
from pmf.fields import check_values
from pmf.pictures import SUFFIXES, checked_size, to_rgb

if TYPE_CHECKING:
    import PIL.Image

GAP = 2
LARGEST = 10_000
"""The most columns of a grid, and the most pixels that a small image is enlarged to."""


def to_float(images: Tensor) -> Tensor:
    """Images as float32 in [-1, 1]: uint8 is scaled, the values of other dtypes stay."""
    return images.float().div_(127.5).sub_(1) if images.dtype == torch.uint8 else images.float()


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, rounded as in published code: round(clip((x + 1) / 2 * 255, 0, 255))."""
    check_values(Tensor, images=images)
    require(images.is_floating_point(), lambda: f"images: expected floating values in [-1, 1], got {images.dtype}")
    return ((images.float() + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def check_png_name(argument: str, path: str | Path) -> None:
    """Raise `InputError` for the name of another kind of picture, and where another kind of file would be replaced."""
    check_path(argument, path)
    suffix = Path(path).suffix.lower()  # a device or a pipe has none
    good = suffix in ("", ".png") or not (suffix in SUFFIXES or os.path.isfile(path))
    require(good, lambda: f"{argument}: expected a name that ends in .png, got {path}")


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write pixels uint8 [H, W, c] (c 1 or 3). Errors: `InputError` if `path` cannot be written, or without pillow."""
    with extra("train", "path: a picture needs"):
        from PIL import Image
    check_values(np.ndarray, pixels=pixels)
    shape, fits = list(pixels.shape), pixels.dtype == np.uint8 and pixels.ndim == 3 and pixels.shape[2] in (1, 3)
    require(fits, f"pixels: expected uint8 [H, W, 1 or 3], got {pixels.dtype} {shape}")
    check_png_name("path", path)
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_grid(path: str | Path, images: Tensor, *, columns: int, min_side: int = 64) -> None:
    """Write images [n, c, H, W] in [-1, 1] (c 1 or 3) as one PNG, row by row.

    Small images are enlarged by whole pixels until their side reaches `min_side`; a line two pixels wide
    separates neighbours. Errors: see `save_png`.
    """
    check_values(Tensor, images=images)
    shape, fits = list(images.shape), images.ndim == 4 and images.shape[1] in (1, 3) and images.numel() > 0
    fits = fits and images.is_floating_point()
    require(fits, f"images: expected floats [n, 1 or 3, H, W], got {images.dtype} {shape}")
    check_values(int, columns=columns, min_side=min_side)
    require(0 < columns <= LARGEST, f"columns: expected 1 to {LARGEST}, got {columns}")
    require(0 < min_side <= LARGEST, f"min_side: expected 1 to {LARGEST} pixels, got {min_side}")
    require(bool(torch.isfinite(images).all()), "images: expected finite values, got NaN or infinity")
    pixels = to_bytes(images.float().cpu())
    zoom = max(1, -(-min_side // pixels.shape[2]))
    pixels = pad(pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (0, GAP, 0, GAP), value=255)
    blank = pixels.new_full((-len(pixels) % columns, *pixels.shape[1:]), 255)
    grid = rearrange(torch.cat([pixels, blank]), "(r columns) c h w -> (r h) (columns w) c", columns=columns)
    save_png(path, grid[:-GAP, :-GAP].numpy())


def centre_crop(
    picture: PIL.Image.Image, size: int, note: Callable[[str], object] = lambda lost: None
) -> PIL.Image.Image:
    """The central square of a picture at `size` x `size` pixels, RGB (see `pmf.pictures.to_rgb`, also for `note`).

    This is ADM's preparation of ImageNet, on which published statistics are based: halve with a box filter while the
    short side is at least twice `size`, resize the short side to `size` with a bicubic filter, crop the centre.
    EXIF orientation is ignored. Errors: those of `to_rgb`; `InputError` if the resized picture would be too large.
    """
    from PIL.Image import Image, Resampling

    check_values(Image, picture=picture)
    check_values(int, size=size)
    require(size > 0, f"size: expected a positive number, got {size}")
    checked_size(*_sides_at(picture.size, size))  # a strip of 8000 x 1 pixels would become gigantic
    picture = to_rgb(picture, note)
    while min(picture.size) >= 2 * size:
        picture = picture.resize((picture.width // 2, picture.height // 2), Resampling.BOX)
    width, height = _sides_at(picture.size, size)
    picture = picture.resize((width, height), Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def _sides_at(sides: tuple[int, int], size: int) -> tuple[int, int]:
    """A picture's sides once the shorter one is `size`."""
    scale = size / min(sides)
    width, height = (round(side * scale) for side in sides)
    return width, height
