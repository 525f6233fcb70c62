"""The random numbers of a training step, and their distributions (arXiv 2601.22158)."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
from torch import Tensor

from pmf.config import LossConfig, ModelConfig
from pmf.errors import checked_device, extent, readable, require
from pmf.fields import check_values

BYTES = 20.0
"""Images with larger values hold bytes."""
BEYOND = 1.5
"""Images with larger values are scaled in another way, as by a mean and a deviation; filters stay below."""


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training step of B rows.

    All but `noise` are on the CPU, so that counting rows does not wait for a GPU.
    """

    t: Tensor
    """float [B] in [0, 1]: the time of z_t; 0 is data, 1 is noise."""
    r: Tensor
    """float [B] in [0, t]: the end time of the average velocity u."""
    fm_mask: Tensor
    """bool [B]: flow-matching rows, t = r."""
    omega: Tensor
    """float [B], at least 1: the guidance scale w."""
    t_min: Tensor
    """float [B]: guidance acts for t in [t_min, t_max]; 0 on flow-matching rows."""
    t_max: Tensor
    """float [B]; 1 on flow-matching rows."""
    drop_mask: Tensor
    """bool [B]: rows trained on the null class."""
    noise: Tensor
    """float [B, c, H, W] of unit variance, on any device; the loss multiplies it by noise_scale."""

    def rows(self, index: Tensor) -> Draws:
        """The draws of rows `index`, in that order."""
        return Draws(**{f.name: _select(getattr(self, f.name), index) for f in fields(self)})

    def flow_matching(self) -> Draws:
        """Draws of plain flow matching: a copy with r = t and the null class in every row, without guidance."""
        every = torch.ones_like(self.fm_mask)
        whole = {"t_min": torch.zeros_like(self.t), "t_max": torch.ones_like(self.t)}
        return replace(self, r=self.t, fm_mask=every, drop_mask=every, **whole)

    def scalars(self) -> dict[str, Tensor]:
        """Everything but the noise, by name: vectors [B] on the CPU."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "noise"}


def step_seed(seed: int, index: int, purpose: str) -> int:
    """A separate seed for each (run seed, step or epoch, purpose).

    With a generator seeded by it, a step's draws depend only on (seed, step), not on earlier steps. The seed has 32
    bits, because PyTorch's CPU generator uses no more. Errors: `InputError` on negative numbers.
    """
    check_values(int, seed=seed, index=index)
    require(seed >= 0 and index >= 0, f"seed, index: expected >= 0, got {seed}, {index}")
    entropy = [seed, index, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])


def sample_draws(
    batch: int,
    image_shape: tuple[int, int, int],
    loss_config: LossConfig,
    generator: torch.Generator | None = None,
    device: torch.device | str | int | None = None,
) -> Draws:
    """The random draws of one step for a device batch of `batch` rows.

    t and r are logit-normal (tr_uniform: sometimes uniform), sorted so that t >= r; the first rows are
    flow-matching rows with r = t. omega has density proportional to omega^-cfg_beta. t_min and t_max are uniform
    on the lower and the upper half of [0, 1], but 0 and 1 on flow-matching rows. The first Binomial(B, class_dropout)
    rows are dropped. `generator` is a CPU generator (None: the default one). `noise` is drawn on `device`.
    Errors: `InputError` on a batch without rows.
    """
    check_values(int, batch=batch)
    require(batch >= 1, f"batch: expected at least 1 row, got {batch}")
    check_values(tuple[int, int, int], image_shape=image_shape)
    require(min(image_shape) > 0, lambda: f"image_shape: expected positive sizes, got {image_shape}")
    check_values(LossConfig, loss_config=loss_config)
    check_values(torch.Generator | None, generator=generator)
    c, g = loss_config, generator

    def uniform(low: float = 0.0, high: float = 1.0) -> Tensor:
        return low + (high - low) * torch.rand(batch, generator=g)

    def logit_normal() -> Tensor:
        return torch.sigmoid(c.p_mean + c.p_std * torch.randn(batch, generator=g))

    t, r = logit_normal(), logit_normal()
    if c.tr_uniform:
        replaced = uniform() < 0.1
        t, r = torch.where(replaced, uniform(), t), torch.where(replaced, uniform(), r)
    fm_mask = torch.arange(batch) < int(batch * c.data_proportion)
    r = torch.where(fm_mask, t, r)
    t, r = torch.maximum(t, r), torch.minimum(t, r)

    dropped = int((uniform() < c.class_dropout).sum())  # Binomial(batch, class_dropout)
    device = checked_device("cpu" if device is None else device)
    noise_generator = torch.Generator(device)
    noise_generator.manual_seed(int(torch.randint(2**62, (), generator=g)))
    return Draws(
        t=t,
        r=r,
        fm_mask=fm_mask,
        omega=_omega(uniform(), c.cfg_max, c.cfg_beta),
        t_min=torch.where(fm_mask, 0.0, uniform(0.0, 0.5)),
        t_max=torch.where(fm_mask, 1.0, uniform(0.5, 1.0)),
        drop_mask=torch.arange(batch) < dropped,
        noise=torch.randn(batch, *image_shape, generator=noise_generator, device=device),
    )


def _omega(uniform: Tensor, cfg_max: float, beta: float) -> Tensor:
    """Inverse distribution function of the density proportional to omega^-beta on [1, 1 + cfg_max]."""
    span = math.log1p(cfg_max)
    if beta == 1:
        return torch.exp(uniform * span)
    return torch.exp(torch.log1p(uniform * math.expm1((1 - beta) * span)) / (1 - beta))


def check_batch(x: Tensor, y: Tensor, draws: Draws, config: ModelConfig) -> None:
    """Check that images, labels and draws form a valid training step of a network.

    Check shapes always, and values of images, labels and noise if they are `readable`. Errors: see `pmf_loss`.
    """
    shape = list(config.image_shape)
    require(isinstance(x, Tensor), lambda: f"x: expected a tensor, got {type(x).__name__}")
    require(isinstance(y, Tensor), lambda: f"y: expected a tensor, got {type(y).__name__}")
    require(x.layout == torch.strided, lambda: f"x: expected a dense tensor, got {x.layout}")
    require(x.is_floating_point(), f"x: expected floating images in [-1, 1], got {x.dtype}")
    require(
        x.ndim == 4 and list(x.shape[1:]) == shape and len(x) > 0,
        f"x: expected shape [B, {', '.join(map(str, shape))}] with B > 0, got {list(x.shape)}",
    )
    require(list(y.shape) == [len(x)], f"y: expected shape [{len(x)}], got {list(y.shape)}")
    require(y.dtype == torch.int64, f"y: expected int64 class labels, got {y.dtype}")
    require(y.device == x.device, f"y: expected on {x.device}, as x is, got {y.device}")
    _check_draws(draws, x.shape)
    if readable(x, y):
        require(bool(torch.isfinite(x).all()), "x: expected finite images, got NaN or infinity")
        warn_of_scale("x", x, stacklevel=5)
        finite = not readable(draws.noise) or bool(torch.isfinite(draws.noise).all())
        require(finite, "draws.noise: expected finite values, got NaN or infinity")
        require(
            bool(((y >= 0) & (y < config.num_classes)).all()),
            lambda: f"y: expected labels in [0, {config.num_classes - 1}], got {extent(y)}",
        )


def warn_of_scale(argument: str, images: Tensor, stacklevel: int) -> None:
    """Warn of images in [0, 255] or [0, 1], or far beyond [-1, 1]; constant ones say nothing about their scale."""
    low, high = (value.item() for value in images.aminmax())
    if high > BYTES:
        seen = f"look like [0, 255], expected {argument} / 127.5 - 1"
    elif low >= 0 and 0.5 < high <= 1 and low < high:
        seen = f"look like [0, 1], expected 2 * {argument} - 1"
    elif max(-low, high) > BEYOND and low < high and images.shape[1] in (1, 3):  # latents have more channels
        seen = f"reach from {low:.3g} to {high:.3g}"
    else:
        return
    warnings.warn(f"{argument}: expected images in [-1, 1]; these {seen}", stacklevel=stacklevel)


def _check_draws(draws: Draws, shape: torch.Size) -> None:
    """Check shapes, devices and ranges of the draws for images of that shape."""
    require(isinstance(draws, Draws), lambda: f"draws: expected those of sample_draws, got {type(draws).__name__}")
    check_values(Tensor, **{f"draws.{name}": value for name, value in vars(draws).items()})
    got = list(draws.noise.shape)
    require(got == list(shape), f"draws.noise: expected shape {list(shape)}, got {got}")
    for name, value in draws.scalars().items():
        wanted = list(shape[:1])
        require(list(value.shape) == wanted, f"draws.{name}: expected shape {wanted}, got {list(value.shape)}")
        message = f"draws.{name}: expected a tensor on the CPU, got one on {value.device}"
        require(value.device.type == "cpu", message)
    for name in ("fm_mask", "drop_mask"):
        dtype = getattr(draws, name).dtype
        require(dtype == torch.bool, f"draws.{name}: expected bool, got {dtype}")
    for name in ("t", "r", "omega", "t_min", "t_max"):
        dtype = getattr(draws, name).dtype
        require(dtype.is_floating_point, f"draws.{name}: expected a floating dtype, got {dtype}")
    finite = (draws.omega >= 1) & draws.omega.isfinite()
    require(bool(finite.all()), "draws: expected omega >= 1 in every row, and finite")
    within = (draws.t_min >= 0) & (draws.t_min <= draws.t_max) & (draws.t_max <= 1)
    require(bool(within.all()), "draws: expected 0 <= t_min <= t_max <= 1 in every row")
    require(bool((draws.r <= draws.t).all()), "draws: expected r <= t in every row (h = t - r >= 0)")
    require(bool((draws.r >= 0).all() and (draws.t <= 1).all()), "draws: expected t and r in [0, 1]")
    require(bool((draws.t == draws.r)[draws.fm_mask].all()), "draws: expected r = t where fm_mask is set")
    whole = (draws.t_min == 0) & (draws.t_max == 1)
    require(bool(whole[draws.fm_mask].all()), "draws: expected the interval [0, 1] where fm_mask is set")


def _pinned(host: Tensor, device: torch.device) -> Tensor:
    """The host tensor in memory that can be copied to `device` asynchronously: pinned, for CUDA."""
    return host.pin_memory() if device.type == "cuda" else host


def to_device(device: torch.device, *vectors: Tensor) -> tuple[Tensor, ...]:
    """Copy host vectors to `device` in one copy that the host does not wait for."""
    host = _pinned(torch.cat(vectors), device)
    return host.to(device, non_blocking=True).split([len(vector) for vector in vectors])


def _select(value: Tensor, index: Tensor) -> Tensor:
    """Rows `index` (on the CPU) of `value`, wherever it lives."""
    (index,) = to_device(value.device, index)
    return value[index]
