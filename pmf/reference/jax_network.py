"""The published network in JAX: an oracle of its own, and what a script like the authors' runs.

Nothing here imports JAX unless this module is imported. `jax.nn.dot_product_attention` is not used: it takes every
softmax in float32, which rules out checks in float64.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from torch import Tensor

from pmf.reference.embedding import FEATURES, MAX_PERIOD
from pmf.reference.loss import image
from pmf.reference.rotary import rope_tables

if TYPE_CHECKING:
    from pmf.config import ModelConfig

NORM_EPS = 1e-6
Arrays = dict[str, Any]
"""JAX arrays by name."""


def arrays(tensors: dict[str, Tensor]) -> Arrays:
    """Tensors as arrays on JAX's default device; copied through the CPU."""
    return {name: jnp.asarray(value.detach().cpu().numpy()) for name, value in tensors.items()}


@dataclass(frozen=True)
class JaxNetwork:
    """The in-context network; `params` are named as in `PMFDiT.state_dict`.

    Matrix products run in `compute`; norms, softmax and the residual stream in float32, as autocast does, or in
    float64 where that is computed in.
    """

    config: ModelConfig
    params: Arrays
    compute: str = "float32"

    @property
    def wide(self) -> Any:
        """The precision of all but the matrix products."""
        return jnp.promote_types(self.compute, jnp.float32)

    def linear(self, name: str, x):
        """x W^T, and b where there is one; convolutions take flattened patches."""
        weight, bias = self.params[f"{name}.weight"], self.params.get(f"{name}.bias")
        y = x.astype(self.compute) @ weight.reshape(len(weight), -1).T.astype(self.compute)
        return y if bias is None else y + bias.astype(y.dtype)

    def norm(self, name: str, x):
        """RMSNorm over the last dimension."""
        x = x.astype(self.wide)
        return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + NORM_EPS) * self.params[f"{name}.weight"]

    def scalar(self, name: str, s):
        """A scalar [B] as [B, C]: sinusoids, Linear, SiLU, Linear."""
        angle = s[:, None] * MAX_PERIOD ** (-jnp.arange(FEATURES // 2) / (FEATURES // 2))
        features = jnp.concatenate([jnp.cos(angle), jnp.sin(angle)], -1)
        return self.linear(f"{name}.fc2", jax.nn.silu(self.linear(f"{name}.fc1", features)))

    def prefix(self, h, omega, t_min, t_max, y):
        """The prefix tokens [B, P, C]."""
        scalars = {"h": h, "omega": 1 - 1 / omega, "t_min": t_min, "t_max": t_max}
        embedded = {name: self.scalar(f"conditioning.embedders.{name}", s) for name, s in scalars.items()}
        embedded["y"] = self.params["conditioning.classes.weight"][y]
        order = ("y", "omega", "t_min", "t_max", "h")
        groups = [self.params[f"conditioning.tokens.{name}"] + embedded[name][:, None] for name in order]
        return jnp.concatenate(groups, 1)

    def embed(self, z, prefix):
        """[prefix, patches] + positions."""
        c, p = self.config, self.config.patch_size
        patches = z.reshape(-1, c.in_channels, c.grid_size, p, c.grid_size, p).transpose(0, 2, 4, 1, 3, 5)
        patches = patches.reshape(-1, c.num_patches, c.patch_values)
        tokens = self.linear("patch_embed.proj2", self.linear("patch_embed.proj1", patches))
        return jnp.concatenate([prefix, tokens.astype(prefix.dtype)], 1) + self.params["patch_embed.positions"]

    def rotate(self, x):
        """Turn adjacent pairs of the patch tokens' heads [B, S, H, D]."""
        prefix, patches = jnp.split(x, [self.config.prefix_length], 1)
        tables = rope_tables(self.config.grid_size, self.config.head_dim)
        cos, sin = (table.numpy()[:, None] for table in tables)
        a, b = patches[..., 0::2], patches[..., 1::2]
        turned = jnp.stack([a * cos - b * sin, a * sin + b * cos], -1)
        return jnp.concatenate([prefix, turned.reshape(patches.shape)], 1)

    def attention(self, name: str, x):
        """Softmax attention with normalised, rotated q and k."""
        heads = (*x.shape[:2], self.config.num_heads, -1)
        q, k, v = (self.linear(f"{name}.{part}_proj", x).reshape(heads) for part in "qkv")
        q, k = self.rotate(self.norm(f"{name}.q_norm", q)), self.rotate(self.norm(f"{name}.k_norm", k))
        q, k, v = (x.astype(self.compute) for x in (q, k, v))
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k, preferred_element_type=self.wide)
        weights = jax.nn.softmax(scores * self.config.head_dim**-0.5).astype(self.compute)
        return self.linear(f"{name}.out_proj", jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))

    def block(self, name: str, x):
        """One transformer block on the residual stream."""
        x = x + self.params[f"{name}.attn_scale"] * self.attention(f"{name}.attn", self.norm(f"{name}.norm1", x))
        y = self.norm(f"{name}.norm2", x)
        gated = jax.nn.silu(self.linear(f"{name}.mlp.w1", y)) * self.linear(f"{name}.mlp.w3", y)
        return x + self.params[f"{name}.mlp_scale"] * self.linear(f"{name}.mlp.w2", gated)

    def head(self, name: str, x):
        """One head's clean-image prediction."""
        c, p = self.config, self.config.patch_size
        for i in range(c.aux_head_depth):
            x = self.block(f"head_blocks.{name}.{i}", x)
        y = self.norm(f"final_layers.{name}.norm", x[:, c.prefix_length :])
        tokens = self.linear(f"final_layers.{name}.linear", y).astype(self.wide)
        images = tokens.reshape(-1, c.grid_size, c.grid_size, p, p, c.in_channels)
        return images.transpose(0, 5, 1, 3, 2, 4).reshape(-1, *c.image_shape)

    def velocities(self, heads: str, z, t, h, omega, t_min, t_max, y) -> list:
        """The velocities of the heads asked for, "u", "v" or "uv": images [B, c, H, W]."""
        x = self.embed(z, self.prefix(h, omega, t_min, t_max, y))
        for i in range(self.config.depth - self.config.aux_head_depth):
            x = self.block(f"shared_blocks.{i}", x)
        return [(z - self.head(head, x)) / image(jnp.clip(t, self.config.t_clip, 1)) for head in heads]
