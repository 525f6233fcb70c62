"""The pMF step as a plain script writes it: what the library is measured against."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from pmf.config import LossConfig
from pmf.loss import Draws, pmf_loss


def flow_matching_draws(draws: Draws) -> Draws:
    """Every row has r = t; no tangent, no guidance."""
    yes = torch.ones_like(draws.fm_mask)
    whole = dict(t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    return replace(draws, r=draws.t, fm_mask=yes, drop_mask=yes, **whole)


def flow_matching_loss(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """Plain flow matching of the same network: the floor of time and memory."""
    return pmf_loss(model, x, y, flow_matching_draws(draws), config).loss


def joint_jvp_loss(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """The pMF loss by one `torch.func.jvp` that records the tangent too: the usual MeanFlow script."""

    def fields(u_of: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor, Tensor]:
        u, du_dt, v = torch.func.jvp(u_of, primals, tangents, has_aux=True)
        return u, v, du_dt.detach()

    return _plain_loss(model, x, y, draws, config, fields)


def two_pass_loss(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """The pMF loss by a jvp without gradient and a second, recorded forward pass."""

    def fields(u_of: Callable, primals: tuple, tangents: tuple) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            _, du_dt, _ = torch.func.jvp(u_of, primals, tangents, has_aux=True)
        return *u_of(*primals), du_dt

    return _plain_loss(model, x, y, draws, config, fields)


def _plain_loss(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig, fields: Callable) -> Tensor:
    """Everything on every row, through `model.forward`; `fields` gives u, v and du/dt.

    The same number as `pmf.pmf_loss`, at its price.
    """
    device = x.device
    t, r, omega, t_min, t_max = (v.to(device) for v in (draws.t, draws.r, draws.omega, draws.t_min, draws.t_max))
    dropped = draws.drop_mask.to(device)
    null = torch.full_like(y, model.config.num_classes)
    zero, one = torch.zeros_like(t), torch.ones_like(t)
    image = (-1, 1, 1, 1)

    z = (1 - t).view(image) * x + t.view(image) * model.config.noise_scale * draws.noise.to(device)
    inside = (t_min <= t) & (t <= t_max)
    w = torch.where(inside, omega, one)
    with torch.no_grad():
        v_fm = model(z, t, zero, omega, zero, one, y)[1]
        v_in = model(z, t, zero, w, zero, one, y)[1]
        v_u = model(z, t, zero, one, zero, one, null)[1]
        v_c = torch.where(draws.fm_mask.to(device).view(image), v_fm, v_in)
        v_t = (z - x) / t.clamp(model.config.t_clip, 1).view(image)
        scale = torch.where(dropped, zero, 1 - 1 / w)
        v_g = v_t + scale.view(image) * (v_c - v_u)
    y = torch.where(dropped, null, y)

    def u_of(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, t, h, omega, t_min, t_max, y)

    u, v, du_dt = fields(u_of, (z, t, t - r), (v_c, one, one))
    average = u + (t - r).view(image) * du_dt
    losses = [(field - v_g).square().sum((1, 2, 3)) for field in (average, v)]
    return sum(loss / (loss.detach() + config.norm_eps) ** config.norm_p for loss in losses).mean()
