"""The squared errors of the pMF loss."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pmf import reference
from pmf.errors import InputError, readable
from pmf.fields import checked_integer, checked_number
from pmf.inputs import Inputs
from pmf.ops.patches import check_sides


def pmf_objective(
    net_u: Tensor, net_v: Tensor, net_u_dot: Tensor | None, net_c: Tensor | None, net_n: Tensor | None,
    z: Tensor, x: Tensor, t: Tensor, h: Tensor, guidance: Tensor, null_index: Tensor,
    *, t_clip: float = 0.05, patch_size: int, impl: str | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """L_u, L_v per row: sums over pixels of (V - v_g)^2 and (v - v_g)^2 (arXiv 2601.22158).

    The docstring of `pmf/reference/objective.py` has the equations.

    Args: tokens of clean-image predictions in the layout of `patchify`, K = p * p * c values each:
    net_u, net_v [B, N, K], the two heads; net_u_dot [B_dot, N, K] or None, the tangent of net_u along
    (v_c, 1, 0); net_c [B_dot, N, K] or None, the v head of the conditional guidance pass on the last B_dot
    rows (earlier rows use net_v, which had the same inputs); net_n [B_n, N, K] or None, the v head on the
    null class; null_index [B] int64, the row of net_n, -1 for none. Images z = z_t and x [B, c, H, W].
    Scalars t, h = t - r and guidance = 1 - 1 / w' [B].
    Returns two float32 [B] (float64 for float64 inputs). Gradients reach only net_u and net_v; the
    losses have no tangents.
    """
    nets = dict(net_u=net_u, net_v=net_v, net_u_dot=net_u_dot, net_c=net_c, net_n=net_n)
    images, scalars = dict(z=z, x=x), dict(t=t, h=h, guidance=guidance)
    options = _options("pmf_objective", null_index, t_clip, patch_size)
    inputs = _checked("pmf_objective", nets, images, scalars, **options)
    return inputs.implementation(impl).pmf_objective(**nets, **images, **scalars, **options)


def pmf_objective_fields(
    net_u: Tensor, net_v: Tensor, net_u_dot: Tensor | None, net_c: Tensor | None, net_n: Tensor | None,
    z: Tensor, x: Tensor, t: Tensor, guidance: Tensor, null_index: Tensor, *, t_clip: float, patch_size: int,
) -> dict[str, Tensor]:  # fmt: skip
    """The fields v_c, v_g, u, du_dt and v of `pmf_objective`, as images [B, c, H, W] without gradient.

    Arguments: see `pmf_objective`.
    """
    nets = dict(net_u=net_u, net_v=net_v, net_u_dot=net_u_dot, net_c=net_c, net_n=net_n)
    images, scalars = dict(z=z, x=x), dict(t=t, guidance=guidance)
    options = _options("pmf_objective_fields", null_index, t_clip, patch_size)
    _checked("pmf_objective_fields", nets, images, scalars, **options)
    arguments: dict[str, Any] = {**nets, **images, **scalars, **options}
    return reference.pmf_objective_fields(**arguments)


def _options(op: str, null_index: Tensor, t_clip: float, patch_size: int) -> dict:
    t_clip, patch_size = checked_number(op, "t_clip", t_clip, 0), checked_integer(op, "patch_size", patch_size)
    return {"null_index": null_index, "t_clip": t_clip, "patch_size": patch_size}


def _checked(
    op: str, nets: dict[str, Tensor | None], images: dict[str, Tensor], scalars: dict[str, Tensor],
    *, null_index: Tensor, t_clip: float, patch_size: int,
) -> Inputs:  # fmt: skip
    """The inputs of an op, whose arguments are those of `pmf_objective`; t_clip and patch_size by `_options`."""
    inputs = Inputs(op, {}, {**images, **nets, **scalars})
    z, net_u_dot, net_c, net_n = images["z"], nets["net_u_dot"], nets["net_c"], nets["net_n"]
    inputs.shape("z", z, None, None, None, None)
    inputs.shape("x", images["x"], *z.shape)
    batch, channels, height, width = z.shape
    check_sides(op, "z", height, width, patch_size)
    tokens = (height // patch_size * (width // patch_size), patch_size**2 * channels)
    for name, net in nets.items():
        if name in ("net_u", "net_v") or net is not None:
            inputs.shape(name, net, batch if name in ("net_u", "net_v") else None, *tokens)
    alike = net_c.shape == net_u_dot.shape if net_c is not None and net_u_dot is not None else net_c is net_u_dot
    if not alike:
        raise InputError(f"{op}: net_c must cover the same rows as net_u_dot")
    if net_c is not None and net_c.shape[0] > batch:
        raise InputError(f"{op}: net_c must have at most {batch} rows")
    for name, scalar in scalars.items():
        inputs.shape(name, scalar, batch)
    _check_null_index(inputs, null_index, batch, 0 if net_n is None else net_n.shape[0])
    return inputs


def _check_null_index(inputs: Inputs, null_index: Tensor, batch: int, rows: int) -> None:
    """Check null_index: int64 [B] on the inputs' device and, if `readable`, below net_n's number of rows."""
    if not isinstance(null_index, Tensor) or null_index.dtype != torch.int64:
        got = getattr(null_index, "dtype", null_index)
        raise InputError(f"{inputs.op}: null_index must be int64, got {got}")
    inputs.shape("null_index", null_index, batch)
    if null_index.device != inputs.device:
        raise InputError(f"{inputs.op}: null_index must be on {inputs.device}, got {null_index.device}")
    if readable(null_index) and not bool((null_index < max(rows, 1)).all()):
        raise InputError(f"{inputs.op}: null_index must be below net_n's {rows} rows")
