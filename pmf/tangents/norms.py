"""Rules of norms: n = (x - mu) / sigma over some dimensions, y = n weight + bias.

n_dot = (c_dot - n mean(n c_dot)) / sigma with c_dot = x_dot - mean(x_dot), or x_dot for RMSNorm. Weight and bias do not
move; where they do, `torch.func.jvp` computes the tangent.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.tangents.fallback import check_eager, tangents_by_torch_func
from pmf.tangents.handlers import ruled
from pmf.tangents.rules import HANDLERS, Rule, accumulating, is_dual, named

_ATEN = torch.ops.aten
ONLY_INPUT = [True, False, False]
"""Which gradients a norm's backward computes. Without weight its Jacobian is symmetric: the gradient is the tangent."""


def _weighted(dot: Tensor, weight: Tensor | None, channel: int | None = None) -> Tensor:
    """dot times weight, which belongs to the last dimensions or to dimension `channel`."""
    if weight is None:
        return dot
    return dot * (weight if channel is None else weight.view(-1, *[1] * (dot.ndim - channel - 1)))


def _fits(x: Any, *others: Any) -> bool:
    return is_dual(x) and not any(map(is_dual, others))


def _layer_norm(out, input, normalized_shape, weight=None, bias=None, eps=1e-5, *unused, **also_unused):
    if not _fits(input, weight, bias):
        return NotImplemented
    x, dot = input.value.to(out.dtype), input.dot.to(out.dtype)
    _, mean, rstd = _ATEN.native_layer_norm(x, normalized_shape, None, None, eps)
    dot = _ATEN.native_layer_norm_backward(dot, x, normalized_shape, mean, rstd, None, None, ONLY_INPUT)[0]
    return _weighted(dot, weight)


def _group_norm(out, input, num_groups, weight=None, bias=None, eps=1e-5, *unused, **also_unused):
    if not _fits(input, weight, bias):
        return NotImplemented
    x, dot = (part.to(out.dtype).contiguous() for part in input)
    if not out.numel():  # PyTorch's parts of the norm take no empty tensors
        return dot
    sizes = *x.shape[:2], x[0, 0].numel(), num_groups
    _, mean, rstd = _ATEN.native_group_norm(x, None, None, *sizes, eps)
    dot = _ATEN.native_group_norm_backward(dot, x, mean, rstd, None, *sizes, ONLY_INPUT)[0]
    return _weighted(dot, weight, channel=1)


def _rms_norm(out, input, normalized_shape, weight=None, eps=None):
    if not _fits(input, weight):
        return NotImplemented
    x, dot = (part.to(out.dtype) for part in input)
    dims = list(range(-len(normalized_shape), 0))
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return _weighted(_standardised(x, dot, dims, eps, centred=False), weight)


def _standardised(x: Tensor, dot: Tensor, dims: list[int], eps: float, *, centred: bool = True) -> Tensor:
    """The tangent of (x - mean) / sqrt(var + eps), or of x / sqrt(mean(x^2) + eps)."""
    x, dot = (part.to(accumulating(part.dtype)) for part in (x, dot))
    if centred:
        x, dot = x - x.mean(dims, keepdim=True), dot - dot.mean(dims, keepdim=True)
    rstd = (x.square().mean(dims, keepdim=True) + eps).rsqrt()
    n = x * rstd
    return rstd * (dot - n * (n * dot).mean(dims, keepdim=True))


def _variance(out, x, dim=None, unbiased=True, keepdim=False, correction=None):
    """2 sum((x - mean) x_dot) / (n - correction), where var sums n numbers."""
    if isinstance(dim, bool):
        dim, unbiased = None, dim
    dim = None if dim in ([], ()) else dim
    correction = int(unbiased) if correction is None else correction
    if x.value.is_complex() or not out.numel() or x.value.numel() <= correction * out.numel():
        return NotImplemented
    centred = x.value - x.value.mean(dim, keepdim=True)
    return (centred * x.dot).sum(dim, keepdim=keepdim) * (2 / (x.value.numel() / out.numel() - correction))


def _deviation(out, x, *args, **kwargs):
    """var_dot / (2 sqrt(var)); zero where nothing deviates."""
    variance = _variance(out, x, *args, **kwargs)
    return variance if variance is NotImplemented else (variance / (2 * out)).masked_fill(out == 0, 0)


def _vector_norm(out, x, ord=2, dim=None, keepdim=False, *, dtype=None):
    """sum(x x_dot) / sqrt(sum(x^2)); zero where x is."""
    if not is_dual(x) or type(ord) not in (int, float) or ord != 2 or x.value.is_complex() or dtype is not None:
        return NotImplemented
    x, dot, length = (part.to(accumulating(out.dtype)) for part in (*x, out))
    dim = list(range(x.ndim)) if dim is None else dim
    return ((x * dot).sum(dim, keepdim=keepdim) / length).masked_fill(out == 0, 0)


def _running_norm(function: Callable, first: int) -> Rule:
    """The rule of batch norm (first = 0) and instance norm (first = 2): dimension `first` and the spatial ones."""

    def rule(out, input, weight, bias, running_mean, running_var, by_batch, momentum, eps, cudnn_enabled):
        if not _fits(input, weight, bias, running_mean, running_var):
            check_eager(function)
            running = (None, None) if by_batch else (running_mean, running_var)  # the value has updated them
            given = input, weight, bias, *running, by_batch, momentum, eps, cudnn_enabled
            return tangents_by_torch_func(function, out, given, {})
        x, dot = (part.to(out.dtype) for part in input)
        if by_batch:
            dot = _standardised(x, dot, sorted({first, *range(2, x.ndim)}), eps)
        else:
            dot = _weighted(dot, (running_var + eps).rsqrt().to(dot.dtype), channel=1)
        return _weighted(dot, weight, channel=1)

    return rule


for _names, _rule in (
    ("layer_norm", _layer_norm),
    ("group_norm", _group_norm),
    ("rms_norm", _rms_norm),
    ("var", _variance),
    ("std", _deviation),
    ("vector_norm", _vector_norm),
    ("batch_norm", _running_norm(torch.batch_norm, 0)),
    ("instance_norm", _running_norm(torch.instance_norm, 2)),
):
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(_rule)
