"""Normalise and modulate (adaLN), alone or after a gated residual."""

from __future__ import annotations

from typing import overload

from torch import Tensor

from pmf.autocast import product_dtype
from pmf.errors import InputError
from pmf.inputs import Inputs, Moving, Pair
from pmf.pair import Dual


def _modulation(inputs: Inputs, name: str, modulation: Dual, samples: int, width: int) -> None:
    """Check that a modulation is [B, C], or [C] without tangent."""
    value, dot = modulation
    if value is not None and value.ndim == 2:
        inputs.shape(name, value, samples, width)
        return
    if dot is not None:
        raise InputError(f"{inputs.op}: {name} per channel takes no tangent; expand it to [B, C]")
    inputs.shape(name, value, width)


def _norm(inputs: Inputs, x: Tensor, weight: Tensor | None, scale: Dual, shift: Dual, kind: str) -> tuple[int, int]:
    """Check the inputs that every norm takes; return the number of samples and the width of x."""
    if x is None or x.ndim != 3:
        inputs.shape("x", x, None, None, None)
    samples, _, width = x.shape
    if weight is not None:
        inputs.shape("weight", weight, width)
    if scale.value is not None:
        _modulation(inputs, "scale", scale, samples, width)
    if shift.value is not None:
        _modulation(inputs, "shift", shift, samples, width)
    if kind not in ("rms", "layer"):
        raise InputError(f'{inputs.op}: kind must be "rms" or "layer", got {kind!r}')
    return samples, width


@overload
def norm_modulate(
    x: Tensor, weight: Tensor | None = None, scale: Tensor | None = None, shift: Tensor | None = None,
    *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> Tensor: ...  # fmt: skip
@overload
def norm_modulate(
    x: Pair, weight: Tensor | None = None, scale: Moving | None = None, shift: Moving | None = None,
    *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> Dual: ...  # fmt: skip
def norm_modulate(x, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None):
    """Normalise over the last dimension, then modulate (adaLN): y = n(x) weight (1 + scale) + shift.

    n(x) = (x - mu) / sqrt(mean((x - mu)^2) + eps), with mu = mean(x) for kind "layer" and 0 for "rms".
    n_dot = (c_dot - n mean(n c_dot)) / sqrt(...), c_dot = x_dot - mean(x_dot) or x_dot.

    Args: x [B, S, C]; weight [C] or None (ones); scale, shift [B, C], [C] or None (zeros).
    Returns y [B, S, C] in the autocast dtype if autocast is on, else in that of x.
    Tangents: of x, and of scale and shift per sample.
    """
    inputs = Inputs("norm_modulate", {"x": x, "scale": scale, "shift": shift}, {"weight": weight})
    x, scale, shift = inputs.duals
    _, width = _norm(inputs, x.value, weight, scale, shift, kind)
    run = inputs.implementation(impl, width)
    x, scale, shift = inputs.duals
    y = run.norm_modulate(x, weight, scale, shift, kind=kind, eps=eps, out_dtype=product_dtype(x.value))
    return inputs.give(y)


@overload
def residual_norm_modulate(
    x: Tensor, branch: Tensor, gate: Tensor, weight: Tensor | None = None, scale: Tensor | None = None,
    shift: Tensor | None = None, *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> tuple[Tensor, Tensor]: ...  # fmt: skip
@overload
def residual_norm_modulate(
    x: Pair, branch: Moving, gate: Moving, weight: Tensor | None = None, scale: Moving | None = None,
    shift: Moving | None = None, *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None,
) -> tuple[Dual, Dual]: ...  # fmt: skip
def residual_norm_modulate(x, branch, gate, weight=None, scale=None, shift=None, *, kind="rms", eps=1e-6, impl=None):
    """Gated residual, then `norm_modulate`: x_new = x + gate branch, y = n(x_new) weight (1 + scale) + shift.

    x_new_dot = x_dot + gate branch_dot + gate_dot branch.

    Args: x, branch [B, S, C]; gate [C] or [B, C]; the rest as in `norm_modulate`.
    Returns x_new in the dtype of x, and y.
    Tangents: of x and branch, and of gate, scale and shift per sample.
    """
    moving = {"x": x, "branch": branch, "gate": gate, "scale": scale, "shift": shift}
    inputs = Inputs("residual_norm_modulate", moving, {"weight": weight})
    x, branch, gate, scale, shift = inputs.duals
    samples, width = _norm(inputs, x.value, weight, scale, shift, kind)
    if branch.value is None or branch.value.shape != x.value.shape:
        inputs.shape("branch", branch.value, *x.value.shape)
    _modulation(inputs, "gate", gate, samples, width)
    run = inputs.implementation(impl, width)
    x, branch, gate, scale, shift = inputs.duals
    x_new, y = run.residual_norm_modulate(
        x, branch, gate, weight, scale, shift, kind=kind, eps=eps, out_dtype=product_dtype(x.value)
    )
    return inputs.give(x_new), inputs.give(y)
