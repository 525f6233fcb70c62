"""The pMF step in JAX, written for the benchmark: what a script like the published one costs on this machine.

The published in-context network and the naive step: three guidance passes, `jax.jvp` of u with v as
auxiliary output, `jax.value_and_grad` over it. Needs JAX; nothing else in the library does.
"""

from __future__ import annotations

import functools
import importlib.util
import os
from collections.abc import Callable
from dataclasses import fields

import torch
from torch import Tensor

from pmf import ops
from pmf.config import PREFIX_TOKENS, LossConfig, ModelConfig
from pmf.draws import Draws
from pmf.errors import require
from pmf.model import PMFDiT
from pmf.reference.embedding import FEATURES, MAX_PERIOD

NORM_EPS = 1e-6
BATCH_FIELDS = tuple(field.name for field in fields(Draws))


def available() -> bool:
    """Whether JAX is installed."""
    return importlib.util.find_spec("jax") is not None


def _jax():
    """JAX and its numpy, imported on first use; it takes memory as it needs it, not most of the GPU at once."""
    require(available(), "jax: the JAX step needs the package jax: pip install jax")
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    import jax
    import jax.numpy as jnp

    return jax, jnp


class JaxNetwork:
    """The in-context network as functions of `params`, a dict of arrays named as in `PMFDiT.state_dict`.

    Matrix products run in `compute`; norms, softmax and the residual stream in float32, as autocast does, or in
    float64 where that is computed in.
    """

    def __init__(self, config: ModelConfig, compute: str = "float32") -> None:
        require(config.conditioning == "in_context", "config: the JAX step has the published conditioning alone")
        self.config = config
        self.jax, self.jnp = _jax()
        self.compute = self.jnp.dtype(compute)
        self.wide = self.jnp.promote_types(self.compute, self.jnp.float32)
        self.rope = [self.jnp.asarray(x.numpy()) for x in ops.rope_tables(config.grid_size, config.head_dim)]

    def product(self, equation: str, *operands, out=None):
        """An einsum of operands in the compute precision; the result in `out`, or in the same."""
        rounded = (x.astype(self.compute) for x in operands)
        return self.jnp.einsum(equation, *rounded, preferred_element_type=out)

    def linear(self, params: dict, name: str, x):
        """x W^T, and b where there is one."""
        y = self.product("...i,oi->...o", x, params[f"{name}.weight"])
        bias = params.get(f"{name}.bias")
        return y if bias is None else y + bias.astype(y.dtype)

    def norm(self, weight, x):
        """RMSNorm over the last dimension."""
        x = x.astype(self.wide)
        return x * self.jax.lax.rsqrt(self.jnp.square(x).mean(-1, keepdims=True) + NORM_EPS) * weight

    def scalar(self, params: dict, name: str, s):
        """A scalar [B] as [B, C]: sinusoids, Linear, SiLU, Linear."""
        frequency = MAX_PERIOD ** (-self.jnp.arange(FEATURES // 2) / (FEATURES // 2))
        angle = s[:, None] * frequency
        features = self.jnp.concatenate([self.jnp.cos(angle), self.jnp.sin(angle)], -1)
        name = f"conditioning.embedders.{name}"
        return self.linear(params, f"{name}.fc2", self.jax.nn.silu(self.linear(params, f"{name}.fc1", features)))

    def prefix(self, params: dict, h, omega, t_min, t_max, y):
        """The prefix tokens [B, P, C]."""
        scalars = {"h": h, "omega": 1 - 1 / omega, "t_min": t_min, "t_max": t_max}
        embedded = {name: self.scalar(params, name, value) for name, value in scalars.items()}
        embedded["y"] = params["conditioning.classes.weight"][y]
        groups = [params[f"conditioning.tokens.{name}"] + embedded[name][:, None] for name in PREFIX_TOKENS]
        return self.jnp.concatenate(groups, 1)

    def embed(self, params: dict, z, prefix):
        """[prefix, patches] + positions."""
        c, p, name = self.config, self.config.patch_size, "patch_embed"
        patches = z.reshape(-1, c.in_channels, c.grid_size, p, c.grid_size, p)
        first, second = (params[f"{name}.{proj}.weight"] for proj in ("proj1", "proj2"))
        x = self.product("bchpwq,ocpq->bhwo", patches, first) + params[f"{name}.proj1.bias"].astype(self.compute)
        x = self.product("bhwi,oi->bhwo", x, second[:, :, 0, 0]) + params[f"{name}.proj2.bias"].astype(self.compute)
        tokens = x.reshape(len(z), c.num_patches, c.hidden_size)
        return self.jnp.concatenate([prefix, tokens.astype(prefix.dtype)], 1) + params[f"{name}.positions"]

    def rotate(self, x):
        """Turn adjacent pairs of the patch tokens' heads [B, S, H, D]."""
        start = self.config.prefix_length
        cos, sin = (table[:, None] for table in self.rope)
        a, b = x[:, start:, :, 0::2], x[:, start:, :, 1::2]
        turned = self.jnp.stack([a * cos - b * sin, a * sin + b * cos], -1).reshape(x[:, start:].shape)
        return self.jnp.concatenate([x[:, :start], turned], 1)

    def attention(self, params: dict, name: str, x):
        """Softmax attention with normalised, rotated q and k."""
        q, k, v = (
            self.linear(params, f"{name}.{part}_proj", x).reshape(*x.shape[:2], self.config.num_heads, -1)
            for part in "qkv"
        )
        q, k = (
            self.rotate(self.norm(params[f"{name}.{part}_norm.weight"], heads)) for part, heads in (("q", q), ("k", k))
        )
        scores = self.product("bqhd,bkhd->bhqk", q, k, out=self.wide) * self.config.head_dim**-0.5
        mixed = self.product("bhqk,bkhd->bqhd", self.jax.nn.softmax(scores), v)
        return self.linear(params, f"{name}.out_proj", mixed.reshape(x.shape))

    def block(self, params: dict, name: str, x):
        """One transformer block on the residual stream."""
        y = self.attention(params, f"{name}.attn", self.norm(params[f"{name}.norm1.weight"], x))
        x = x + params[f"{name}.attn_scale"] * y
        y = self.norm(params[f"{name}.norm2.weight"], x)
        w1, w3 = (self.linear(params, f"{name}.mlp.{w}", y) for w in ("w1", "w3"))
        return x + params[f"{name}.mlp_scale"] * self.linear(params, f"{name}.mlp.w2", self.jax.nn.silu(w1) * w3)

    def velocities(self, params: dict, heads: str, z, t, h, omega, t_min, t_max, y) -> list:
        """The velocities of the heads asked for, "u", "v" or "uv": images [B, c, H, W]."""
        c = self.config
        x = self.embed(params, z, self.prefix(params, h, omega, t_min, t_max, y))
        for i in range(c.depth - c.aux_head_depth):
            x = self.block(params, f"shared_blocks.{i}", x)
        scale = self.jnp.clip(t, c.t_clip, 1)[:, None, None, None]
        return [(z - self.head(params, head, x)) / scale for head in heads]

    def head(self, params: dict, name: str, x):
        """One head's clean-image prediction."""
        c, p = self.config, self.config.patch_size
        for i in range(c.aux_head_depth):
            x = self.block(params, f"head_blocks.{name}.{i}", x)
        y = self.norm(params[f"final_layers.{name}.norm.weight"], x[:, c.prefix_length :])
        tokens = self.linear(params, f"final_layers.{name}.linear", y).astype(self.wide)
        images = tokens.reshape(-1, c.grid_size, c.grid_size, p, p, c.in_channels)
        return images.transpose(0, 5, 1, 3, 2, 4).reshape(-1, *c.image_shape)


def jax_fields(network: JaxNetwork, params: dict, batch: dict) -> dict:
    """z, u, V as "average", v and v_g of one batch as images, everything on every row.

    `batch` holds x, y and the fields of `Draws` as arrays.
    """
    jax, jnp = network.jax, network.jnp
    t, r, omega, t_min, t_max = (batch[name] for name in ("t", "r", "omega", "t_min", "t_max"))
    x, y, dropped, zero, one = batch["x"], batch["y"], batch["drop_mask"], jnp.zeros_like(t), jnp.ones_like(t)

    def image(rows):
        return rows[:, None, None, None]

    z = image(1 - t) * x + image(t) * network.config.noise_scale * batch["noise"]
    inside = jnp.where((t_min <= t) & (t <= t_max), omega, 1.0)
    null = jnp.full_like(y, network.config.num_classes)
    still = jax.lax.stop_gradient(params)
    v_fm, v_in, v_u = (
        network.velocities(still, "v", z, t, zero, w, zero, one, classes)[0]
        for w, classes in ((omega, y), (inside, y), (one, null))
    )
    v_c = jnp.where(image(batch["fm_mask"]), v_fm, v_in)
    v_t = (z - x) / image(jnp.clip(t, network.config.t_clip, 1))
    v_g = jnp.where(image(dropped), v_t, v_t + image(1 - 1 / inside) * (v_c - v_u))
    y = jnp.where(dropped, null, y)

    def u_and_v(z, t, r):
        return tuple(network.velocities(params, "uv", z, t, t - r, omega, t_min, t_max, y))

    u, du_dt, v = jax.jvp(u_and_v, (z, t, r), (v_c, one, zero), has_aux=True)
    average = u + image(t - r) * jax.lax.stop_gradient(du_dt)
    return {"z": z, "u": u, "average": average, "v": v, "v_g": v_g}


def adaptive(network: JaxNetwork, config: LossConfig, loss):
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (network.jax.lax.stop_gradient(loss) + config.norm_eps) ** config.norm_p


def jax_loss(network: JaxNetwork, config: LossConfig, params: dict, batch: dict):
    """The pMF loss of one batch without perceptual terms; the objective is in float32 at least."""
    images = jax_fields(network, params, batch)
    losses = (network.jnp.square(images[name] - images["v_g"]).sum((1, 2, 3)) for name in ("average", "v"))
    return sum(adaptive(network, config, loss) for loss in losses).mean()


class JaxStep:
    """Forward and backward of one batch, compiled once; called, it waits for loss and gradients."""

    def __init__(
        self, model: PMFDiT, x: Tensor, y: Tensor, draws: Draws, config: LossConfig, compute: str = "float32"
    ) -> None:
        network = JaxNetwork(model.config, compute)
        self.jax = network.jax

        def array(value: Tensor):
            return network.jnp.asarray(value.detach().cpu().numpy())

        drawn = {name: getattr(draws, name) for name in BATCH_FIELDS}
        self.batch = {name: array(value) for name, value in {"x": x, "y": y, **drawn}.items()}
        self.params = {name: array(value) for name, value in model.state_dict().items()}
        self.step = self.jax.jit(self.jax.value_and_grad(functools.partial(jax_loss, network, config)))

    def __call__(self):
        """The loss, and a dict of gradients named as the parameters are."""
        return self.jax.block_until_ready(self.step(self.params, self.batch))

    def peak_bytes(self) -> int | None:
        """Peak of JAX's own allocator above what parameters and batch take; None where it keeps no count."""
        stats = self.jax.devices()[0].memory_stats()
        if stats is None:
            return None
        resting = sum(x.nbytes for x in (*self.params.values(), *self.batch.values()))
        return stats["peak_bytes_in_use"] - resting


def jax_step(
    model: Callable[[], PMFDiT], x: Tensor, y: Tensor, draws: Draws, config: LossConfig, device: torch.device
) -> JaxStep:
    """A step on JAX's default device, in bfloat16 on a GPU. The PyTorch network is dropped after copying.

    Errors: `InputError` where the figures are asked of a GPU that JAX does not see.
    """
    jax, _ = _jax()
    on_gpu = device.type == "cuda"
    require(not on_gpu or jax.default_backend() == "gpu", "jax: installed without support for this GPU")
    return JaxStep(model(), x, y, draws, config, "bfloat16" if on_gpu else "float32")
