"""The authors' training step in JAX, as far as it affects weights, written for the tests.

Weights have flax's layout, since optax.contrib.muon selects them by dimensions: Dense kernels [in, out] are its
matrices; convolutions are [h, w, in, out], the class table, tokens and positions [1, n, C]. Random numbers are inputs.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import pmf
from pmf.reference.jax_loss import adaptive, jax_fields
from pmf.reference.jax_network import JaxNetwork, arrays

CROP_SIZE = 224


def precision(dtype: torch.dtype):
    """A context in which JAX computes in float32 or float64."""
    return jax.enable_x64(dtype == torch.float64)


def as_jax(value: Tensor) -> jax.Array:
    return jnp.asarray(value.detach().numpy())


def as_torch(value: jax.Array) -> Tensor:
    return torch.from_numpy(np.array(value))


def to_flax(name: str, value):
    """Convert a parameter of ours, of this name, to flax's layout."""
    if name.startswith(("conditioning.classes", "conditioning.tokens", "patch_embed.positions")):
        return value[None]
    if value.ndim == 4:
        return value.transpose(2, 3, 1, 0)
    return value.T if value.ndim == 2 else value


def from_flax(name: str, value):
    """The inverse of `to_flax`."""
    if value.ndim == 3:
        return value[0]
    if value.ndim == 4:
        return value.transpose(3, 2, 0, 1)
    return value.T if value.ndim == 2 else value


class SmallDistance(nn.Module):
    """A distance [B] between images [B, 3, H, W] by a small random network, instead of LPIPS and ConvNeXt."""

    def __init__(self, seed: int, dtype: torch.dtype) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        for name, shape in (("first", (8, 3, 8, 8)), ("second", (16, 8, 4, 4))):
            weight = torch.randn(shape, generator=generator, dtype=torch.float32) / shape[1] ** 0.5 / shape[2]
            self.register_buffer(name, weight.to(dtype))

    def features(self, x: Tensor) -> Tensor:
        x = torch.tanh(F.conv2d(x, self.first, stride=8))
        return torch.tanh(F.conv2d(x, self.second, stride=4)).flatten(1)

    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (self.features(a) - self.features(b)).square().mean(1)

    def in_jax(self, a, b):
        """The same distance in JAX, of images [B, H, W, 3]."""

        def features(x):
            for weight, stride in ((self.first, 8), (self.second, 4)):
                kernel = as_jax(weight).transpose(2, 3, 1, 0)
                x = jax.lax.conv_general_dilated(
                    x, kernel, (stride, stride), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
                )
                x = jnp.tanh(x)
            return x

        return jnp.square(features(a) - features(b)).mean((1, 2, 3))


def crop(image, box, size: int = CROP_SIZE):
    """Resize the box (top, left, height, width) of an image [H, W, C] to [size, size, C] as the authors do."""
    scale = size / box[2:]
    return jax.image.scale_and_translate(
        image, (size, size, image.shape[2]), (0, 1), scale, -box[:2] * scale, method="cubic", antialias=True
    )


def draw_boxes(seed: int, rows: int, height: int, width: int):
    """Draw boxes (top, left, height, width) [rows, 4] as the authors do, each with its own key."""

    def box(key):
        of_area, of_ratio, of_top, of_left = jax.random.split(key, 4)
        area = height * width * jax.random.uniform(of_area, minval=0.08, maxval=1.0)
        low, high = jnp.log(jnp.array([3 / 4, 4 / 3]))
        ratio = jnp.exp(jax.random.uniform(of_ratio, minval=low, maxval=high))
        w = jnp.clip(jnp.round(jnp.sqrt(area * ratio)).astype(int), 1, width)
        h = jnp.clip(jnp.round(jnp.sqrt(area / ratio)).astype(int), 1, height)
        top = jax.random.randint(of_top, (), 0, height - h + 1)
        left = jax.random.randint(of_left, (), 0, width - w + 1)
        return jnp.stack([top, left, h, w])

    return jax.jit(jax.vmap(box))(jax.random.split(jax.random.key(seed), rows))


