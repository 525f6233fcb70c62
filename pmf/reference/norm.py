"""Normalise and modulate, alone and after a gated residual."""

from __future__ import annotations

import functools
from typing import Literal

import torch
from torch import Tensor

from pmf.pair import ABSENT, Dual, tail, tangent_rows, total
from pmf.reference.product import then_linear
from pmf.reference.tangent import accumulate, own_gradient, plus_product

Kind = Literal["rms", "layer"]


def _statistics(x: Tensor, kind: Kind, eps: float) -> tuple[Tensor, Tensor]:
    """n = (x - mu) / sqrt(mean((x - mu)^2) + eps) and its rstd = 1 / sqrt(...); mu = 0 for "rms"."""
    centred = x - x.mean(-1, keepdim=True) if kind == "layer" else x
    rstd = torch.rsqrt(centred.square().mean(-1, keepdim=True) + eps)
    return centred * rstd, rstd


def normalise_dot(n: Tensor, rstd: Tensor, x_dot: Tensor, kind: Kind) -> Tensor:
    """n_dot = rstd (c_dot - n mean(n c_dot)), with c_dot = x_dot - mean(x_dot) for "layer"."""
    c_dot = x_dot - x_dot.mean(-1, keepdim=True) if kind == "layer" else x_dot
    dot = (n * c_dot).sum(-1, keepdim=True)
    return torch.addcmul(c_dot, n, dot, value=-1 / n.shape[-1]).mul_(rstd)


class _Normalise(torch.autograd.Function):
    """`_statistics`, saving only n and rstd: n's Jacobian is symmetric, so its gradient has the tangent's formula.

    The tangent of rstd is -rstd^2 mean(n c_dot).
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
        dx = None if dn is None else normalise_dot(n, rstd, dn, ctx.kind)
        if drstd is not None:
            dx = total(dx, n * (drstd * rstd.square() / -n.shape[-1]))
        return dx, None, None


def normalise(x: Tensor, kind: Kind, eps: float) -> tuple[Tensor, Tensor]:
    """`_statistics`, with the gradient above."""
    return _Normalise.apply(x, kind, eps) if own_gradient(x) else _statistics(x, kind, eps)


def _per_token(modulation: Tensor | None) -> Tensor | None:
    """[B, C] as [B, 1, C], others unchanged: broadcastable to [B, S, C]."""
    if modulation is None:
        return None
    modulation = accumulate(modulation)
    return modulation[:, None] if modulation.ndim == 2 else modulation


def _rows(parameter: Tensor | None, rows: int) -> Tensor | None:
    """The last `rows` samples of a parameter per sample or token; one per channel as a whole."""
    if parameter is None or parameter.ndim < 3:
        return None if parameter is None else parameter.detach()
    return tail(parameter, rows)


def _times(*factors: Tensor | None) -> Tensor | None:
    """The product of the factors that are there; None is one."""
    present = [f for f in factors if f is not None]
    return functools.reduce(torch.mul, present) if present else None


@then_linear
def norm_modulate(
    x: Dual,
    weight: Tensor | None = None,
    scale: Dual = ABSENT,
    shift: Dual = ABSENT,
    *,
    kind: Kind = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
) -> Dual:
    """y = n(x) weight (1 + scale) + shift, and its tangent; see `pmf.ops.norm_modulate`."""
    out_dtype = out_dtype or x.value.dtype
    n, rstd = normalise(accumulate(x.value), kind, eps)
    weight, scale_token, shift_token = map(_per_token, (weight, scale.value, shift.value))
    factor = _times(weight, None if scale_token is None else 1 + scale_token)
    y = _times(n, factor)
    y = (y if shift_token is None else y + shift_token).to(out_dtype)

    rows = tangent_rows((x.dot, scale.dot, shift.dot))
    if rows is None:
        return Dual(y)
    with torch.no_grad():
        n, rstd, weight, factor = tail(n, rows), tail(rstd, rows), _rows(weight, rows), _rows(factor, rows)
        y_dot = None if x.dot is None else normalise_dot(n, rstd, accumulate(x.dot), kind)
        if y_dot is not None and factor is not None:
            y_dot.mul_(factor)
        if scale.dot is not None:
            factor_dot = _times(weight, _per_token(scale.dot))
            y_dot = n * factor_dot if y_dot is None else y_dot.addcmul_(n, factor_dot)
        if shift.dot is not None:
            shift_dot = _per_token(shift.dot)
            y_dot = torch.zeros_like(n) + shift_dot if y_dot is None else y_dot.add_(shift_dot)
        return Dual(y, y_dot.to(out_dtype))


@then_linear
def residual_norm_modulate(
    x: Dual,
    branch: Dual,
    gate: Dual = ABSENT,
    weight: Tensor | None = None,
    scale: Dual = ABSENT,
    shift: Dual = ABSENT,
    *,
    kind: Kind = "rms",
    eps: float = 1e-6,
    out_dtype: torch.dtype | None = None,
    recompute_sum: bool = False,
) -> tuple[Dual, Dual]:
    """x_new = x + gate branch, and y = norm_modulate(x_new). `recompute_sum` is for kernels: PyTorch keeps no sum."""
    gate_token = _per_token(gate.value)
    value = (accumulate(x.value) + _times(gate_token, accumulate(branch.value))).to(x.value.dtype)
    rows = tangent_rows((x.dot, branch.dot, gate.dot))
    dot = None
    if rows is not None:
        with torch.no_grad():
            if gate_token is None:
                moved = total(x.dot, None if branch.dot is None else accumulate(branch.dot))
            else:
                moved = plus_product(x.dot, _rows(gate_token, rows), branch.dot)
            dot = plus_product(moved, tail(branch.value, rows), _per_token(gate.dot)).to(x.value.dtype)
    x_new = Dual(value, dot)
    return x_new, norm_modulate(x_new, weight, scale, shift, kind=kind, eps=eps, out_dtype=out_dtype)
