"""`DualModule`, on which all layers with tangents are built, and Linear layers."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from pmf.dual import acts_as, linear_dual
from pmf.errors import InputError, require
from pmf.fields import checked_integer, checked_number
from pmf.packing import Join, PackedModule
from pmf.pair import Dual
from pmf.pair import Weights as Weights
from pmf.private import hooked
from pmf.tangents.carriers import CARRIERS, as_dual, carrier_of, moves
from pmf.wide import wide_linear

Linears = Callable[..., nn.Linear]
"""Makes a Linear layer from (in_features, out_features, bias=...), such as nn.Linear itself."""


def check_linear(owner: str, *layers: nn.Module) -> None:
    """Errors: `InputError` on a layer whose weight and bias alone are not what it computes, such as an adapter.

    Hooks, which tools that watch every module set, are only warned of.
    """
    for layer in layers:
        if not acts_as(layer, nn.Linear, hooks=True):
            own = " with a forward of its own" if isinstance(layer, nn.Linear) else ""
            raise InputError(f"{owner}: projections must be nn.Linear layers, got {type(layer).__name__}{own}")
    warn_of_hooks(owner, *layers)


def warn_of_hooks(owner: str, *parts: nn.Module) -> None:
    """Warn of hooks of parts whose weights alone are read."""
    if any(map(hooked, parts)) and not torch.compiler.is_compiling():
        warnings.warn(f"{owner}: hooks of its parts do not run, because their weights alone are read", stacklevel=2)


def check_tokens(owner: str, name: str, x: Dual, width: int) -> None:
    """Errors: `InputError` unless x is [B, S, width]."""
    shape = x.value.shape if isinstance(x.value, Tensor) else None
    if shape is None or len(shape) != 3 or shape[2] != width:
        got = type(x.value).__name__ if shape is None else list(shape)
        raise InputError(f"{owner}: {name} must be a tensor [B, S, {width}], got {got}")


def check_width(owner: str, name: str, x: Dual, width: int) -> None:
    """Errors: `InputError` unless x is [..., width]."""
    shape = x.value.shape if isinstance(x.value, Tensor) else None
    if shape is None or len(shape) == 0 or shape[-1] != width:
        got = type(x.value).__name__ if shape is None else list(shape)
        raise InputError(f"{owner}: {name} must be a tensor [..., {width}], got {got}")


def check_sizes(owner: str, **sizes: int) -> None:
    """Errors: `InputError` on a size that is no positive integer."""
    for name, size in sizes.items():
        checked_integer(owner, name, size)


def hidden_width(owner: str, dim: int, mlp_ratio: float) -> int:
    """The hidden width of a block's MLP. Errors: `InputError` on a ratio that leaves none."""
    hidden = int(dim * checked_number(owner, "mlp_ratio", mlp_ratio))
    require(hidden > 0, lambda: f"{owner}: mlp_ratio must give a hidden width of at least 1, got {mlp_ratio}")
    return hidden


def _dual(given: Any) -> Any:
    """A floating tensor or None as a `Dual`, without tangent unless it moves; anything else unchanged."""
    if given is None or type(given) in CARRIERS:
        return as_dual(given)
    return Dual(given) if isinstance(given, Tensor) and given.is_floating_point() else given


class DualModule(nn.Module):
    """A layer whose `forward(*values)` is `forward_dual` without tangents.

    `forward_dual` takes tensors, pairs (value, tangent) and Duals; `forward` tensors.
    """

    light = False
    """Whether backward makes again what a kernel can make from what is kept anyway; see `keep_less`."""

    def __init__(self, impl: str | None = None) -> None:
        super().__init__()
        self.impl = impl

    def forward(self, *inputs, **named):
        """`forward_dual` of the same inputs without tangents; returns only the value. Inside `pmf.jvp` values move.

        Errors: `InputError` on an input with a tangent.
        """
        result = self.forward_dual(*map(_dual, inputs), **{name: _dual(given) for name, given in named.items()})
        if moves([*inputs, *named.values()]):
            return carrier_of(result)
        if result.dot is not None:
            raise InputError(f"{type(self).__name__}: forward takes values only, got a tangent; use forward_dual")
        return result.value


def keep_less(network: nn.Module, less: bool = True) -> None:
    """Let the layers of `pmf.layers` in a network keep less for backward; with `less` False, as much as before.

    Backward then makes the results of MLPs' functions, the normalised queries and keys of self-attention and, in every
    `TransformerBlock`, the results of norms again from what is kept anyway. It repeats no product of the network, no
    attention and no tangent. Cross-attention, and the norms of `BasicTransformerBlock`, keep what they kept.
    Errors: `InputError` on a network without such layers.
    """
    found = [m for m in network.modules() if isinstance(m, DualModule)] if isinstance(network, nn.Module) else []
    require(
        bool(found), lambda: f"keep_less: expected a network with layers of pmf.layers, got {type(network).__name__}"
    )
    for module in found:
        module.light = less


class Linear(PackedModule, nn.Linear):
    """torch.nn.Linear with a tangent; weights drawn from N(0, gain^2 / fan_in), bias 0."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, gain: float = 1.0):
        check_sizes(type(self).__name__, in_features=in_features, out_features=out_features)
        self.gain = gain
        super().__init__(in_features, out_features, bias=bias)

    def reset_parameters(self) -> None:
        """Draw the weights."""
        nn.init.normal_(self.weight, std=self.gain / math.sqrt(self.in_features))
        if self.bias is not None:
            nn.init.zeros_(self.bias)

    def joins(self) -> tuple[Join, ...]:
        """Weight and bias."""
        return tuple(Join.of(parameter) for parameter in (self.weight, self.bias) if parameter is not None)

    def forward_dual(self, x: Dual) -> Dual:
        """x W^T + b, and its tangent."""
        x = Dual.of(x)
        check_width("Linear", "x", x, self.in_features)
        return linear_dual(x, *self.packed())


class WideLinear(Linear):
    """A Linear whose result is at least float32: the product is not rounded, and autocast does not cast the bias."""

    def joins(self) -> tuple[Join, ...]:
        """Only the weight; the bias is added without a cast."""
        return (Join.of(self.weight),)

    def forward(self, x: Tensor) -> Tensor:
        """x W^T + b."""
        return carrier_of(self.forward_dual(as_dual(x)))

    def forward_dual(self, x: Dual) -> Dual:
        """x W^T + b, and x_dot W^T."""
        x = Dual.of(x)
        check_width("WideLinear", "x", x, self.in_features)
        (weight,) = self.packed()
        return linear_dual(x, weight, self.bias, linear=wide_linear)