def ema_decay(step, half_life_kimg: float, batch: int):
    """Decay of the average in update `step` (from 1), with the authors' ramp."""
    half_life = jnp.minimum(half_life_kimg * 1000, step * batch * 0.05)
    return 0.5 ** (batch / jnp.maximum(half_life, 1e-8))


class AuthorsTraining:
    """Weights, optax's state and averages; `step` updates them by one batch."""

    def __init__(
        self,
        model: pmf.PMFDiT,
        loss: pmf.LossConfig,
        distances: dict[str, SmallDistance],
        half_lives: tuple[float, ...],
        learning_rate: float,
    ) -> None:
        self.loss_config, self.distances, self.half_lives = loss, distances, half_lives
        dtype = next(model.parameters()).dtype
        self.network = functools.partial(JaxNetwork, model.config, compute=str(dtype).removeprefix("torch."))
        self.optimizer = optax.contrib.muon(optax.constant_schedule(learning_rate), adam_b2=0.95)
        params = {name: to_flax(name, as_jax(p)) for name, p in model.named_parameters()}
        self.state = {
            "step": jnp.zeros((), jnp.int32),
            "params": params,
            "optimizer": self.optimizer.init(params),
            "averages": {k: params for k in half_lives},
        }
        self._jitted = jax.jit(self._step)

    def loss(self, params: dict, batch: dict[str, jax.Array], boxes: jax.Array):
        """The mean loss; perceptual terms count on rows with t < perceptual_max_t."""
        config = self.loss_config
        adp = functools.partial(adaptive, config=config)
        ours = {name: from_flax(name, value) for name, value in params.items()}
        fields = jax_fields(self.network(ours), batch)
        rows = sum(adp(jnp.square(fields[name] - fields["v_g"]).sum((1, 2, 3))) for name in ("V", "v"))
        x_hat = fields["z_t"] - batch["t"][:, None, None, None] * fields["u"]
        a, b = (jax.vmap(crop)(images.transpose(0, 2, 3, 1), boxes) for images in (x_hat, batch["x"]))
        seen = batch["t"] < config.perceptual_max_t
        for name, weight in (("lpips", config.lpips_weight), ("convnext", config.convnext_weight)):
            rows += weight * adp(jnp.where(seen, self.distances[name].in_jax(a, b), 0.0))
        return rows.mean()

    def _step(self, state: dict[str, Any], batch: dict[str, jax.Array], boxes: jax.Array):
        loss, gradients = jax.value_and_grad(self.loss)(state["params"], batch, boxes)
        updates, optimizer = self.optimizer.update(gradients, state["optimizer"], state["params"])
        params, step = optax.apply_updates(state["params"], updates), state["step"] + 1
        averages = {}
        for k, average in state["averages"].items():
            decay = ema_decay(step, k, len(boxes))
            averages[k] = jax.tree.map(lambda e, p, decay=decay: decay * e + (1 - decay) * p, average, params)
        return {"step": step, "params": params, "optimizer": optimizer, "averages": averages}, loss

    def step(self, x: Tensor, y: Tensor, draws: pmf.Draws, boxes: Tensor) -> float:
        """Take a step on images x, labels y and these draws and boxes (top, left, height, width); return its loss."""
        batch = arrays({"x": x, "y": y, **vars(draws)})
        self.state, loss = self._jitted(self.state, batch, as_jax(boxes.to(x.dtype)))
        return float(loss)

    def weights(self) -> dict[str, dict[str, Tensor]]:
        """The network's weights and the averages, with our names and layout."""
        kinds = {"model": self.state["params"]} | {f"ema_{k:g}": v for k, v in self.state["averages"].items()}
        return {
            kind: {name: as_torch(from_flax(name, value)) for name, value in tensors.items()}
            for kind, tensors in kinds.items()
        }
