"""Normalise and modulate, alone and behind a gated residual."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from pmf.reference.tangent import accumulate, own_gradient, plus_product, tail, tangent_rows, total

Kind = Literal["rms", "layer"]


def _statistics(x: Tensor, kind: Kind, eps: float) -> tuple[Tensor, Tensor]:
    """n = (x - mu) / sqrt(mean((x - mu)^2) + eps) and its rstd = 1 / sqrt(...); mu = 0 for "rms"."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def _normalise_dot(n: Tensor, rstd: Tensor, x_dot: Tensor, kind: Kind) -> Tensor:
    """n_dot = rstd (c_dot - n mean(n c_dot)), with c_dot = x_dot - mean(x_dot) for "layer"."""
    c_dot = x_dot - x_dot.mean(-1, keepdim=True) if kind == "layer" else x_dot
    dot = (n * c_dot).sum(-1, keepdim=True)
    return torch.addcmul(c_dot, n, dot, value=-1 / n.shape[-1]).mul_(rstd)


class _Normalise(torch.autograd.Function):
    """`_statistics`, recorded as n and rstd alone: n's Jacobian is symmetric, so its gradient is its tangent's formula.

    rstd moves by -rstd^2 mean(n c_dot).
    """

    @staticmethod
    def forward(ctx, x: Tensor, kind: Kind, eps: float) -> tuple[Tensor, Tensor]:
        n, rstd = _statistics(x, kind, eps)
        ctx.save_for_backward(n, rstd)
        ctx.set_materialize_grads(False)
        ctx.kind = kind
        return n, rstd

    @staticmethod
    def backward(ctx, dn: Tensor | None, drstd: Tensor | None):
        n, rstd = ctx.saved_tensors
        dx = None if dn is None else _normalise_dot(n, rstd, dn, ctx.kind)
        if drstd is not None:
            dx = total(dx, n * (drstd * rstd.square() / -n.shape[-1]))
        return dx, None, None


def _normalise(x: Tensor, kind: Kind, eps: float) -> tuple[Tensor, Tensor]:
    """`_statistics`, with the gradient above."""
    return _Normalise.apply(x, kind, eps) if own_gradient(x) else _statistics(x, kind, eps)


def _per_token(modulation: Tensor | None) -> Tensor | None:
    """[B, C] as [B, 1, C], [C] as it is: broadcastable to [B, S, C]."""
    if modulation is None:
        return None
    modulation = accumulate(modulation)
    return modulation[:, None] if modulation.ndim == 2 else modulation


def _rows(parameter: Tensor | None, rows: int) -> Tensor | None:
    """The last `rows` samples of a per-sample modulation; a per-channel one has none to choose."""
    if parameter is None or parameter.ndim < 3:
        return None if parameter is None else parameter.detach()
    return tail(parameter, rows)


def norm_modulate_dual(
    primals: tuple[Tensor, Tensor | None, Tensor | None, Tensor | None],
    tangents: tuple[Tensor | None, None, Tensor | None, Tensor | None],
    *,
    kind: Kind = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor | None]:
    """y = n(x) weight (1 + scale) + shift, and its tangent; see `pmf.ops.norm_modulate`."""
    x, weight, scale, shift = primals
    x_dot, _, scale_dot, shift_dot = tangents
    out_dtype = out_dtype or x.dtype

    n, rstd = _normalise(accumulate(x), kind, eps)
    weight, scale, shift = (_per_token(p) for p in (weight, scale, shift))
    factors = [f for f in (weight, None if scale is None else 1 + scale) if f is not None]
    factor = torch.mul(*factors) if len(factors) == 2 else factors[0] if factors else None
    y = n if factor is None else n * factor
    y = (y if shift is None else y + shift).to(out_dtype)

    rows = tangent_rows(tangents)
    if rows is None:
        return y, None
    with torch.no_grad():
        n, rstd, weight, factor = tail(n, rows), tail(rstd, rows), _rows(weight, rows), _rows(factor, rows)
        y_dot = torch.zeros_like(n) if x_dot is None else _normalise_dot(n, rstd, accumulate(x_dot), kind)
        if factor is not None:
            y_dot.mul_(factor)
        if scale_dot is not None:
            factor_dot = _per_token(scale_dot)
            y_dot.addcmul_(n, factor_dot if weight is None else weight * factor_dot)
        if shift_dot is not None:
            y_dot.add_(_per_token(shift_dot))
        return y, y_dot.to(out_dtype)


def residual_norm_modulate_dual(
    primals: tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None],
    tangents: tuple[Tensor | None, Tensor | None, Tensor | None, None, Tensor | None, Tensor | None],
    *,
    kind: Kind = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor | None, Tensor | None]]:
    """x_new = x + gate branch, y = norm_modulate(x_new), and both tangents."""
    x, branch, gate, weight, scale, shift = primals
    x_dot, branch_dot, gate_dot, _, scale_dot, shift_dot = tangents

    gate = _per_token(gate)
    x_new = (accumulate(x) + gate * accumulate(branch)).to(x.dtype)

    rows = tangent_rows((x_dot, branch_dot, gate_dot))
    x_new_dot = None
    if rows is not None:
        with torch.no_grad():
            moved = plus_product(x_dot, _rows(gate, rows), branch_dot)
            x_new_dot = plus_product(moved, tail(branch, rows), _per_token(gate_dot)).to(x.dtype)
    y, y_dot = norm_modulate_dual(
        (x_new, weight, scale, shift),
        (x_new_dot, None, scale_dot, shift_dot),
        kind=kind,
        eps=eps,
        out_dtype=out_dtype,
    )
    return (x_new, y), (x_new_dot, y_dot)
