"""The rules of other packages' norms, gates and rotations: apex, flash-attn, mamba-ssm and Liger.

They are autograd.Functions without jvp, whose tangent is that of the same formula in PyTorch, with the rules of its
functions. A formula has the names of a Function's arguments, whose order and number differ between versions.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from pmf.tangents.carriers import CARRIERS, carrier
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import FINDERS, Handler, expect_none, is_dual, jointly_linear

MODULES = "apex.normalization.fused_layer_norm", "ops.triton.layer_norm"
"""The ends of the names of their modules, but for Liger's."""
LIGER = "liger_kernel.ops."
WITHOUT_EFFECT = """
casting_mode in_place memory_efficient num_channels out_dtype residual_in_fp32 row_mode
"""
"""Arguments that say how to compute, not what; dtypes are those of the values."""
ROTATION = "LigerRopeFunction"
RENAMED = {
    "X": "x", "W": "weight", "B": "bias", "R": "residual", "input_": "input",
    "affine_scaling_weight": "weight", "affine_shifting_bias": "bias",
}  # fmt: skip
"""Liger's names of arguments, and those of the formulas."""


def _layer_norm(input: Tensor, normalized_shape: Any, eps: float, weight: Any = None, bias: Any = None) -> Tensor:
    return F.layer_norm(input if weight is None else input.to(weight.dtype), normalized_shape, weight, bias, eps)


def _rms_norm(input: Tensor, normalized_shape: Any, eps: float, weight: Any = None) -> Tensor:
    return F.rms_norm(input if weight is None else input.to(weight.dtype), normalized_shape, weight, eps)


def _residual_norm(
    x: Tensor, weight: Tensor, bias: Any = None, residual: Any = None, eps: float = 1e-6, prenorm: bool = False,
    is_rms_norm: bool = False, zero_centered_weight: bool = False,
) -> Any:  # fmt: skip
    """norm(x + residual), with prenorm the sum too."""
    x = x if residual is None else x + residual
    weight = weight + 1 if zero_centered_weight else weight
    if is_rms_norm:
        out = _rms_norm(x, weight.shape, eps, weight)
        out = out if bias is None else out + bias
    else:
        out = _layer_norm(x, weight.shape, eps, weight, bias)
    return (out, x) if prenorm else out


def _liger_rms_norm(x: Tensor, weight: Any, eps: float, offset: float = 0.0) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], weight if weight is None or not offset else weight + offset, eps)


def _liger_modulated(x: Tensor, weight: Any, scale: Tensor, shift: Any, eps: float, offset: float = 0.0) -> Tensor:
    """(1 + scale) norm(x) + shift, each row of scale and shift for as many rows of x."""
    rows = _liger_rms_norm(x, weight, eps, offset).reshape(scale.numel() // x.shape[-1], -1, x.shape[-1])
    out = rows * (1 + scale.reshape(len(rows), 1, -1))
    return (out if shift is None else out + shift.reshape(len(rows), 1, -1)).reshape(x.shape)


def _liger_sum_and_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float, offset: float = 0.0) -> tuple:
    return _liger_rms_norm(x + residual, weight, eps, offset), x + residual


def _silu_gate(a: Tensor, b: Tensor, gate_multiplier: float = 1.0, down_multiplier: float = 1.0) -> Tensor:
    return F.silu(a * gate_multiplier) * b * down_multiplier


FORMULAS: dict[str, Callable] = {
    "FusedLayerNormFunction": _layer_norm,
    "FusedLayerNormAffineFunction": _layer_norm,
    "FusedLayerNormAffineMixedDtypesFunction": _layer_norm,
    "FusedRMSNormFunction": _rms_norm,
    "FusedRMSNormAffineFunction": _rms_norm,
    "FusedRMSNormAffineMixedDtypesFunction": _rms_norm,
    "LayerNormFn": _residual_norm,
    "LigerRMSNormFunction": _liger_rms_norm,
    "LigerModulatedRMSNormFunction": _liger_modulated,
    "LigerFusedAddRMSNormFunction": _liger_sum_and_norm,
    "LigerLayerNormFunction": lambda x, weight, bias, eps: F.layer_norm(x, weight.shape, weight, bias, eps),
    "LigerGroupNormFunction": lambda x, weight, bias, num_groups, eps: F.group_norm(x, num_groups, weight, bias, eps),
    "LigerSiLUMulFunction": _silu_gate,
    "LigerGELUMulFunction": lambda a, b: F.gelu(a, approximate="tanh") * b,
    "LigerReLUSquaredFunction": lambda x: F.relu(x).square(),
    "LigerDyTFunction": lambda x, alpha, gamma, beta=None: (alpha * x).tanh() * gamma + (0 if beta is None else beta),
    "LigerSoftmaxFunction": lambda input: input.softmax(-1),
}
"""By name of the Function."""


def _of_formula(function: Any) -> Handler | None:
    """The handler of an autograd.Function whose formula is known; None for others."""
    name, module = function.__name__, function.__module__
    if not module.endswith(MODULES) and not module.startswith(LIGER):
        return None
    if name == ROTATION:
        return _rotation
    return ruled(_rule(function, FORMULAS[name])) if name in FORMULAS else None


def _rotation(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Linear in q and k together. It writes into them; by then nobody reads their values."""

    def again(q, k, *others):
        return function(q.clone(), k.clone(), *others)

    return ruled(jointly_linear(again, (0, "q"), (1, "k")))(function, args, kwargs)


def _rule(function: Any, formula: Callable) -> Callable:
    full_name = f"{function.__module__}.{function.__name__}"
    names = [RENAMED.get(name, name) for name in list(inspect.signature(function.forward).parameters)[1:]]
    followed = list(inspect.signature(formula).parameters)

    def rule(out, *args):
        given = dict(zip(names, args, strict=False))
        expect_none(full_name, given, [*followed, *WITHOUT_EFFECT.split()])
        moving = {name: carrier(*x) if is_dual(x) else x for name, x in given.items() if name in followed}
        result = formula(**moving)
        return tuple(map(_dot, result)) if isinstance(result, tuple) else _dot(result)

    return rule


def _dot(x: Any) -> Tensor | None:
    return x.tangent if type(x) in CARRIERS else None


FINDERS.append(_of_formula)
