"""Transformer blocks with the parameter names of DiT, SiT and timm, so that their state dicts load strictly."""

from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from torch import nn

from pmf import ops
from pmf.dual import chunk, dual
from pmf.fields import check_flags, checked_number
from pmf.layers.attention import Attention, Rope
from pmf.layers.base import DualModule, check_sizes, check_tokens, check_width, hidden_width
from pmf.layers.mlp import Mlp
from pmf.layers.norms import NormModulate, Residual
from pmf.ops.heads import Norm, Pairs
from pmf.pair import ABSENT, Dual


class TransformerBlock(DualModule):
    """x + gate attn(norm1(x)), then x + gate mlp(norm2(x)), of the parts that a subclass makes."""

    norm1: NormModulate
    attn: Attention
    norm2: NormModulate
    mlp: Mlp

    def halves(self, residual: Residual, modulations: Iterable[Dual | None], rope: Rope | None) -> Residual:
        """Run the block on a stream whose last branch is pending; leave the block's own MLP branch pending.

        So the addition is fused with the next block's first norm. modulations: shift, scale and gate of each half.
        """
        shift1, scale1, gate1, shift2, scale2, gate2 = modulations
        if self.light and type(self.attn).forward_dual is Attention.forward_dual:
            check_tokens("Attention", "x", residual.x, self.attn.num_heads * self.attn.head_dim)
            first, last = self.attn.weights()
            x, packed = self.norm1.after_residual(residual, scale1, shift1, linear=first)
            branch = self.attn.mix(packed, last, rope)
        else:
            x, y = self.norm1.after_residual(residual, scale1, shift1)
            branch = self.attn.forward_dual(y, rope)
        x, branch = self._transform(Residual(x, branch, gate1), scale2, shift2)
        return Residual(x, branch, gate2)

    def _transform(self, residual: Residual, scale: Dual, shift: Dual) -> tuple[Dual, Dual]:
        """The stream, and the MLP of its norm. Backward keeps x for norm1 anyway, so norm2 adds the branch again."""
        if not (self.light and type(self.mlp).forward_dual is Mlp.forward_dual):
            x, y = self.norm2.after_residual(residual, scale, shift, recompute_sum=True)
            return x, self.mlp.forward_dual(y)
        first, last = self.mlp.weights()
        x, hidden = self.norm2.after_residual(residual, scale, shift, linear=first, recompute_sum=True)
        return x, self.mlp.finish(hidden, last)


class DiTBlock(TransformerBlock):
    """A block of DiT and SiT with adaLN-Zero: x + gate attn(norm(x)), then x + gate mlp(norm(x)).

    Shift, scale and gate of both halves come from silu(condition) through a Linear that starts at zero, as the block
    does then: it is the identity. qk_norm, rope and causal are those of `Attention`.
    """

    def __init__(
        self, hidden_size: int, num_heads: int, mlp_ratio: float = 4.0, *, qkv_bias: bool = True,
        qk_norm: Norm | None = None, rope: Pairs | None = None, causal: bool = False, act: str = "gelu_tanh",
        impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        check_sizes("DiTBlock", hidden_size=hidden_size, num_heads=num_heads)
        self.dim, hidden = hidden_size, hidden_width("DiTBlock", hidden_size, mlp_ratio)
        self.norm1 = NormModulate(hidden_size, kind="layer", impl=impl)
        self.attn = Attention(
            hidden_size, num_heads, qkv_bias=qkv_bias, qk_norm=qk_norm, rope=rope, causal=causal, impl=impl
        )
        self.norm2 = NormModulate(hidden_size, kind="layer", impl=impl)
        self.mlp = Mlp(hidden_size, hidden, act=act, impl=impl)
        modulation = nn.Linear(hidden_size, 6 * hidden_size)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), modulation)
        nn.init.zeros_(modulation.weight)
        nn.init.zeros_(modulation.bias)

    def forward_residual(self, residual: Residual, condition: Dual, rope: Rope | None = None) -> Residual:
        """`halves`, with the modulations of the condition."""
        check_tokens("DiTBlock", "x", residual.x, self.dim)
        check_width("DiTBlock", "c", condition, self.dim)
        return self.halves(residual, chunk(dual(self.adaLN_modulation[1], ops.silu(condition)), 6), rope)

    def forward_dual(self, x: Dual, c: Dual, rope: Rope | None = None) -> Dual:
        """x [B, S, C] -> [B, S, C]; condition c [B, C], or per token [B, S, C]."""
        return self.forward_residual(Residual(Dual.of(x)), Dual.of(c), rope).add()


SiTBlock = DiTBlock
"""SiT's block is DiT's."""


class LayerScale(nn.Module):
    """A gate per channel, `gamma`."""

    def __init__(self, dim: int, init_values: float) -> None:
        super().__init__()
        check_sizes("LayerScale", dim=dim)
        self.gamma = nn.Parameter(torch.full((dim,), float(checked_number("LayerScale", "init_values", init_values))))


class ViTBlock(TransformerBlock):
    """timm's block of vision transformers: x + ls1 attn(norm1(x)), then x + ls2 mlp(norm2(x)).

    init_values: that of the layer scales `ls1` and `ls2`; None: there are none. Norms are nn.LayerNorms.
    """

    def __init__(
        self, dim: int, num_heads: int, mlp_ratio: float = 4.0, qkv_bias: bool = False, qk_norm: bool = False,
        *, proj_bias: bool = True, init_values: float | None = None, act: str = "gelu", rope: Pairs | None = None,
        eps: float = 1e-6, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        check_sizes("ViTBlock", dim=dim, num_heads=num_heads)
        check_flags("ViTBlock", qk_norm=qk_norm)
        self.dim, hidden = dim, hidden_width("ViTBlock", dim, mlp_ratio)
        affine = dict(elementwise_affine=True, bias=True)
        norm = functools.partial(NormModulate, dim, kind="layer", **affine, eps=eps, impl=impl)
        self.norm1 = norm()
        self.attn = Attention(
            dim, num_heads, qkv_bias=qkv_bias, qk_norm="layer" if qk_norm else None, eps=eps, rope=rope,
            proj_bias=proj_bias, impl=impl,
        )  # fmt: skip
        self.ls1 = None if init_values is None else LayerScale(dim, init_values)
        self.norm2 = norm()
        self.mlp = Mlp(dim, hidden, act=act, impl=impl)
        self.ls2 = None if init_values is None else LayerScale(dim, init_values)

    def forward_residual(self, residual: Residual, rope: Rope | None = None) -> Residual:
        """`halves`, with the layer scales as gates."""
        check_tokens("ViTBlock", "x", residual.x, self.dim)
        gate1, gate2 = (None if scale is None else Dual(scale.gamma) for scale in (self.ls1, self.ls2))
        return self.halves(residual, (ABSENT, ABSENT, gate1, ABSENT, ABSENT, gate2), rope)

    def forward_dual(self, x: Dual, rope: Rope | None = None) -> Dual:
        """x [B, S, C] -> [B, S, C]."""
        return self.forward_residual(Residual(Dual.of(x)), rope).add()
