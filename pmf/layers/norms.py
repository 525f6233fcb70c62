"""Norms with modulation, and the residual stream that they read."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from pmf import ops
from pmf.dual import gated_residual
from pmf.errors import require
from pmf.fields import check_flags, checked_number
from pmf.layers.base import DualModule, Weights, check_sizes, check_width
from pmf.pair import ABSENT, Dual


class Residual(NamedTuple):
    """A residual stream with a pending last branch: it stands for x + gate * branch.

    The next norm does the addition, because it reads the sum anyway.
    """

    x: Dual
    branch: Dual | None = None
    gate: Dual | None = None
    """None is one."""

    def add(self) -> Dual:
        """x + gate branch, and x_dot + gate branch_dot + gate_dot branch."""
        return self.x if self.branch is None else gated_residual(*self)


class NormModulate(DualModule):
    """Normalise, then modulate: y = (n(x) weight + bias) (1 + scale) + shift; see `ops.norm_modulate`.

    Stands for nn.RMSNorm (kind "rms") and nn.LayerNorm ("layer") with adaLN around them. `weight` and `bias` [C]
    exist with elementwise_affine and bias; eps None is nn.RMSNorm's.
    """

    def __init__(
        self, dim: int, *, kind: str = "rms", elementwise_affine: bool = False, bias: bool = False,
        eps: float | None = 1e-6, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        check_sizes("NormModulate", dim=dim)
        check_flags("NormModulate", elementwise_affine=elementwise_affine, bias=bias)
        if eps is not None:
            checked_number("NormModulate", "eps", eps, 0)
        require(kind in ("rms", "layer"), lambda: f'NormModulate: kind must be "rms" or "layer", got {kind!r}')
        require(elementwise_affine or not bias, "NormModulate: bias=True needs elementwise_affine=True")
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(dim)) if elementwise_affine else None
        self.bias = nn.Parameter(torch.zeros(dim)) if bias else None

    def forward_dual(self, x: Dual, scale: Dual = ABSENT, shift: Dual = ABSENT) -> Dual:
        """x [B, C], [B, S, C] or [B, H, W, C]; scale, shift [C], [B, C], [B, 1, C], in the shape of x, or None."""
        x = Dual.of(x)
        if self.weight is not None:
            check_width("NormModulate", "x", x, len(self.weight))
        return ops.norm_modulate(x, self.weight, scale, shift, self.bias, kind=self.kind, eps=self.eps, impl=self.impl)

    def after_residual(
        self, residual: Residual, scale: Dual = ABSENT, shift: Dual = ABSENT, *, linear: Weights | None = None,
        recompute_sum: bool = False,
    ) -> tuple[Dual, Dual]:  # fmt: skip
        """The stream with its pending branch added, and that sum normalised and modulated.

        linear, recompute_sum: see `ops.residual_norm_modulate`.
        """
        options: dict = dict(kind=self.kind, eps=self.eps, linear=linear, impl=self.impl)
        x, branch, gate = residual
        if branch is None:
            return x, ops.norm_modulate(x, self.weight, scale, shift, self.bias, **options)
        return ops.residual_norm_modulate(
            x, branch, gate, self.weight, scale, shift, self.bias, recompute_sum=recompute_sum, **options
        )
