"""The pMF step as a plain script writes it: what the library is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.config import LossConfig
from pmf.loss import Draws


def joint_jvp_loss(model, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """The pMF loss by `torch.func.jvp` through the whole network, everything on every row.

    Three guidance passes through `model.forward`, then one joint jvp that records the tangent too: the
    usual MeanFlow script. The same number as `pmf.pmf_loss`, at its price.
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
        v_t = (z - x) / t.clamp(config.t_clip, 1).view(image)
        scale = torch.where(dropped, zero, 1 - 1 / w)
        v_g = v_t + scale.view(image) * (v_c - v_u)
    y = torch.where(dropped, null, y)

    def u_of(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
        return model(z, t, h, omega, t_min, t_max, y)

    u, du_dt, v = torch.func.jvp(u_of, (z, t, t - r), (v_c, one, one), has_aux=True)
    average = u + (t - r).view(image) * du_dt.detach()
    losses = [(field - v_g).square().sum((1, 2, 3)) for field in (average, v)]
    return sum(loss / (loss.detach() + config.norm_eps) ** config.norm_p for loss in losses).mean()
