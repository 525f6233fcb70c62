"""The blocks of the pMF network: `pmf.layers` with the published shapes and initialisation."""

from __future__ import annotations

import functools

import torch
from torch import nn

from pmf.config import ModelConfig
from pmf.dual import chunk
from pmf.layers import (
    DualModule,
    Linear,
    Mlp,
    NormModulate,
    Residual,
    Rope,
    SeparateAttention,
    TransformerBlock,
    WideLinear,
)
from pmf.pair import ABSENT, Dual

BLOCK_GAIN = 0.32
"""The Linear weights of blocks are initialised from N(0, BLOCK_GAIN^2 / fan_in)."""


class Block(TransformerBlock):
    """One transformer block: x + gate attn(norm(x)), then x + gate mlp(norm(x)).

    in_context: the gates are learned per channel and start at zero. adaln: shift, scale and gate of
    both halves come from the conditioning vector through a Linear that starts at zero.
    """

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width = config.hidden_size
        linear = functools.partial(Linear, gain=BLOCK_GAIN)
        self.norm1 = NormModulate(width, elementwise_affine=True, impl=impl)
        self.attn = SeparateAttention(
            width, config.num_heads, qk_norm="rms", rope="adjacent", prefix_length=config.prefix_length,
            proj_bias=False, linear=linear, impl=impl,
        )  # fmt: skip
        self.norm2 = NormModulate(width, elementwise_affine=True, impl=impl)
        self.mlp = Mlp(width, config.mlp_width, act="swiglu", bias=False, linear=linear, impl=impl)
        if config.conditioning == "adaln":
            self.modulation = Linear(width, 6 * width, bias=True, gain=0.0)
        else:
            self.attn_scale = nn.Parameter(torch.zeros(width))
            self.mlp_scale = nn.Parameter(torch.zeros(width))

    def _modulations(self, condition: Dual) -> tuple[Dual, ...]:
        """(shift, scale, gate) of attention and of the MLP."""
        if condition.value is None:
            # The pending branch leaves the block with its gate. FSDP may free the parameter then, so pass on a copy.
            gate = self.mlp_scale if self.mlp.held else self.mlp_scale.clone()
            return ABSENT, ABSENT, Dual(self.attn_scale), ABSENT, ABSENT, Dual(gate)
        return chunk(self.modulation.forward_dual(condition), 6)

    def forward_residual(self, residual: Residual, rope: Rope, condition: Dual = ABSENT) -> Residual:
        """`halves`, with the gates of the block or the modulations of the condition."""
        return self.halves(residual, self._modulations(condition), rope)

    def forward_dual(self, x: Dual, rope: Rope, condition: Dual = ABSENT) -> Dual:
        """x [B, S, C] -> [B, S, C]; condition [B, C] under adaln."""
        return self.forward_residual(Residual(Dual.of(x)), rope, Dual.of(condition)).add()


class FinalLayer(DualModule):
    """Norm and a zero-initialised Linear to the p * p * c values of each patch, in float32 at least."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width = config.hidden_size
        self.prefix_length = config.prefix_length
        self.norm = NormModulate(width, elementwise_affine=True, impl=impl)
        self.linear = WideLinear(width, config.patch_values, bias=True, gain=0.0)
        if config.conditioning == "adaln":
            self.modulation = Linear(width, 2 * width, bias=True, gain=0.0)

    def forward_residual(self, residual: Residual, condition: Dual = ABSENT) -> Dual:
        """The patch tokens' predictions [B, N, p * p * c] of a stream whose last branch is pending."""
        shift = scale = ABSENT
        if condition.value is not None:
            shift, scale = chunk(self.modulation.forward_dual(condition), 2)
        _, y = self.norm.after_residual(residual, scale, shift)
        return self.linear.forward_dual(y.map(lambda tokens: tokens[:, self.prefix_length :]))

    def forward_dual(self, x: Dual, condition: Dual = ABSENT) -> Dual:
        """x [B, S, C] -> [B, N, p * p * c]."""
        return self.forward_residual(Residual(Dual.of(x)), Dual.of(condition))
