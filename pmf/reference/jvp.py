"""The oracle: `torch.func.jvp` of a network's plain forward pass, recorded or not."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def model_jvp(model, z, t, h, omega, t_min, t_max, y, z_dot, t_dot, h_dot) -> tuple[Tensor, Tensor | None, Tensor]:
    """u, v and du/dt by `torch.func.jvp` of `model.forward` along (z_dot, t_dot, h_dot).

    Tangents of B_dot < B rows are padded with zeros in front; u_dot covers the last B_dot rows, as
    in `model.forward_dual`. Meant for float64 and small networks: every activation's tangent is
    recorded too.
    """
    rows = z_dot.shape[0]

    def pad(tangent: Tensor, primal: Tensor) -> Tensor:
        return torch.cat([torch.zeros_like(primal[: primal.shape[0] - rows]), tangent])

    def u_of(z: Tensor, t: Tensor, h: Tensor) -> tuple[Tensor, Tensor | None]:
        u, v = model(z, t, h, omega, t_min, t_max, y)
        return u, v

    primals = (z, t, h)
    tangents = tuple(pad(dot, primal) for dot, primal in zip((z_dot, t_dot, h_dot), primals, strict=True))
    jvp: Any = torch.func.jvp
    u, u_dot, v = jvp(u_of, primals, tangents, has_aux=True)
    return u, v, u_dot[u_dot.shape[0] - rows :]


def two_pass_jvp(model, *inputs: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
    """As `model_jvp`, but without recording the tangent: u and v come from a second, recorded forward pass."""
    with torch.no_grad():
        _, _, u_dot = model_jvp(model, *inputs)
    u, v = model(*inputs[:7])
    return u, v, u_dot
