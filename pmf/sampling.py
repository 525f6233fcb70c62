"""Sampling: z_1 = noise_scale N(0, I); z_r = z_t - (t - r) u(z_t, t, h = t - r, w, t_min, t_max, y)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor
from tqdm import tqdm

from pmf.config import MODELS, SAMPLING
from pmf.dual import Dual
from pmf.errors import require


def seeded_noise(seeds: Sequence[int], image_shape: tuple[int, int, int]) -> Tensor:
    """Unit-variance noise [n, c, H, W] on the CPU, each image from its own seed.

    A sample's noise depends on its seed alone: not on the batch it is drawn in, nor on the device.
    Seeds lie in [0, 2^32), all that PyTorch's CPU generator reads of one.
    """
    noise = torch.empty(len(seeds), *image_shape)
    for row, seed in zip(noise, seeds, strict=True):
        row.copy_(torch.randn(image_shape, generator=torch.Generator().manual_seed(int(seed))))
    return noise


@torch.no_grad()
def generate(
    model,
    labels: Sequence[int] | Tensor,
    *,
    noise: Tensor | None = None,
    seeds: Sequence[int] | None = None,
    steps: int = 1,
    omega: float | None = None,
    t_min: float | None = None,
    t_max: float | None = None,
    batch_size: int = 64,
    progress: bool = False,
) -> Tensor:
    """Images [n, c, H, W] in about [-1, 1], one per label, on the model's device.

    One step evaluates the network once: its output is the image. More steps divide [0, 1] evenly.

    Args: labels in [0, num_classes], num_classes being the null class; noise [n, c, H, W] of unit
    variance, or seeds, one integer per image (default 0, 1, 2, ...); omega >= 1, the guidance scale,
    and [t_min, t_max], its interval, default to the published setting of the model's preset;
    batch_size images at a time, with a progress bar where asked for.
    Errors: `InputError` on labels out of range, both noise and seeds, wrong shapes, NaN, or no preset.
    """
    labels = torch.as_tensor(labels)
    classes, shape = model.config.num_classes, model.config.image_shape
    require(
        labels.ndim == 1 and labels.dtype == torch.int64 and len(labels) > 0,
        "labels: expected a non-empty list of integers",
    )
    require(
        bool(((labels >= 0) & (labels <= classes)).all()),
        f"labels: expected classes in [0, {classes}], got {labels.min().item()} to {labels.max().item()}",
    )
    require(noise is None or seeds is None, "noise: expected either noise or seeds, got both")
    require(steps >= 1, f"steps: expected at least 1, got {steps}")
    require(batch_size >= 1, f"batch_size: expected at least 1, got {batch_size}")
    seeds = range(len(labels)) if seeds is None else seeds
    require(len(seeds) == len(labels), f"seeds: expected {len(labels)} of them, got {len(seeds)}")
    require(all(0 <= seed < 2**32 for seed in seeds), "seeds: expected integers in [0, 2^32)")
    if noise is not None:
        wanted = [len(labels), *shape]
        require(list(noise.shape) == wanted, f"noise: expected shape {wanted}, got {list(noise.shape)}")
        require(bool(torch.isfinite(noise).all()), "noise: expected finite values, got NaN or infinity")
    conditions = _conditions(model.config, omega, t_min, t_max)
    device = next(model.parameters()).device

    images = []
    starts = range(0, len(labels), batch_size)
    for start in tqdm(starts, desc="sampling", unit="batch", disable=not progress):
        part = slice(start, start + batch_size)
        z = seeded_noise(seeds[part], shape) if noise is None else noise[part]
        z = model.config.noise_scale * z.to(device)
        images.append(_integrate(model, z, labels[part].to(device), steps, conditions))
    return torch.cat(images)


def _conditions(config, omega: float | None, t_min: float | None, t_max: float | None) -> tuple[float, ...]:
    """(omega, t_min, t_max): as given, else the published setting of the preset."""
    preset = next((SAMPLING[name] for name, c in MODELS.items() if c == config), {})
    given = {"omega": omega, "t_min": t_min, "t_max": t_max}
    chosen = {name: preset.get(name) if value is None else value for name, value in given.items()}
    for name, value in chosen.items():
        require(value is not None, f"{name}: this network is no preset, so {name} must be given")
    require(chosen["omega"] >= 1, f"omega: expected a guidance scale >= 1, got {chosen['omega']}")
    require(
        0 <= chosen["t_min"] <= chosen["t_max"] <= 1,
        f"t_min: expected 0 <= t_min <= t_max <= 1, got {chosen['t_min']} and {chosen['t_max']}",
    )
    return tuple(chosen.values())


def _integrate(model, z: Tensor, y: Tensor, steps: int, conditions: tuple[float, ...]) -> Tensor:
    """From z_1 to z_0 in equal steps; only the u head runs."""
    omega, t_min, t_max = (z.new_full((len(z),), value, dtype=torch.float32) for value in conditions)
    times = torch.linspace(1, 0, steps + 1, device=z.device)
    for t, r in pairwise(times):
        h = (t - r).expand(len(z))
        net = model.predict_dual(Dual(z), Dual(h), omega, t_min, t_max, y, heads=("u",))["u"].value
        # z - h u with u = (z - net) / c, written so that h = c gives net itself.
        z = torch.lerp(z, model.to_images(net).to(z.dtype), ((t - r) / t.clamp(model.T_CLIP, 1)).to(z.dtype))
    return z
