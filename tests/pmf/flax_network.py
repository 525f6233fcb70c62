"""The authors' network as flax modules: their parameter names, and a forward pass to compare with."""

from __future__ import annotations

import functools
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax.training import train_state

import pmf


class TrainState(train_state.TrainState):
    """The content of the authors' checkpoints."""

    ema_params: dict[float, Any]


class Linear(nn.Module):
    width: int
    bias: bool = False

    def setup(self):
        self._flax_linear = nn.Dense(self.width, use_bias=self.bias)

    def __call__(self, x):
        return self._flax_linear(x)


class RMSNorm(nn.Module):
    @nn.compact
    def __call__(self, x):
        weight = self.param("kernel", nn.initializers.ones, (x.shape[-1],))
        return x / jnp.sqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6) * weight


class ScalarEmbedder(nn.Module):
    width: int

    def setup(self):
        self.mlp = nn.Sequential([Linear(self.width, True), nn.silu, Linear(self.width, True)])

    def __call__(self, value):
        angles = value[:, None] * jnp.exp(-math.log(10000) * jnp.arange(128) / 128)
        return self.mlp(jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1))[:, None]


class ClassEmbedder(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        self.embedding_table = Table(self.config)

    def __call__(self, y):
        return self.embedding_table(y)


class Table(nn.Module):
    config: pmf.ModelConfig

    @nn.compact
    def __call__(self, y):
        shape = (1, self.config.num_classes + 1, self.config.hidden_size)
        return self.param("embedding", nn.initializers.normal(), shape)[0, y][:, None]


class PatchEmbedder(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        side = (self.config.patch_size,) * 2
        self.proj1 = nn.Conv(self.config.bottleneck, side, side)
        self.proj2 = nn.Conv(self.config.hidden_size, (1, 1))

    def __call__(self, x):
        return self.proj2(self.proj1(x)).reshape(len(x), -1, self.config.hidden_size)


class Attention(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        width = self.config.hidden_size
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width) for _ in range(4))
        self.q_norm, self.k_norm = RMSNorm(), RMSNorm()

    def __call__(self, x):
        heads = (*x.shape[:2], self.config.num_heads, self.config.head_dim)
        q, k, v = (part(x).reshape(heads) for part in (self.q_proj, self.k_proj, self.v_proj))
        q, k = self.rotate(self.q_norm(q)), self.rotate(self.k_norm(k))
        weights = jax.nn.softmax(jnp.einsum("bqhd,bkhd->bhqk", q, k) / math.sqrt(self.config.head_dim))
        return self.out_proj(jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(x.shape))

    def rotate(self, x):
        """Rotate adjacent elements of the patch tokens: half of the pairs by the row, half by the column."""
        grid, pairs = self.config.grid_size, self.config.head_dim // 2
        speeds = 10000.0 ** (-jnp.arange(0, pairs, 2) / pairs)
        rows, columns = jnp.divmod(jnp.arange(grid**2), grid)
        angles = jnp.concatenate([rows[:, None] * speeds, columns[:, None] * speeds], -1)[:, None]
        angles = jnp.pad(angles, ((x.shape[1] - grid**2, 0), (0, 0), (0, 0)))
        a, b = x[..., 0::2], x[..., 1::2]
        turned = a * jnp.cos(angles) - b * jnp.sin(angles), a * jnp.sin(angles) + b * jnp.cos(angles)
        return jnp.stack(turned, -1).reshape(x.shape)


class SwiGLU(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        self.w1, self.w3 = Linear(self.config.mlp_width), Linear(self.config.mlp_width)
        self.w2 = Linear(self.config.hidden_size)

    def __call__(self, x):
        return self.w2(nn.silu(self.w1(x)) * self.w3(x))


class Block(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        self.norm1, self.attn = RMSNorm(), Attention(self.config)
        self.norm2, self.mlp = RMSNorm(), SwiGLU(self.config)
        shape = (self.config.hidden_size,)
        self.attn_scale = self.param("attn_scale", nn.initializers.zeros, shape)
        self.mlp_scale = self.param("mlp_scale", nn.initializers.zeros, shape)

    def __call__(self, x):
        x = x + self.attn(self.norm1(x)) * self.attn_scale
        return x + self.mlp(self.norm2(x)) * self.mlp_scale


class FinalLayer(nn.Module):
    config: pmf.ModelConfig

    def setup(self):
        self.norm, self.linear = RMSNorm(), Linear(self.config.patch_values, True)

    def __call__(self, x):
        return self.linear(self.norm(x))


class Network(nn.Module):
    config: pmf.ModelConfig
    eval: bool = False

    def setup(self):
        c = self.config
        self.x_embedder, self.y_embedder = PatchEmbedder(c), ClassEmbedder(c)
        self.h_embedder, self.omega_embedder = ScalarEmbedder(c.hidden_size), ScalarEmbedder(c.hidden_size)
        self.cfg_t_start_embedder, self.cfg_t_end_embedder = (ScalarEmbedder(c.hidden_size) for _ in range(2))
        for name in ("class", "omega", "t_min", "t_max", "time"):
            shape = (1, getattr(c, f"{name}_tokens"), c.hidden_size)
            setattr(self, f"{name}_tokens", self.param(f"{name}_tokens", nn.initializers.normal(), shape))
        shape = (1, c.sequence_length, c.hidden_size)
        self.pos_embed = self.param("pos_embed", nn.initializers.normal(), shape)
        self.shared_blocks = [Block(c) for _ in range(c.depth - c.aux_head_depth)]
        self.u_heads = [Block(c) for _ in range(c.aux_head_depth)]
        self.u_final_layer = FinalLayer(c)
        if not self.eval:
            self.v_heads = [Block(c) for _ in range(c.aux_head_depth)]
            self.v_final_layer = FinalLayer(c)

    def __call__(self, z, t, h, omega, t_min, t_max, y):
        prefix = [
            self.class_tokens + self.y_embedder(y),
            self.omega_tokens + self.omega_embedder(1 - 1 / omega),
            self.t_min_tokens + self.cfg_t_start_embedder(t_min),
            self.t_max_tokens + self.cfg_t_end_embedder(t_max),
            self.time_tokens + self.h_embedder(h),
        ]
        x = jnp.concatenate([*prefix, self.x_embedder(z)], 1) + self.pos_embed
        for block in self.shared_blocks:
            x = block(x)
        heads = [(self.u_heads, self.u_final_layer)]
        heads += [] if self.eval else [(self.v_heads, self.v_final_layer)]
        return [(z - self.head(x, *head)) / jnp.clip(t, 0.05, 1)[:, None, None, None] for head in heads]

    def head(self, x, blocks, final):
        """The head's image [B, H, W, c]."""
        c, grid, side = self.config, self.config.grid_size, self.config.patch_size
        for block in blocks:
            x = block(x)
        x = final(x[:, c.prefix_length :]).reshape(len(x), grid, grid, side, side, c.in_channels)
        return x.transpose(0, 1, 3, 2, 4, 5).reshape(len(x), c.image_size, c.image_size, c.in_channels)


class PixelMeanFlow(nn.Module):
    """The module whose parameters the authors save: the network is its `net`."""

    config: pmf.ModelConfig
    eval: bool = False

    def setup(self):
        self.net = Network(self.config, self.eval)

    def __call__(self, *inputs):
        return self.net(*inputs)


@functools.cache
def shapes(config: pmf.ModelConfig, eval: bool):
    """Shapes and dtypes of the module's parameters."""
    one = jnp.ones(1)
    z = jnp.ones((1, config.image_size, config.image_size, config.in_channels))
    inputs = (z, one, one, one, one, one, one.astype(int))
    return jax.eval_shape(PixelMeanFlow(config, eval).init, jax.random.key(0), *inputs)["params"]


def random_params(config: pmf.ModelConfig, seed: int, *, eval: bool = False):
    """Parameters of the module, all random: gates do not start at zero."""
    rng = np.random.default_rng(seed)

    def draw(leaf):
        scale = 1 if leaf.ndim == 1 else leaf.shape[-2] ** -0.5
        return (scale * rng.standard_normal(leaf.shape)).astype(np.float32)

    return jax.tree.map(draw, shapes(config, eval))


@jax.jit
def update(state: TrainState, grads) -> TrainState:
    """One step of the state's optimizer."""
    return state.apply_gradients(grads=grads)


@functools.cache
def trained_state(config: pmf.ModelConfig, *, updates: int = 3) -> TrainState:
    """A state after a few steps of the authors' optimizer on random gradients, with random averages."""
    state = TrainState.create(
        apply_fn=None,
        params=random_params(config, 0),
        ema_params={half_life: random_params(config, half_life) for half_life in (500, 1000, 2000)},
        tx=optax.contrib.muon(1e-3, adam_b2=0.95),
    )
    for number in range(updates):
        state = update(state, random_params(config, 100 + number))
    return jax.device_get(state)


def inference_state(config: pmf.ModelConfig, half_lives=(2000,)) -> TrainState:
    """A state of the authors' evaluation: no v head, no optimizer."""
    return jax.device_get(
        TrainState.create(
            apply_fn=None,
            params=random_params(config, 0, eval=True),
            ema_params={half_life: random_params(config, half_life, eval=True) for half_life in half_lives},
            tx=optax.sgd(0.0),
        )
    )
