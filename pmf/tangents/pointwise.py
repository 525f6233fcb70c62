"""Rules of pointwise functions, y_dot = f'(x) x_dot, and of softmax.

A pointwise function's Jacobian is diagonal, hence symmetric: the fused kernel that computes its gradient, f'(x) dy,
computes its tangent as well.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from pmf.pair import total
from pmf.tangents.handlers import by_torch_func, drawn, eager_only, ruled
from pmf.tangents.rules import HANDLERS, Handler, Rule, argument, is_dual, linear_in_first, named, plain

_ATEN = torch.ops.aten


def _cast(x: Any, out: Tensor) -> tuple[Tensor, Tensor]:
    """Value and tangent in the dtype of the output, in which autocast computes."""
    return x.value.to(out.dtype), x.dot.to(out.dtype)


def _by_input(derivative: Callable[..., Tensor]) -> Rule:
    """The rule from `derivative(x_dot, x, *args)`."""

    def rule(out, x, *args, **kwargs):
        if x.value.is_complex():
            return NotImplemented
        value, dot = _cast(x, out)
        return derivative(dot, value, *args, **kwargs)

    return rule


def _by_output(derivative: Callable[[Tensor, Tensor], Tensor]) -> Rule:
    """The rule from `derivative(x_dot, y)`."""

    def rule(out, x, *args, **kwargs):
        return NotImplemented if x.value.is_complex() else derivative(x.dot.to(out.dtype), out)

    return rule


def _gelu(dot: Tensor, x: Tensor, approximate: str = "none") -> Tensor:
    return _ATEN.gelu_backward(dot, x, approximate=approximate)


def _softplus(dot: Tensor, x: Tensor, beta: float = 1, threshold: float = 20) -> Tensor:
    return _ATEN.softplus_backward(dot, x, beta, threshold)


def _leaky_relu(dot: Tensor, x: Tensor, negative_slope: float = 0.01) -> Tensor:
    return _ATEN.leaky_relu_backward(dot, x, negative_slope, False)


def _elu(dot: Tensor, x: Tensor, alpha: float = 1, scale: float = 1, input_scale: float = 1) -> Tensor:
    return _ATEN.elu_backward(dot, alpha, scale, input_scale, False, x)


def _celu(dot: Tensor, x: Tensor, alpha: float = 1) -> Tensor:
    return _elu(dot, x, alpha, 1, 1 / alpha)


def _hardtanh(dot: Tensor, x: Tensor, min_val: float = -1, max_val: float = 1) -> Tensor:
    return _ATEN.hardtanh_backward(dot, x, min_val, max_val)


BY_INPUT: dict[str, Callable[..., Tensor]] = {
    "silu": _ATEN.silu_backward,
    "gelu": _gelu,
    "softplus": _softplus,
    "leaky_relu": _leaky_relu,
    "hardswish": _ATEN.hardswish_backward,
    "hardsigmoid": _ATEN.hardsigmoid_backward,
    "mish": _ATEN.mish_backward,
    "elu": _elu,
    "celu": _celu,
    "selu": lambda dot, x: _elu(dot, x, 1.6732632423543772, 1.0507009873554805),
    "hardtanh": _hardtanh,
    "relu6": lambda dot, x: _hardtanh(dot, x, 0, 6),
    "log_sigmoid": lambda dot, x: dot * (-x).sigmoid(),
    "sin": lambda dot, x: dot * x.cos(),
    "cos": lambda dot, x: -dot * x.sin(),
    "sinh": lambda dot, x: dot * x.cosh(),
    "cosh": lambda dot, x: dot * x.sinh(),
    "asin arcsin": lambda dot, x: dot * (1 - x * x).rsqrt(),
    "acos arccos": lambda dot, x: -dot * (1 - x * x).rsqrt(),
    "atan arctan": lambda dot, x: dot / (x * x + 1),
    "erf": lambda dot, x: dot * (2 / math.sqrt(math.pi) * (-x * x).exp()),
    "erfc": lambda dot, x: -dot * (2 / math.sqrt(math.pi) * (-x * x).exp()),
    "log": lambda dot, x: dot / x,
    "log1p": lambda dot, x: dot / (x + 1),
    "log2": lambda dot, x: dot / (x * math.log(2)),
    "log10": lambda dot, x: dot / (x * math.log(10)),
    "square": lambda dot, x: 2 * x * dot,
    "frac": lambda dot, x: dot.clone(),
    "abs absolute": lambda dot, x: dot * x.sgn(),
    "sgn": lambda dot, x: torch.zeros_like(dot),
}
BY_OUTPUT: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "sigmoid expit": _ATEN.sigmoid_backward,
    "tanh": _ATEN.tanh_backward,
    "relu": lambda dot, y: _ATEN.threshold_backward(dot, y, 0),
    "tan": lambda dot, y: dot * (y * y + 1),
    "exp": lambda dot, y: dot * y,
    "expm1": lambda dot, y: dot * (y + 1),
    "exp2": lambda dot, y: dot * (y * math.log(2)),
    "sqrt": lambda dot, y: dot / (2 * y),
    "rsqrt": lambda dot, y: -0.5 * dot * y**3,
    "reciprocal": lambda dot, y: -dot * y * y,
}
for _names, _by_x in BY_INPUT.items():
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(_by_input(_by_x))
for _names, _by_y in BY_OUTPUT.items():
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(_by_output(_by_y))


def _clamp(out, x, min=None, max=None):
    """x_dot where min <= x <= max."""
    if not is_dual(x) or is_dual(min) or is_dual(max):
        return NotImplemented
    value, dot = _cast(x, out)
    for bound, within in ((min, torch.ge), (max, torch.le)):
        dot = dot if bound is None else torch.where(within(value, bound), dot, 0)
    return dot


def _addcmul(out, x, a, b, *, value=1):
    """x_dot + value (a_dot b + a b_dot)."""
    if is_dual(value):
        return NotImplemented
    product = total(a.dot * plain(b) if is_dual(a) else None, plain(a) * b.dot if is_dual(b) else None)
    return total(x.dot if is_dual(x) else None, None if product is None else value * product)


def _power(out, x, exponent=None, **kwargs):
    """n x^(n - 1) x_dot for a number n."""
    if not is_dual(x) or type(exponent) not in (int, float) or out.is_complex():
        return NotImplemented
    if exponent == 0:
        return torch.zeros_like(out)
    value, dot = _cast(x, out)
    return exponent * dot * value ** (exponent - 1)


def _softmax(out, x, dim, dtype=None, **kwargs):
    """y (x_dot - sum(y x_dot))."""
    weighted = out * x.dot.to(out.dtype)
    return weighted - out * weighted.sum(dim, keepdim=True)


def _log_softmax(out, x, dim, dtype=None, **kwargs):
    """x_dot - sum(softmax x_dot)."""
    dot = x.dot.to(out.dtype)
    return dot - (out.exp() * dot).sum(dim, keepdim=True)


def _glu(out, x, dim=-1):
    """a_dot s + a s (1 - s) b_dot for the halves a, b of x and s = sigmoid(b)."""
    if not is_dual(x):
        return NotImplemented
    (a, b), (a_dot, b_dot) = (part.to(out.dtype).chunk(2, dim) for part in x)
    s = b.sigmoid()
    return a_dot * s + _ATEN.sigmoid_backward(a * b_dot, s)


for _names, _rule in (
    ("pow __pow__", _power),
    ("softmax", _softmax),
    ("log_softmax", _log_softmax),
    ("glu", _glu),
    ("clamp clip clamp_min", _clamp),
    ("clamp_max", lambda out, x, max: _clamp(out, x, None, max)),
    ("addcmul", _addcmul),
):
    for _function in named(*_names.split()):
        HANDLERS[_function] = ruled(_rule)


def _dropout(function: Callable, eager: Handler, traced: Handler) -> Handler:
    """Without training, or of nothing, a dropout is the identity, which returns its input."""
    without = ruled(linear_in_first(function))

    def handle(dropout, args, kwargs):
        if not (argument(args, kwargs, (2, "train")) and argument(args, kwargs, (1, "p")) > 0):
            return without(dropout, args, kwargs)
        if torch.compiler.is_compiling():
            return traced(dropout, args, kwargs)
        return (eager if argument(args, kwargs, (0, "input")).numel() else without)(dropout, args, kwargs)

    return handle


def _masked(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Dropout by a mask that is drawn once and multiplied with: compilers would draw another for the tangent."""
    x, p = argument(args, kwargs, (0, "input")), argument(args, kwargs, (1, "p"))
    kept = function(torch.ones_like(x.value), p, True).bool()
    return (x * kept) * (1 / (1 - p) if p < 1 else 0)


for _function in named("dropout", "feature_dropout"):  # linear, given the mask that they draw
    HANDLERS[_function] = _dropout(_function, drawn(linear_in_first(_function)), _masked)


def _rrelu(function: Callable, args: tuple, kwargs: dict) -> Any:
    """Leaky ReLU with slopes that are drawn in training."""
    draws = argument(args, kwargs, (3, "training"))
    return (eager_only if draws else by_torch_func)(function, args, kwargs)


for _function in named("rrelu"):
    HANDLERS[_function] = _rrelu
for _function in named("alpha_dropout", "feature_alpha_dropout"):
    HANDLERS[_function] = _dropout(_function, by_torch_func, eager_only)
