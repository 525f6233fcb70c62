"""The layers of pMF as nn.Modules: `forward` for values, `forward_dual` for values and tangents.

Each layer is written once, as `forward_dual` on `Dual`s; `forward` calls it without tangents.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import ops
from pmf.config import ModelConfig
from pmf.errors import InputError
from pmf.packing import Join, PackedModule
from pmf.pair import ABSENT, Dual, tail, total
from pmf.tangents.carriers import CARRIERS, as_dual, carrier_of, moves
from pmf.wide import wide_linear

BLOCK_GAIN = 0.32
"""The Linear weights of blocks are initialised from N(0, BLOCK_GAIN^2 / fan_in)."""


Rope = tuple[Tensor, Tensor]
"""cos and sin of the patch tokens' rotary angles, [N, D / 2] each, from `ops.rope_tables`."""


def _chunk(x: Dual, parts: int) -> tuple[Dual, ...]:
    """Equal parts of the last dimension."""
    dots = (None,) * parts if x.dot is None else x.dot.chunk(parts, -1)
    return tuple(Dual(*pair) for pair in zip(x.value.chunk(parts, -1), dots, strict=True))


def linear_dual(
    x: Dual, weight: Tensor, bias: Tensor | None = None, *, linear: Callable[..., Tensor] = F.linear
) -> Dual:
    """x W^T + b, and x_dot W^T: two products, so that backward keeps no tangent alive."""
    value = linear(x.value, weight, bias)
    if x.dot is None:
        return Dual(value)
    with torch.no_grad():
        return Dual(value, linear(x.dot, weight))


def _dual(given: Any) -> Any:
    """Wrap a tensor or None in a `Dual`, without tangent unless it moves; return anything else unchanged."""
    return as_dual(given) if given is None or type(given) in CARRIERS or isinstance(given, Tensor) else given


class DualModule(nn.Module):
    """A layer whose `forward(*values)` is `forward_dual` without tangents."""

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


class Linear(PackedModule, nn.Linear):
    """torch.nn.Linear with a tangent; weights drawn from N(0, gain^2 / fan_in), bias 0."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool = False, gain: float = 1.0):
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
        (weight,) = self.packed()
        return linear_dual(x, weight, self.bias, linear=wide_linear)


class Residual(NamedTuple):
    """A residual stream with a pending last branch: it stands for x + gate * branch.

    The next norm does the addition, because it reads the sum anyway.
    """

    x: Dual
    branch: Dual | None = None
    gate: Dual | None = None

    def add(self) -> Dual:
        """x + gate branch, and x_dot + gate branch_dot + gate_dot branch."""
        x, branch = self.x, self.branch
        gate = self.gate.map(lambda g: g[:, None] if g.ndim == 2 else g)
        value = x.value + gate.value * branch.value
        with torch.no_grad():
            dot = total(
                x.dot,
                None if branch.dot is None else _last(gate.value, branch.dot) * branch.dot,
                None if gate.dot is None else _last(branch.value, gate.dot) * gate.dot,
            )
        return Dual(value, dot).map(lambda part: part.to(x.value.dtype))


def _last(value: Tensor, like: Tensor) -> Tensor:
    """The samples of `value` that `like` covers; a per-channel value is shared by all samples."""
    return value if value.ndim == 1 else tail(value, like.shape[0])


class NormModulate(DualModule):
    """Normalise with a learned per-channel weight, then modulate per sample; see `ops.norm_modulate`."""

    def __init__(self, width: int, *, kind: str = "rms", eps: float = 1e-6, impl: str | None = None):
        super().__init__(impl)
        self.kind, self.eps = kind, eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward_dual(self, x: Dual, scale: Dual = ABSENT, shift: Dual = ABSENT) -> Dual:
        """n(x) weight (1 + scale) + shift: x [B, S, C]; scale, shift [B, C] or absent."""
        return ops.norm_modulate(x, self.weight, scale, shift, kind=self.kind, eps=self.eps, impl=self.impl)

    def after_residual(self, residual: Residual, scale: Dual = ABSENT, shift: Dual = ABSENT) -> tuple[Dual, Dual]:
        """The stream with its pending branch added, and that sum normalised and modulated."""
        if residual.branch is None:
            return residual.x, self.forward_dual(residual.x, scale, shift)
        x, branch, gate = residual
        return ops.residual_norm_modulate(
            x, branch, gate, self.weight, scale, shift, kind=self.kind, eps=self.eps, impl=self.impl
        )


class ScalarEmbedder(DualModule):
    """A scalar [B] as a vector [B, C]: 256 sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(256, width, bias=True)
        self.fc2 = Linear(width, width, bias=True)

    def forward_dual(self, s: Dual) -> Dual:
        """The embedding of s, and its tangent."""
        features = ops.scalar_features(s).map(lambda x: x.to(self.fc1.weight.dtype))
        return self.fc2.forward_dual(ops.silu(self.fc1.forward_dual(features)))


