"""Pictures: image tensors as PNG grids, and the loss curve."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from torch.nn.functional import pad

from pmf.atomic_files import write_atomically

GAP = 2


def to_bytes(images: Tensor) -> Tensor:
    """round(clip((x + 1) / 2 * 255, 0, 255)) as uint8."""
    return ((images + 1) / 2 * 255).clamp(0, 255).round().to(torch.uint8)


def save_png(path: str | Path, pixels: np.ndarray) -> None:
    """Write pixels uint8 [H, W, c] (c 1 or 3). Errors: `InputError` when `path` cannot be written."""
    picture = Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels)
    write_atomically(path, lambda temporary: picture.save(temporary, format="PNG"))


def save_grid(path: str | Path, images: Tensor, *, columns: int, min_side: int = 64) -> None:
    """Write images [n, c, H, W] in [-1, 1] (c 1 or 3) as one PNG, row by row.

    Small images are enlarged by whole pixels until their side reaches `min_side`; a line two pixels wide
    separates neighbours. Errors: `InputError` when `path` cannot be written.
    """
    pixels = to_bytes(images.float().cpu())
    zoom = max(1, -(-min_side // pixels.shape[2]))
    pixels = pad(pixels.repeat_interleave(zoom, 2).repeat_interleave(zoom, 3), (0, GAP, 0, GAP), value=255)
    blank = pixels.new_full((-len(pixels) % columns, *pixels.shape[1:]), 255)
    grid = rearrange(torch.cat([pixels, blank]), "(r columns) c h w -> (r h) (columns w) c", columns=columns)
    save_png(path, grid[:-GAP, :-GAP].numpy())


def save_loss_curve(path: str | Path, steps: list[int], terms: dict[str, list[float]]) -> None:
    """Write a PNG with one panel per reported term, over steps: the values and their running mean."""
    from matplotlib.figure import Figure  # takes a second to import, and only this function needs it

    figure = Figure(figsize=(4.5 * len(terms), 3.2), layout="constrained")
    for axis, (name, values) in zip(np.atleast_1d(figure.subplots(1, len(terms))), terms.items(), strict=True):
        width = max(1, len(values) // 20)
        kernel = np.ones(width) / width
        axis.plot(steps, values, color="0.8", linewidth=0.6, label="step")
        axis.plot(steps[width - 1 :], np.convolve(values, kernel, "valid"), label=f"mean of {width}")
        axis.set(xlabel="step", title=name, yscale="log")
        axis.legend(frameon=False)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=120))
