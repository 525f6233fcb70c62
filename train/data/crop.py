"""Any picture as a square of the training size: RGB, centre-cropped by the convention of ImageNet generation."""

from __future__ import annotations

import io

import numpy as np
from PIL import Image


def centre_crop(picture: Image.Image, size: int) -> Image.Image:
    """The central square of a picture at `size` x `size` pixels, RGB.

    As ADM prepares ImageNet, which published statistics rest on: halve with a box filter while the short side is
    at least twice `size`, bring the short side to `size` with a bicubic filter, cut out the middle. The
    orientation that a camera may have noted is not applied.
    """
    picture = picture.convert("RGB")
    while min(picture.size) >= 2 * size:
        width, height = picture.size
        picture = picture.resize((width // 2, height // 2), Image.Resampling.BOX)
    scale = size / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - size) // 2, (height - size) // 2
    return picture.crop((left, top, left + size, top + size))


def encode(picture: Image.Image, encoding: str) -> bytes:
    """A picture as the bytes of a shard entry: npy (uint8 [3, H, W]), png, or jpg at quality 95 without subsampling."""
    buffer = io.BytesIO()
    if encoding == "npy":
        np.save(buffer, np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1)))
    elif encoding == "png":
        picture.save(buffer, "PNG", compress_level=1)
    else:
        picture.save(buffer, "JPEG", quality=95, subsampling=0)
    return buffer.getvalue()


def decode(data: bytes | bytearray) -> np.ndarray:
    """The bytes of a png or jpg entry as uint8 [3, H, W]."""
    with Image.open(io.BytesIO(data)) as picture:
        return np.array(picture.convert("RGB")).transpose(2, 0, 1).copy()
