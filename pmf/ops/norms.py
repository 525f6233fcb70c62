"""Normalise and modulate (adaLN), alone or after a gated residual."""

from __future__ import annotations

from collections.abc import Callable
from typing import overload

import torch
from torch import Tensor

from pmf.autocast import product_dtype
from pmf.errors import InputError
from pmf.fields import check_flags, checked_number
from pmf.inputs import Inputs, Moving, Pair
from pmf.ops.products import checked_linear, linear_inputs
from pmf.pair import Dual, Weights, total
from pmf.reference.tangent import accumulate, epsilon


def checked_epsilon(inputs: Inputs, eps: float | None, x: Tensor) -> float:
    """A norm's eps; None is nn.RMSNorm's. Errors: `InputError` unless it is None or a number of at least 0."""
    return epsilon(eps if eps is None else checked_number(inputs.op, "eps", eps, 0), x)


def _modulation(inputs: Inputs, name: str, modulation: Dual, x: Tensor) -> None:
    """Check that a modulation of x [B, ..., C] is [C] without tangent, [B, C], [B, 1, C], or has the shape of x."""
    value, dot = modulation
    samples, *between, width = x.shape
    inputs.one_of_shapes(
        name, value, (width,), (samples, width), (samples, *(1 for _ in between), width), tuple(x.shape)
    )
    if dot is not None and value.ndim == 1:
        raise InputError(f"{inputs.op}: {name} per channel takes no tangent; expand it to [B, C]")


def _check(inputs: Inputs, weight: Tensor | None, bias: Tensor | None, kind: str) -> Tensor:
    """Check what every norm takes; `inputs` are x, a branch if there is one, and modulations. Return x."""
    x = inputs.duals[0].value
    inputs.one_of_shapes("x", x, (None,) * 2, (None,) * 3, (None,) * 4)
    for name, vector in (("weight", weight), ("bias", bias)):
        if vector is not None:
            inputs.shape(name, vector, x.shape[-1])
    for name, modulation in zip(inputs.names, inputs.duals, strict=True):
        if name in ("gate", "scale", "shift") and modulation.value is not None:
            _modulation(inputs, name, modulation, x)
    if kind not in ("rms", "layer"):
        raise InputError(f'{inputs.op}: kind must be "rms" or "layer", got {kind!r}')
    return x


def _tokens(x: Tensor) -> Tensor:
    """[B, C], [B, S, C] or [B, H, W, C] as [B, S, C]; channels and [B, 1, C] stay vectors, [C] and [B, C]."""
    if x.ndim < 2:
        return x
    return x.flatten(1, -2) if x.ndim > 2 else x[:, None]


def _vectors(modulation: Tensor) -> Tensor:
    """A modulation as [C], [B, C], or, if tokens differ, [B, S, C]."""
    if modulation.ndim < 3:
        return modulation
    tokens = modulation.flatten(1, -2)
    return tokens[:, 0] if tokens.shape[1] == 1 else tokens


def _beside_tokens(vector: Tensor | None, tokens: bool) -> Tensor | None:
    """A vector in the accumulation dtype, one per sample as [B, 1, C] if it is to be added to `tokens` [B, S, C]."""
    if vector is None:
        return None
    return accumulate(vector[:, None] if tokens and vector.ndim == 2 else vector)


def _with_bias(bias: Tensor | None, scale: Dual, shift: Dual) -> Dual:
    """The shift of a norm with a bias: bias (1 + scale) + shift, and bias scale_dot + shift_dot."""
    if bias is None:
        return shift
    tokens = any(m.value is not None and m.value.ndim == 3 for m in (scale, shift))
    wide = [_beside_tokens(vector, tokens) for vector in (bias, *scale, *shift)]
    bias, scale_value, scale_dot, shift_value, shift_dot = wide
    value = total(bias if scale_value is None else bias * (1 + scale_value), shift_value)
    with torch.no_grad():
        dot = total(None if scale_dot is None else bias * scale_dot, shift_dot)
    return Dual(value, dot).map(_vectors)


def _shaped(x: Tensor) -> Callable[[Tensor], Tensor]:
    """What returns results [B, S, C] to the shape of x."""
    sizes = x.shape[1:]
    return lambda y: y if len(sizes) == 2 else y.reshape(y.shape[0], *sizes[:-1], y.shape[-1])


