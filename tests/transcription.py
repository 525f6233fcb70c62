"""The training loss written out: every row evaluated, du/dt by torch.func.jvp."""

import torch

from pmf.reference.jvp import model_jvp


def image(scalars):
    """[B] that multiplies images."""
    return scalars[:, None, None, None]


def adaptive(loss, config):
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (loss.detach() + config.norm_eps) ** config.norm_p


def squared_errors(model, x, y, d):
    """(L_u, L_v, x_hat): both squared errors per row, and the image z_t - t u."""
    null = torch.full_like(y, model.config.num_classes)
    zero, one = torch.zeros_like(d.t), torch.ones_like(d.t)
    c = image(d.t.clamp(0.05, 1))

    z = image(1 - d.t) * x + image(d.t) * model.config.noise_scale * d.noise
    w = torch.where((d.t_min <= d.t) & (d.t <= d.t_max), d.omega, 1.0)
    v_c = model(z, d.t, zero, w, zero, one, y)[1].detach()
    v_u = model(z, d.t, zero, one, zero, one, null)[1].detach()
    v_t = (z - x) / c
    v_g = torch.where(image(d.drop_mask), v_t, v_t + image(1 - 1 / w) * (v_c - v_u))
    y_main = torch.where(d.drop_mask, null, y)
    u, v, du_dt = model_jvp(model, z, d.t, d.t - d.r, d.omega, d.t_min, d.t_max, y_main, v_c, one, one)
    loss_u = (u + image(d.t - d.r) * du_dt.detach() - v_g).square().sum((1, 2, 3))
    loss_v = (v - v_g).square().sum((1, 2, 3))
    return loss_u, loss_v, z - image(d.t) * u