class ScalarEmbedders(PackedModule, nn.ModuleDict):
    """One `ScalarEmbedder` per named scalar [B]; all of them are computed by the same few products."""

    def __init__(self, names: Sequence[str], width: int) -> None:
        super().__init__({name: ScalarEmbedder(width) for name in names})

    def joins(self) -> tuple[Join, ...]:
        """The embedders' fc1 weights, from the last embedder to the first, their fc1 biases, then the same of fc2."""
        embedders = list(self.values())[::-1]
        layers = [[e.fc1 for e in embedders], [e.fc2 for e in embedders]]
        return tuple(Join.of(*(getattr(fc, name) for fc in same)) for same in layers for name in ("weight", "bias"))

    def forward_dual(self, *scalars: Dual) -> tuple[Dual, ...]:
        """The embeddings, in the order of the names. Only the first scalar may have a tangent."""
        # Tangents cover the last rows, so the first scalar, which may have one, is put last.
        weight1, bias1, weight2, bias2 = self.packed()
        values, dot = torch.cat([s.value for s in reversed(scalars)]), scalars[0].dot
        features = ops.scalar_features(Dual(values, dot)).map(lambda x: x.to(weight1.dtype))
        embedded = self._each(ops.silu(self._each(features, weight1, bias1)), weight2, bias2)
        first, *others = reversed(embedded.value.chunk(len(scalars)))
        return Dual(first, embedded.dot), *map(Dual, others)

    def _each(self, x: Dual, weight: Tensor, bias: Tensor) -> Dual:
        """One Linear per scalar, on that scalar's part of x [n B, C]; the tangent belongs to the last part."""
        kinds = len(self)
        weight, bias = weight.unflatten(0, (kinds, -1)), bias.unflatten(0, (kinds, 1, -1))
        value = torch.baddbmm(bias, x.value.unflatten(0, (kinds, -1)), weight.mT).flatten(0, 1)
        if x.dot is None:
            return Dual(value)
        with torch.no_grad():
            return Dual(value, F.linear(x.dot, weight[-1]))


class PatchEmbed(DualModule):
    """Images to tokens: a p x p convolution to the bottleneck, a 1 x 1 one to the width, and learned positions."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        self.proj1 = nn.Conv2d(config.in_channels, config.bottleneck, config.patch_size, stride=config.patch_size)
        self.proj2 = nn.Conv2d(config.bottleneck, config.hidden_size, 1)
        self.positions = nn.Parameter(torch.empty(config.sequence_length, config.hidden_size))
        for conv in (self.proj1, self.proj2):
            nn.init.xavier_uniform_(conv.weight.flatten(1))
            nn.init.zeros_(conv.bias)
        nn.init.normal_(self.positions, std=0.02)

    def forward_dual(self, images: Dual, prefix: Dual = ABSENT) -> Dual:
        """[prefix, patches] + positions: images [B, c, H, W], prefix [B, P, C] -> [B, S, C]."""
        first, second = self.proj1, self.proj2
        return ops.patch_embed(
            images, first.weight, first.bias, second.weight, second.bias, self.positions, prefix, impl=self.impl
        )


class Attention(DualModule, PackedModule):
    """Multi-head self-attention with normalised q and k and 2-D rotary positions; no biases."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width = config.hidden_size
        self.num_heads, self.prefix_length = config.num_heads, config.prefix_length
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (Linear(width, width, gain=BLOCK_GAIN) for _ in range(4))
        self.q_norm = nn.RMSNorm(config.head_dim, eps=1e-6)
        self.k_norm = nn.RMSNorm(config.head_dim, eps=1e-6)

    def joins(self) -> tuple[Join, ...]:
        """One weight for q, k and v, and the output weight."""
        return Join.of(self.q_proj.weight, self.k_proj.weight, self.v_proj.weight), Join.of(self.out_proj.weight)

    def forward_dual(self, x: Dual, rope: Rope) -> Dual:
        """x [B, S, C] -> [B, S, C]."""
        weight, out = self.packed()
        packed = linear_dual(x, weight).map(lambda p: p.unflatten(-1, (3, self.num_heads, -1)))
        q, k, v = ops.qk_norm_rope(
            packed,
            self.q_norm.weight,
            self.k_norm.weight,
            *rope,
            prefix_length=self.prefix_length,
            eps=self.q_norm.eps,
            impl=self.impl,
        )
        mixed = ops.attention(q, k, v, impl=self.impl)
        return linear_dual(mixed.map(lambda o: o.flatten(2)), out)


