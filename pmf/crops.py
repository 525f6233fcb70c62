"""Random resized crops as in the authors' code: boxes are drawn on the host, images cropped and resized in batches.

A box of h x w pixels is resized to size x size with the antialiased bicubic filter (a = -1/2). The filter is
separable, so cropping and resizing take two matrix products per image, y = W_y x W_x^T:

W[i, j] = k((j + 1/2 - start - s (i + 1/2)) / max(s, 1)) over all pixels j of the image, rows summing to 1,
s = length / size, k the cubic kernel. Near the edge of its box the filter reads pixels outside the box; it is
truncated and renormalised only at the edge of the image. There is no loop over rows and no device-to-host copy.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from pmf.autocast import no_autocast
from pmf.errors import require

AREA = (0.08, 1.0)
RATIO = (3 / 4, 4 / 3)


def draw_crops(rows: int, height: int, width: int, generator: torch.Generator | None = None) -> Tensor:
    """Boxes (top, left, height, width) in whole pixels, float32 [rows, 4] on the CPU.

    One draw per row: the area is uniform on 0.08 to 1 of the image, the ratio width / height log-uniform on 3/4 to
    4/3. Each side is rounded and clipped to [1, side of the image]; the corner is uniform among those that fit.
    (torchvision's RandomResizedCrop redraws when a side does not fit, so full sides are rarer.) `generator` is a CPU
    generator (None: the default one); its state, `rows` and the image size determine the boxes.
    Errors: `InputError` on a generator of another device or an empty image.
    """
    require(min(height, width) >= 1, f"image: expected at least one pixel, got {height} x {width}")
    require(
        generator is None or generator.device.type == "cpu",
        f"generator: expected one on the CPU, got {generator and generator.device}",
    )
    area, ratio, *corner = torch.rand(rows, 4, dtype=torch.float64, generator=generator).unbind(1)
    area = height * width * (AREA[0] + (AREA[1] - AREA[0]) * area)
    ratio = torch.exp(math.log(RATIO[0]) + math.log(RATIO[1] / RATIO[0]) * ratio)
    image = torch.tensor([height, width], dtype=torch.float64)
    sides = torch.stack([(area / ratio).sqrt(), (area * ratio).sqrt()], dim=1).round().clamp(min=1).minimum(image)
    room = image - sides
    place = (torch.stack(corner, dim=1) * (room + 1)).floor().minimum(room)
    return torch.cat([place, sides], dim=1).float()


def resize_crops(images: Tensor, boxes: Tensor, size: int) -> Tensor:
    """Crop each image by its own box and resize it: [B, C, H, W], boxes [B, 4] -> [B, C, size, size], channels last.

    Antialiased bicubic as in the equation above (the authors' `jax.image.scale_and_translate`). Weights and products
    are in float32 (float64 for float64 images), outside autocast; the result has that dtype. Differentiable in
    `images`; `boxes` may be on the CPU. Errors: `InputError` on shapes that do not match.
    """
    rows, _, height, width = images.shape
    require(list(boxes.shape) == [rows, 4], f"boxes: expected shape [{rows}, 4], got {list(boxes.shape)}")
    dtype = torch.promote_types(images.dtype, torch.float32)
    top, left, tall, wide = boxes.to(images.device, dtype, non_blocking=True).unbind(1)
    with no_autocast(images.device):
        vertical, horizontal = _weights(top, tall, height, size), _weights(left, wide, width, size)
        crops = torch.einsum("bih,bchw->bciw", vertical, images.to(dtype))
        crops = torch.einsum("bjw,bciw->bcij", horizontal, crops)
    return crops.contiguous(memory_format=torch.channels_last)


def _weights(start: Tensor, length: Tensor, pixels: int, size: int) -> Tensor:
    """W [B, size, pixels] for boxes that cover `length` pixels starting at `start`."""
    start, length = start[:, None, None], length[:, None, None]
    scale = length / size
    column = torch.arange(pixels, device=start.device, dtype=start.dtype) - start
    row = torch.arange(size, device=start.device, dtype=start.dtype)[:, None]
    weight = _cubic((column + 0.5 - scale * (row + 0.5)) / scale.clamp(min=1))
    return weight / weight.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """The cubic convolution kernel with a = -1/2."""
    x = x.abs()
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))
