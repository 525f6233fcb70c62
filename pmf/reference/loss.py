"""The pMF loss as the paper writes it (arXiv 2601.22158): one line per equation, evaluated on every row.

Tests check `pmf.pmf_loss` against it, and benchmarks use it as the plain baseline. It takes any dtype and device. The
network is called as in a user's script, `u, v = model(z, t, h, omega, t_min, t_max, y)` with h = t - r. The null class
is num_classes; the guidance passes v_c and v_u have h = 0 and the guidance interval [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from pmf.reference.jvp import model_jvp

if TYPE_CHECKING:
    from pmf.config import LossConfig
    from pmf.draws import Draws
    from pmf.model import PMFDiT

Differentiate = Callable[..., tuple[Tensor, Tensor | None, Tensor | None]]
"""A way to compute du/dt: (model, z, t, h, omega, t_min, t_max, y, z_dot, t_dot, h_dot) -> u, v and du/dt.

`pmf.reference.jvp.model_jvp` records the tangent too; `two_pass_jvp` there and `pmf.PMFDiT.forward_dual` do not.
"""


class Fields(NamedTuple):
    """The images [B, c, H, W] from which the loss is computed."""

    z_t: Tensor
    v_t: Tensor
    """The target without guidance."""
    v_c: Tensor
    v_u: Tensor
    v_g: Tensor
    """The guided target."""
    u: Tensor
    v: Tensor
    du_dt: Tensor
    V: Tensor
    """The compound velocity u + (t - r) du/dt, which is regressed onto v_g."""
    x_hat: Tensor
    """The clean image z_t - t u, which the perceptual terms compare with x."""


def pmf_fields(model: PMFDiT, x: Tensor, y: Tensor, draws: Draws, differentiate: Differentiate = model_jvp) -> Fields:
    """The fields of one batch: x [B, c, H, W], y int64 [B]."""
    t, r, omega, t_min, t_max = (s.to(x.device) for s in (draws.t, draws.r, draws.omega, draws.t_min, draws.t_max))
    fm, dropped = draws.fm_mask.to(x.device), draws.drop_mask.to(x.device)
    zero, one, null = torch.zeros_like(t), torch.ones_like(t), torch.full_like(y, model.config.num_classes)
    e = model.config.noise_scale * draws.noise.to(x.device)

    z_t = image(1 - t) * x + image(t) * e
    v_t = (z_t - x) / image(t.clamp(model.config.t_clip, 1))

    def v_of(w: Tensor, y: Tensor) -> Tensor:
        with torch.no_grad():
            return model(z_t, t, zero, w, zero, one, y)[1]

    w = torch.where((t_min <= t) & (t <= t_max), omega, one)
    v_c = torch.where(image(fm), v_of(omega, y), v_of(w, y))  # the same on flow-matching rows; the authors run both
    v_u = v_of(one, null)
    v_g = torch.where(image(dropped), v_t, v_t + image(1 - 1 / w) * (v_c - v_u))

    y = torch.where(dropped, null, y)
    u, v, du_dt = differentiate(model, z_t, t, t - r, omega, t_min, t_max, y, v_c, one, one)
    assert v is not None and du_dt is not None
    V = u + image(t - r) * du_dt.detach()  # noqa: N806
    return Fields(z_t, v_t, v_c, v_u, v_g, u, v, du_dt.detach(), V, x_hat=z_t - image(t) * u)


def squared_errors(fields: Fields) -> tuple[Tensor, Tensor]:
    """(L_u, L_v) per row: sums over pixels."""
    loss_u = (fields.V - fields.v_g).square().sum((1, 2, 3))
    loss_v = (fields.v - fields.v_g).square().sum((1, 2, 3))
    return loss_u, loss_v


def adaptive(loss: Tensor, config: LossConfig) -> Tensor:
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (loss.detach() + config.norm_eps) ** config.norm_p


def pmf_loss(
    model: PMFDiT,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    config: LossConfig,
    differentiate: Differentiate = model_jvp,
    perceptual: Callable[[Tensor, Tensor], dict[str, Tensor]] | None = None,
) -> Tensor:
    """The loss of one batch. Arguments: see `pmf.pmf_loss`."""
    fields = pmf_fields(model, x, y, draws, differentiate)
    loss_u, loss_v = squared_errors(fields)
    loss = (adaptive(loss_u, config) + adaptive(loss_v, config)).mean()
    if perceptual is not None:
        early = draws.t.to(x.device) < config.perceptual_max_t
        distances = perceptual(fields.x_hat[early], x[early])
        weights = {"lpips": config.lpips_weight, "convnext": config.convnext_weight}
        loss = loss + sum(weights[name] * adaptive(d, config).sum() for name, d in distances.items()) / len(x)
    return loss


def image(scalars: Tensor) -> Tensor:
    """[B] -> [B, 1, 1, 1], which broadcasts over images."""
    return scalars[:, None, None, None]