class SwiGLU(DualModule, PackedModule):
    """w2(silu(w1 x) * w3 x), no biases."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width, hidden = config.hidden_size, config.mlp_width
        self.w1 = Linear(width, hidden, gain=BLOCK_GAIN)
        self.w3 = Linear(width, hidden, gain=BLOCK_GAIN)
        self.w2 = Linear(hidden, width, gain=BLOCK_GAIN)

    def joins(self) -> tuple[Join, ...]:
        """One weight for w1 and w3, and w2, with the hidden width padded with zeros to a multiple of 8.

        The zeros keep every row 16-byte aligned and do not change the result.
        """
        hidden, width = self.w1.weight.shape
        hidden += -hidden % 8
        return Join((self.w1.weight, self.w3.weight), (hidden, width)), Join((self.w2.weight,), (width, hidden))

    def forward_dual(self, x: Dual) -> Dual:
        """x [B, S, C] -> [B, S, C]."""
        w13, w2 = self.packed()
        return linear_dual(ops.swiglu(linear_dual(x, w13), impl=self.impl), w2)


class Block(DualModule):
    """One transformer block: x + gate attn(norm(x)), then x + gate mlp(norm(x)).

    in_context: the gates are learned per channel and start at zero. adaln: shift, scale and gate of
    both halves come from the conditioning vector through a Linear that starts at zero.
    """

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width = config.hidden_size
        self.norm1 = NormModulate(width, impl=impl)
        self.attn = Attention(config, impl)
        self.norm2 = NormModulate(width, impl=impl)
        self.mlp = SwiGLU(config, impl)
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
        return _chunk(self.modulation.forward_dual(condition), 6)

    def forward_residual(self, residual: Residual, rope: Rope, condition: Dual = ABSENT) -> Residual:
        """Run the block on a stream whose last branch is pending; leave the block's own MLP branch pending."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self._modulations(condition)
        x, y = self.norm1.after_residual(residual, scale1, shift1)
        residual = Residual(x, self.attn.forward_dual(y, rope), gate1)
        x, y = self.norm2.after_residual(residual, scale2, shift2)
        return Residual(x, self.mlp.forward_dual(y), gate2)

    def forward_dual(self, x: Dual, rope: Rope, condition: Dual = ABSENT) -> Dual:
        """x [B, S, C] -> [B, S, C]; condition [B, C] under adaln."""
        return self.forward_residual(Residual(x), rope, condition).add()


class FinalLayer(DualModule):
    """Norm and a zero-initialised Linear to the p * p * c values of each patch, in float32 at least."""

    def __init__(self, config: ModelConfig, impl: str | None = None) -> None:
        super().__init__(impl)
        width = config.hidden_size
        self.prefix_length = config.prefix_length
        self.norm = NormModulate(width, impl=impl)
        self.linear = WideLinear(width, config.patch_values, bias=True, gain=0.0)
        if config.conditioning == "adaln":
            self.modulation = Linear(width, 2 * width, bias=True, gain=0.0)

    def forward_residual(self, residual: Residual, condition: Dual = ABSENT) -> Dual:
        """The patch tokens' predictions [B, N, p * p * c] of a stream whose last branch is pending."""
        shift = scale = ABSENT
        if condition.value is not None:
            shift, scale = _chunk(self.modulation.forward_dual(condition), 2)
        _, y = self.norm.after_residual(residual, scale, shift)
        return self.linear.forward_dual(y.map(lambda tokens: tokens[:, self.prefix_length :]))

    def forward_dual(self, x: Dual, condition: Dual = ABSENT) -> Dual:
        """x [B, S, C] -> [B, N, p * p * c]."""
        return self.forward_residual(Residual(x), condition)
