"""The pMF loss (arXiv 2601.22158), which computes each quantity only on the rows that need it.

z_t = (1 - t) x + t e                              e = noise_scale N(0, I)
v_g = stopgrad(v_t + (1 - 1/w')(v_c - v_u))        w' = w inside [t_min, t_max], else 1
V   = u + (t - r) stopgrad(du/dt)                  du/dt along (v_c, 1, 0)
L_u = sum (V - v_g)^2,  L_v = sum (v - v_g)^2      per row
loss = mean adp(L_u) + adp(L_v) + perceptual terms,  adp(L) = L / stopgrad(L + eps)^p

`pmf.step_plan` decides which rows need what; `pmf.reference.loss` evaluates every equation on every row, and tests
compare the two. The network predicts clean images, and (z_t - net) / clip(t, t_clip, 1) is the velocity: net_u, net_v,
net_c and net_n are the predictions for u, v, v_c and v_u.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from pmf import ops
from pmf.config import LossConfig
from pmf.draws import Draws
from pmf.errors import require
from pmf.pair import Dual
from pmf.step_plan import PlannedStep, plan_step

if TYPE_CHECKING:
    from pmf.model import PMFDiT

PerceptualFunction = Callable[[Tensor, Tensor], dict[str, Tensor]]
"""perceptual(x_hat, x) -> {"lpips": [B'], "convnext": [B']}: distances per row of images [B', c, H, W]."""


@dataclass(frozen=True)
class LossOutput:
    """The result of `pmf_loss`."""

    loss: Tensor
    """The scalar to differentiate."""
    terms: dict[str, Tensor]
    """Detached scalars: loss_u and loss_v, mean squared errors over all pixels; perceptual distances."""
    fields: dict[str, Tensor] | None = None
    """z_t, v_c, v_g, u, du_dt and v as images, if requested."""


def pmf_loss(
    model: PMFDiT,
    x: Tensor,
    y: Tensor,
    draws: Draws,
    loss_config: LossConfig,
    perceptual: PerceptualFunction | None = None,
    return_fields: bool = False,
) -> LossOutput:
    """The pMF training loss of one device batch; `pmf.reference.loss` states its equations.

    Args: model with both heads; x [B, c, H, W] in [-1, 1]; y int64 [B]; draws from `sample_draws`;
    perceptual(x_hat, x) -> {"lpips": [B'], "convnext": [B']}, called on the rows with t below
    perceptual_max_t; return_fields adds the fields as images, in which du_dt is zero on rows without a tangent and
    v_c is the main pass's v on flow-matching rows. Errors: `InputError` on bad shapes, labels, draws or NaN images.
    """
    called = perceptual is None or callable(perceptual)
    require(called, lambda: f"perceptual: expected a function, got {type(perceptual).__name__}")
    step = plan_step(model, x, y, draws, loss_config)
    errors = squared_errors(model, step, loss_config)
    rows, terms = errors.rows, errors.terms
    if perceptual is not None:
        more, distances = perceptual_rows(perceptual, model, step, errors.net_u, loss_config)
        rows, terms = rows + more, terms | distances
    output = LossOutput(rows.mean(), terms)
    if not return_fields:
        return output
    values = {"z_t": step.z} | errors.fields()
    if step.order is not None:
        back = torch.argsort(step.order)
        values = {name: value[back] for name, value in values.items()}
    return replace(output, fields=values)


@dataclass(frozen=True)
class SquaredErrors:
    """The loss of a planned step without perceptual terms."""

    rows: Tensor
    """adp(L_u) + adp(L_v) per row."""
    terms: dict[str, Tensor]
    """loss_u and loss_v, mean squared errors over all pixels."""
    net_u: Tensor
    """The u head's tokens, which the perceptual terms read."""
    fields: Callable[[], dict[str, Tensor]]
    """Computes v_c, v_g, u, du_dt and v as images."""


def squared_errors(model: PMFDiT, step: PlannedStep, config: LossConfig) -> SquaredErrors:
    """Guidance (v_c, v_u), the main pass with its tangent (u, v, du/dt), and both squared errors (L_u, L_v)."""
    with model.held_weights():
        net_c, net_n = _guidance(model, step)
        nets = _main_pass(model, step, net_c)
    heads = (nets["u"].value, nets["v"].value, nets["u"].dot, net_c, net_n)
    images, guidance = (step.z, step.x), (step.guidance, step.null_index)
    t_clip, patch_size = model.config.t_clip, model.config.patch_size
    loss_u, loss_v = ops.pmf_objective(
        *heads, *images, step.t, step.h, *guidance, t_clip=t_clip, patch_size=patch_size, impl=model.impl
    )
    pixels = step.x[0].numel()
    return SquaredErrors(
        rows=_adaptive(loss_u, config) + _adaptive(loss_v, config),
        terms={"loss_u": loss_u.detach().mean() / pixels, "loss_v": loss_v.detach().mean() / pixels},
        net_u=nets["u"].value,
        fields=functools.partial(
            ops.pmf_objective_fields, *heads, *images, step.t, *guidance, t_clip=t_clip, patch_size=patch_size
        ),
    )


@torch.no_grad()
def _guidance(model: PMFDiT, step: PlannedStep) -> tuple[Tensor | None, Tensor | None]:
    """(net_c, net_n) in one pass of the shared blocks and the v head, at h = 0 on the interval [0, 1].

    net_c: the class as drawn, at w', on the last B_dot rows. net_n: the null class, at w = 1, on `null_rows`.
    """
    rows, null_rows = step.tangent_rows, step.null_rows
    if rows + len(null_rows) == 0:
        return None, None
    unguided = step.omega.new_ones(len(null_rows))
    null = torch.full_like(unguided, model.config.num_classes, dtype=torch.int64)
    z = torch.cat([step.last(step.z), step.z[null_rows]])
    omega = torch.cat([step.last(step.inside_omega), unguided])
    y = torch.cat([step.last(step.y), null])
    zero, one = torch.zeros_like(omega), torch.ones_like(omega)
    net = model.predict_dual(Dual(z), Dual(zero), omega, zero, one, y, heads=("v",))["v"].value
    return (net[:rows] if rows else None), (net[rows:] if len(null_rows) else None)


def _main_pass(model: PMFDiT, step: PlannedStep, net_c: Tensor | None) -> dict[str, Dual]:
    """Both heads on every row, with u's tangent along (v_c, 1, 0) on the last rows, where h = t - r has h_dot = 1."""
    y = torch.where(step.dropped, model.config.num_classes, step.y)
    z_dot, h_dot = None, None
    if net_c is not None:
        with torch.no_grad():
            c = step.last(step.t).clamp(model.config.t_clip, 1)[:, None, None, None]
            z_dot = (step.last(step.z) - model.to_images(net_c)) / c
            h_dot = torch.ones_like(step.last(step.h))
    return model.predict_dual(Dual(step.z, z_dot), Dual(step.h, h_dot), step.omega, step.t_min, step.t_max, y)


def _adaptive(loss: Tensor, config: LossConfig) -> Tensor:
    """adp(L) = L / stopgrad(L + norm_eps)^norm_p."""
    return loss / (loss.detach() + config.norm_eps) ** config.norm_p


def perceptual_rows(
    perceptual: PerceptualFunction, model: PMFDiT, step: PlannedStep, net_u: Tensor, config: LossConfig
) -> tuple[Tensor, dict[str, Tensor]]:
    """The perceptual terms' part of each row's loss, and their mean distances.

    Distances are between x_hat = z_t - t u and x, zero where t >= perceptual_max_t.
    """
    rows = step.early_rows
    t, z, x = step.t[rows][:, None, None, None], step.z[rows], step.x[rows]
    net = model.to_images(net_u[rows])
    x_hat = z - t / t.clamp(model.config.t_clip, 1) * (z - net)

    def on_every_row(distance: Tensor) -> Tensor:
        dtype = torch.promote_types(distance.dtype, torch.float32)
        return torch.zeros(len(step.x), device=z.device, dtype=dtype).index_put((rows,), distance.to(dtype))

    weights = {"lpips": config.lpips_weight, "convnext": config.convnext_weight}
    total, terms = torch.zeros((), device=z.device), {}
    distances = perceptual(x_hat, x)
    fits = isinstance(distances, dict) and all(isinstance(value, Tensor) for value in distances.values())
    require(fits, lambda: f"perceptual: expected a dict of tensors, got {distances!r:.80}")
    for name, distance in distances.items():
        require(name in weights, f"perceptual: expected terms {sorted(weights)}, got {name!r}")
        shape = list(distance.shape)
        require(shape == [len(rows)], f"perceptual: expected {name} of shape [{len(rows)}], got {shape}")
        distance = on_every_row(distance)
        total = total + weights[name] * _adaptive(distance, config)
        terms[name] = distance.detach().mean()
    return total, terms
