"""The pMF squared errors of the heads' clean-image predictions (arXiv 2601.22158).

Everything is computed on tokens, in the layout of `patchify`. With c = clip(t, t_clip, 1):

    u      = (z - net_u) / c                      v   = (z - net_v) / c
    v_c    = (z - net_c) / c                      v_t = (z - x) / c
    du/dt  = (v_c - net_u_dot) / c - c' u / c     c'  = 1 above t_clip, else 0
    V      = u + h stopgrad(du/dt)
    v_g    = v_t + guidance (v_c - v_n) = (z - x_g) / c,   x_g = x + guidance (net_c - net_n)

so that V - v_g = (x_g - net_u) / c + h du/dt and v - v_g = (x_g - net_v) / c, which avoids the
difference of two large quotients by a small c.
"""

from __future__ import annotations

import torch
from torch import Tensor

from pmf.pair import tail
from pmf.reference.patch import patchify, unpatchify
from pmf.reference.tangent import accumulate


def _per_row(scalar: Tensor, like: Tensor) -> Tensor:
    """[B] as [B, 1, 1] in the dtype of `like`."""
    return scalar.to(like.dtype)[:, None, None]


def _conditional(net_v: Tensor, net_c: Tensor | None) -> Tensor:
    """net_c for the last B_dot rows; for earlier rows the main pass's own v head, which has the same inputs."""
    own = accumulate(net_v.detach())
    if net_c is None:
        return own
    return torch.cat([own[: own.shape[0] - net_c.shape[0]], accumulate(net_c)])


def _guided_image(x: Tensor, net_c: Tensor, net_n: Tensor | None, null_index: Tensor, guidance: Tensor) -> Tensor:
    """x_g = x + guidance (net_c - net_n) on the rows that have a null-class prediction, else x."""
    if net_n is None or net_n.shape[0] == 0:
        return x
    difference = net_c - accumulate(net_n)[null_index.clamp(min=0)]
    return x + _per_row(torch.where(null_index >= 0, guidance, 0), x) * difference


@torch.no_grad()
def _du_dt(net_u: Tensor, net_u_dot: Tensor | None, net_c: Tensor, z: Tensor, t: Tensor, t_clip: float) -> Tensor:
    """du/dt along (v_c, 1, 0) on the last B_dot rows; zero on earlier rows."""
    if net_u_dot is None:
        return torch.zeros_like(z)
    rows = net_u_dot.shape[0]
    still = torch.zeros_like(z[: z.shape[0] - rows])
    z, net_u, net_c, t = (tail(value, rows) for value in (z, net_u, net_c, t))
    c = _per_row(t.clamp(t_clip, 1), z)
    c_dot = _per_row(t > t_clip, z)
    u, v_c = (z - net_u) / c, (z - net_c) / c
    return torch.cat([still, (v_c - accumulate(net_u_dot)) / c - c_dot * u / c])


def _terms(net_u, net_v, net_u_dot, net_c, net_n, z, x, t, null_index, guidance, t_clip, patch_size):
    """The terms of all results, as tokens: z, x_g, net_c, du/dt and 1 / c."""
    z, x = accumulate(patchify(z, patch_size)), accumulate(patchify(x, patch_size))
    net_c = _conditional(net_v, net_c)
    x_g = _guided_image(x, net_c, net_n, null_index, guidance)
    du_dt = _du_dt(accumulate(net_u), net_u_dot, net_c, z, t, t_clip)
    return z, x_g, net_c, du_dt, 1 / _per_row(t.clamp(t_clip, 1), z)


def pmf_objective(
    net_u: Tensor,
    net_v: Tensor,
    net_u_dot: Tensor | None,
    net_c: Tensor | None,
    net_n: Tensor | None,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    h: Tensor,
    guidance: Tensor,
    null_index: Tensor,
    *,
    t_clip: float,
    patch_size: int,
) -> tuple[Tensor, Tensor]:
    """L_u, L_v per row: sums over pixels of (V - v_g)^2 and (v - v_g)^2; see `pmf.ops.pmf_objective`."""
    _, x_g, _, du_dt, inverse_c = _terms(
        net_u, net_v, net_u_dot, net_c, net_n, z, x, t, null_index, guidance, t_clip, patch_size
    )
    error_u = (x_g - net_u) * inverse_c + _per_row(h, x_g) * du_dt
    error_v = (x_g - net_v) * inverse_c
    return error_u.square().sum((1, 2)), error_v.square().sum((1, 2))


@torch.no_grad()
def pmf_objective_fields(
    net_u: Tensor,
    net_v: Tensor,
    net_u_dot: Tensor | None,
    net_c: Tensor | None,
    net_n: Tensor | None,
    z: Tensor,
    x: Tensor,
    t: Tensor,
    guidance: Tensor,
    null_index: Tensor,
    *,
    t_clip: float,
    patch_size: int,
) -> dict[str, Tensor]:
    """The objective's fields v_c, v_g, u, du_dt and v, as images."""
    z_tokens, x_g, net_c, du_dt, inverse_c = _terms(
        net_u, net_v, net_u_dot, net_c, net_n, z, x, t, null_index, guidance, t_clip, patch_size
    )
    tokens = {
        "v_c": (z_tokens - net_c) * inverse_c,
        "v_g": (z_tokens - x_g) * inverse_c,
        "u": (z_tokens - net_u) * inverse_c,
        "du_dt": du_dt,
        "v": (z_tokens - net_v) * inverse_c,
    }
    return {name: unpatchify(value, patch_size, z.shape[1]) for name, value in tokens.items()}
