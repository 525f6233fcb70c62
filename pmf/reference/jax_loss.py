"""The pMF loss in JAX: the equations of `pmf.reference.loss` as a script like the authors' runs them.

Three guidance passes, then `jax.jvp` of u with v as auxiliary output; `jax.value_and_grad` differentiates the loss.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import jax
import jax.numpy as jnp

from pmf.reference.jax_network import Arrays, JaxNetwork
from pmf.reference.loss import image

if TYPE_CHECKING:
    from pmf.config import LossConfig, ModelConfig


def jax_fields(network: JaxNetwork, batch: Arrays) -> Arrays:
    """z_t, u, V, v and v_g of one batch as images, everything on every row; named as in `pmf.reference.loss`.

    `batch` holds x, y and the fields of `Draws` as arrays.
    """
    t, r, omega, t_min, t_max = (batch[name] for name in ("t", "r", "omega", "t_min", "t_max"))
    x, y, dropped, zero, one = batch["x"], batch["y"], batch["drop_mask"], jnp.zeros_like(t), jnp.ones_like(t)
    null = jnp.full_like(y, network.config.num_classes)
    still = JaxNetwork(network.config, jax.lax.stop_gradient(network.params), network.compute)

    z_t = image(1 - t) * x + image(t) * network.config.noise_scale * batch["noise"]
    v_t = (z_t - x) / image(jnp.clip(t, network.config.t_clip, 1))

    def v_of(w, y):
        return still.velocities("v", z_t, t, zero, w, zero, one, y)[0]

    w = jnp.where((t_min <= t) & (t <= t_max), omega, 1.0)
    v_c = jnp.where(image(batch["fm_mask"]), v_of(omega, y), v_of(w, y))
    v_u = v_of(one, null)
    v_g = jnp.where(image(dropped), v_t, v_t + image(1 - 1 / w) * (v_c - v_u))
    y = jnp.where(dropped, null, y)

    def u_and_v(z, t, r):
        return tuple(network.velocities("uv", z, t, t - r, omega, t_min, t_max, y))

    u, du_dt, v = jax.jvp(u_and_v, (z_t, t, r), (v_c, one, zero), has_aux=True)
    return {"z_t": z_t, "u": u, "V": u + image(t - r) * jax.lax.stop_gradient(du_dt), "v": v, "v_g": v_g}


def adaptive(loss, config: LossConfig):
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (jax.lax.stop_gradient(loss) + config.norm_eps) ** config.norm_p


def jax_loss(model: ModelConfig, config: LossConfig, compute: str, params: Arrays, batch: Arrays):
    """The pMF loss of one batch without perceptual terms; the objective is in float32 at least."""
    images = jax_fields(JaxNetwork(model, params, compute), batch)
    losses = (jnp.square(images[name] - images["v_g"]).sum((1, 2, 3)) for name in ("V", "v"))
    return sum(adaptive(loss, config) for loss in losses).mean()
