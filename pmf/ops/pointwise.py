"""Pointwise functions of MLPs and embedders."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from pmf import reference
from pmf.autocast import product_dtype
from pmf.errors import InputError
from pmf.fields import checked_integer, checked_number
from pmf.inputs import Inputs, Pair
from pmf.ops.products import checked_linear, linear_inputs
from pmf.pair import Dual, Weights


@overload
def swiglu(x: Tensor, *, linear: Weights | None = None, impl: str | None = None) -> Tensor: ...
@overload
def swiglu(x: Pair, *, linear: Weights | None = None, impl: str | None = None) -> Dual: ...
def swiglu(x, *, linear=None, impl=None):
    """SwiGLU's pointwise half: silu(a) b for x = [a, b], and its tangent silu'(a) a_dot b + silu(a) b_dot.

    Args: x [B, 2F], [B, S, 2F] or [B, H, W, 2F]; linear (W [N, F], b [N] or None) gives y W^T + b in place of y, which
    is then made again in backward instead of kept. Returns the same with F (N). Tangents: of x.
    """
    inputs = Inputs("swiglu", {"x": x}, linear_inputs("swiglu", linear))
    value = inputs.duals[0].value
    inputs.one_of_shapes("x", value, (None,) * 2, (None,) * 3, (None,) * 4)
    if value.shape[-1] % 2 != 0:
        raise InputError(f"swiglu: x must have an even last dimension, got {value.shape[-1]}")
    run = inputs.implementation(impl)
    linear = checked_linear(inputs, linear, value.shape[-1] // 2, product_dtype(value))
    return inputs.give(run.swiglu(*inputs.duals, linear=linear))


@overload
def gelu(x: Tensor, *, approximate: str = "none", linear: Weights | None = None, impl: str | None = None) -> Tensor: ...
@overload
def gelu(x: Pair, *, approximate: str = "none", linear: Weights | None = None, impl: str | None = None) -> Dual: ...
def gelu(x, *, approximate="none", linear=None, impl=None):
    """gelu(x) = x Phi(x), and its tangent gelu'(x) x_dot; `approximate` is "none" or "tanh", as in F.gelu.

    Args: x [B, F], [B, S, F] or [B, H, W, F]; linear as in `swiglu`. Returns the same shape. Tangents: of x.
    """
    inputs = Inputs("gelu", {"x": x}, linear_inputs("gelu", linear))
    value = inputs.duals[0].value
    inputs.one_of_shapes("x", value, (None,) * 2, (None,) * 3, (None,) * 4)
    if approximate not in ("none", "tanh"):
        raise InputError(f'gelu: approximate must be "none" or "tanh", got {approximate!r}')
    run = inputs.implementation(impl)
    linear = checked_linear(inputs, linear, value.shape[-1], product_dtype(value))
    return inputs.give(run.gelu(*inputs.duals, approximate=approximate, linear=linear))


@overload
def scalar_features(s: Tensor, features: int = 256, *, max_period: float = 10000.0, shift: float = 0.0) -> Tensor: ...
@overload
def scalar_features(s: Pair, features: int = 256, *, max_period: float = 10000.0, shift: float = 0.0) -> Dual: ...
def scalar_features(s, features=256, *, max_period=10000.0, shift=0.0):
    """Sinusoidal features of scalars, [cos(s f), sin(s f)] with f_i = max_period^(-i / (features / 2 - shift)).

    Args: s [B]. Returns [B, features], features an even number; float32, or float64 for float64. Tangents: of s.
    DiT and SiT have shift 0, diffusers' DiT 1. max_period must be positive, shift not features / 2.
    """
    inputs = Inputs("scalar_features", {"s": s})
    inputs.shape("s", inputs.duals[0].value, None)
    features = checked_integer(inputs.op, "features", features, 2)
    if features % 2 != 0:
        raise InputError(f"scalar_features: features must be even and positive, got {features}")
    max_period, shift = checked_number(inputs.op, "max_period", max_period), checked_number(inputs.op, "shift", shift)
    if max_period <= 0:
        raise InputError(f"scalar_features: max_period must be positive, got {max_period}")
    if shift == features // 2:
        raise InputError(f"scalar_features: shift must not be features / 2, got {shift}")
    return inputs.give(reference.scalar_features(*inputs.duals, features, max_period=max_period, shift=shift))


@overload
def silu(x: Tensor) -> Tensor: ...
@overload
def silu(x: Pair) -> Dual: ...
def silu(x):
    """silu(x) = x sigmoid(x), and its tangent (sigmoid + silu (1 - sigmoid)) x_dot: any shape [B, ...]."""
    inputs = Inputs("silu", {"x": x})
    if inputs.duals[0].value is None:
        inputs.shape("x", None)
    return inputs.give(reference.silu(*inputs.duals))