@overload
def norm_modulate(
    x: Tensor, weight: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    bias: Tensor | None = None, *, kind: str = "rms", eps: float | None = 1e-6, linear: Weights | None = None,
    impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def norm_modulate(
    x: Pair, weight: Tensor | None = None, scale: Moving | None = None, shift: Moving | None = None,
    bias: Tensor | None = None, *, kind: str = "rms", eps: float | None = 1e-6, linear: Weights | None = None,
    impl: str | None = None,
) -> Dual: ...  # fmt: skip
def norm_modulate(x, weight=None, scale=None, shift=None, bias=None, *, kind="rms", eps=1e-6, linear=None, impl=None):
    """Normalise over the last dimension, then modulate (adaLN): y = (n(x) weight + bias) (1 + scale) + shift.

    n(x) = (x - mu) / sqrt(mean((x - mu)^2) + eps), with mu = mean(x) for kind "layer" and 0 for "rms".
    n_dot = (c_dot - n mean(n c_dot)) / sqrt(...), c_dot = x_dot - mean(x_dot) or x_dot.

    Args: x [B, C], [B, S, C] or [B, H, W, C]; weight, bias [C] or None (ones, zeros); scale, shift per channel [C],
    per sample [B, C] or [B, 1, C], per token (in the shape of x), or None (zeros); eps None is nn.RMSNorm's, 1.2e-7
    (2.2e-16 in float64); linear (W [N, C], b [N] or None) gives y W^T + b [..., N] in place of y, which is then made
    again in backward instead of kept.
    Returns y in the shape of x, in the autocast dtype if autocast is on, else in that of x.
    Tangents: of x, and of scale and shift per sample or token.
    """
    given = {"weight": weight, "bias": bias, **linear_inputs("norm_modulate", linear)}
    inputs = Inputs("norm_modulate", {"x": x, "scale": scale, "shift": shift}, given)
    value = _check(inputs, weight, bias, kind)
    run = inputs.implementation(impl, value.shape[-1])
    x, scale, shift = inputs.duals
    scale, shift = scale.map(_vectors), shift.map(_vectors)
    dtype = product_dtype(x.value)
    options = dict(kind=kind, eps=checked_epsilon(inputs, eps, x.value), out_dtype=dtype)
    options["linear"] = checked_linear(inputs, linear, value.shape[-1], dtype)
    y = run.norm_modulate(x.map(_tokens), weight, scale, _with_bias(bias, scale, shift), **options)
    return inputs.give(y.map(_shaped(value)))


@overload
def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor | None = None, weight: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None,
    bias: Tensor | None = None, *, kind: str = "rms", eps: float | None = 1e-6, linear: Weights | None = None,
    recompute_sum: bool = False, impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def residual_norm_modulate(
    x: Pair, branch: Moving, gate: Moving | None = None, weight: Tensor | None = None, scale: Moving | None = None,
    shift: Moving | None = None,
    bias: Tensor | None = None, *, kind: str = "rms", eps: float | None = 1e-6, linear: Weights | None = None,
    recompute_sum: bool = False, impl: str | None = None,
) -> tuple[Dual, Dual]: ...  # fmt: skip
def residual_norm_modulate(
    x, branch, gate=None, weight=None, scale=None, shift=None, bias=None, *, kind="rms", eps=1e-6, linear=None,
    recompute_sum=False, impl=None,
):  # fmt: skip
    """Gated residual, then `norm_modulate`: x_new = x + gate branch, y = (n(x_new) weight + bias) (1 + scale) + shift.

    x_new_dot = x_dot + gate branch_dot + gate_dot branch.

    Args: x and branch of one shape; gate as scale, or None (one); the rest as in `norm_modulate`. recompute_sum: keep x
    and branch for backward, which adds them up again, instead of x_new: less memory if x is kept anyway.
    Returns x_new in the dtype of x, and y.
    Tangents: of x and branch, and of gate, scale and shift per sample or token.
    """
    moving = {"x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift}
    given = {"weight": weight, "bias": bias, **linear_inputs("residual_norm_modulate", linear)}
    inputs = Inputs("residual_norm_modulate", moving, given)
    value = _check(inputs, weight, bias, kind)
    check_flags(inputs.op, recompute_sum=recompute_sum)
    inputs.shape("branch", inputs.duals[1].value, *value.shape)
    run = inputs.implementation(impl, value.shape[-1])
    x, branch, *modulations = inputs.duals
    gate, scale, shift = (m.map(_vectors) for m in modulations)
    dtype = product_dtype(x.value)
    options = dict(
        kind=kind, eps=checked_epsilon(inputs, eps, x.value), out_dtype=dtype, recompute_sum=bool(recompute_sum)
    )
    options["linear"] = checked_linear(inputs, linear, value.shape[-1], dtype)
    x, branch, shift = x.map(_tokens), branch.map(_tokens), _with_bias(bias, scale, shift)
    x_new, y = run.residual_norm_modulate(x, branch, gate, weight, scale, shift, **options)
    return inputs.give(x_new.map(_shaped(value))), inputs.give(y.map(_shaped(value)))
