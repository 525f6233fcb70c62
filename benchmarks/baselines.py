"""The pMF step as a plain script writes it: what the library is measured against."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

import pmf
from pmf.config import LossConfig
from pmf.draws import Draws
from pmf.reference.jvp import model_jvp
from pmf.reference.loss import pmf_loss as reference_loss


def flow_matching_draws(draws: Draws) -> Draws:
    """Every row has r = t; no tangent, no guidance."""
    yes = torch.ones_like(draws.fm_mask)
    whole = dict(t_min=torch.zeros_like(draws.t), t_max=torch.ones_like(draws.t))
    return replace(draws, r=draws.t, fm_mask=yes, drop_mask=yes, **whole)


def flow_matching_loss(model: pmf.PMFDiT, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """Plain flow matching of the same network: the floor of time and memory."""
    return pmf.pmf_loss(model, x, y, flow_matching_draws(draws), config).loss


def joint_jvp_loss(model: pmf.PMFDiT, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """The pMF loss by one `torch.func.jvp` that records the tangent too: the usual MeanFlow script."""
    return reference_loss(model, x, y, draws, config, model_jvp)


def two_pass_loss(model: pmf.PMFDiT, x: Tensor, y: Tensor, draws: Draws, config: LossConfig) -> Tensor:
    """The pMF loss by a jvp without gradient and a second, recorded forward pass."""

    def differentiate(model: pmf.PMFDiT, *inputs: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        with torch.no_grad():
            _, _, du_dt = model_jvp(model, *inputs)
        u, v = model(*inputs[:7])
        return u, v, du_dt

    return reference_loss(model, x, y, draws, config, differentiate)
