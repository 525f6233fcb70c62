"""Two networks as MeanFlow scripts write them, u = network(z, t, r), in plain PyTorch; the DiT also with duals."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import Dual, ops
from pmf.dual import add, chunk, dual, gated_residual

FREQUENCIES = 128


class Embedding(nn.Module):
    """A scalar [B] as a vector [B, C]: sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(2 * FREQUENCIES, width), nn.Linear(width, width)

    def forward(self, s: Tensor) -> Tensor:
        """s [B] -> [B, C]."""
        index = torch.arange(FREQUENCIES, device=s.device, dtype=s.dtype)
        angle = s[:, None] * torch.exp(-math.log(10000) / FREQUENCIES * index)
        return self.fc2(F.silu(self.fc1(torch.cat([angle.cos(), angle.sin()], -1))))

    def forward_dual(self, s: Dual) -> Dual:
        """The embedding of s, and its tangent."""
        return dual(self.fc2, ops.silu(dual(self.fc1, ops.scalar_features(s))))


class Block(nn.Module):
    """A DiT block with adaLN: shift, scale and gate of attention and of the MLP come from the condition."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation = nn.Linear(width, 6 * width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, S, C], condition [B, C] -> [B, S, C]."""
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(condition)[:, None].chunk(6, -1)
        qkv = self.qkv(self.norm(x) * (1 + scale1) + shift1).unflatten(-1, (3, self.heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        x = x + gate1 * self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        y = self.norm(x) * (1 + scale2) + shift2
        return x + gate2 * self.fc2(F.gelu(self.fc1(y), approximate="tanh"))

    def forward_dual(self, x: Dual, condition: Dual) -> Dual:
        """The same with tangents."""
        shift1, scale1, gate1, shift2, scale2, gate2 = chunk(dual(self.modulation, condition), 6)
        y = ops.norm_modulate(x, None, scale1, shift1, kind="layer", eps=self.norm.eps)
        q, k, v = (part.map(lambda p: p.unflatten(-1, (self.heads, -1))) for part in chunk(dual(self.qkv, y), 3))
        mixed = ops.attention(q, k, v).map(lambda o: o.flatten(2))
        x, y = ops.residual_norm_modulate(
            x, dual(self.out, mixed), gate1, None, scale2, shift2, kind="layer", eps=self.norm.eps
        )
        return gated_residual(x, dual(self.fc2, ops.gelu(dual(self.fc1, y), approximate="tanh")), gate2)


class DiT(nn.Module):
    """A diffusion transformer (arXiv 2212.09748) on latents, conditioned on t and t - r; the default is DiT-B/4."""

    blocks: Any

    def __init__(self, width: int = 768, depth: int = 12, heads: int = 12, side: int = 32) -> None:
        super().__init__()
        self.shape, self.patch = (4, side, side), 4
        self.embed = nn.Conv2d(4, width, self.patch, stride=self.patch)
        self.positions = nn.Parameter(0.02 * torch.randn((side // self.patch) ** 2, width))
        self.time, self.span = Embedding(width), Embedding(width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.modulation, self.head = nn.Linear(width, 2 * width), nn.Linear(width, 4 * self.patch**2)

    def to_image(self, tokens: Tensor) -> Tensor:
        """[B, S, 4 p^2] -> [B, 4, H, W]."""
        side = self.shape[1] // self.patch
        return F.pixel_shuffle(tokens.mT.unflatten(-1, (side, side)), self.patch)

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z [B, 4, H, W]; t, r [B]."""
        condition = F.silu(self.time(t) + self.span(t - r))
        x = self.embed(z).flatten(2).mT + self.positions
        for block in self.blocks:
            x = block(x, condition)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)
        return self.to_image(self.head(self.norm(x) * (1 + scale) + shift))

    def forward_dual(self, z: Dual, t: Dual, r: Dual) -> Dual:
        """The same with tangents of z and t; r stands still."""
        condition = ops.silu(add(dual(self.time, t), dual(self.span, Dual(t.value - r.value, t.dot))))
        x = add(dual(self.embed, z).map(lambda p: p.flatten(2).mT), self.positions)
        for block in self.blocks:
            x = block.forward_dual(x, condition)
        shift, scale = chunk(dual(self.modulation, condition), 2)
        y = ops.norm_modulate(x, None, scale, shift, kind="layer", eps=self.norm.eps)
        return dual(self.head, y).map(self.to_image)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels."""
    return nn.GroupNorm(min(32, channels // 4), channels)


class ResidualBlock(nn.Module):
    """Two 3 x 3 convolutions with the condition added in between, and attention if `heads` > 0."""

    def __init__(self, inputs: int, outputs: int, width: int, heads: int = 0) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.conv1 = group_norm(inputs), nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2, self.conv2 = group_norm(outputs), nn.Conv2d(outputs, outputs, 3, padding=1)
        self.condition = nn.Linear(width, outputs)
        self.skip = nn.Conv2d(inputs, outputs, 1) if inputs != outputs else nn.Identity()
        if heads:
            self.norm3 = group_norm(outputs)
            self.qkv, self.out = nn.Conv2d(outputs, 3 * outputs, 1), nn.Conv2d(outputs, outputs, 1)

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        """x [B, inputs, H, W], condition [B, width] -> [B, outputs, H, W]."""
        y = self.conv1(F.silu(self.norm1(x))) + self.condition(condition)[:, :, None, None]
        x = self.skip(x) + self.conv2(F.silu(self.norm2(y)))
        if not self.heads:
            return x
        q, k, v = self.qkv(self.norm3(x)).flatten(2).mT.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return x + self.out(mixed.mT.unflatten(-1, x.shape[2:]))


class UNet(nn.Module):
    """Residual blocks at two resolutions with skips, and attention at the lower one, conditioned on t and t - r."""

    def __init__(self, width: int = 128, blocks: int = 2, heads: int = 4, side: int = 32) -> None:
        super().__init__()
        self.shape, low = (3, side, side), 2 * width
        self.time, self.span = Embedding(width), Embedding(width)
        self.first = nn.Conv2d(3, width, 3, padding=1)
        self.high_down = nn.ModuleList(ResidualBlock(width, width, width) for _ in range(blocks))
        self.down = nn.Conv2d(width, low, 3, stride=2, padding=1)
        self.low_down = nn.ModuleList(ResidualBlock(low, low, width, heads) for _ in range(blocks))
        self.low_up = nn.ModuleList(ResidualBlock(2 * low, low, width, heads) for _ in range(blocks))
        self.up = nn.Conv2d(low, width, 3, padding=1)
        self.high_up = nn.ModuleList(ResidualBlock(2 * width, width, width) for _ in range(blocks))
        self.norm, self.last = group_norm(width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, z: Tensor, t: Tensor, r: Tensor) -> Tensor:
        """z [B, 3, H, W]; t, r [B]."""
        condition, skips = F.silu(self.time(t) + self.span(t - r)), []
        x = self.first(z)
        for block in self.high_down:
            skips.append(x := block(x, condition))
        x = self.down(x)
        for block in self.low_down:
            skips.append(x := block(x, condition))
        for block in self.low_up:
            x = block(torch.cat([x, skips.pop()], 1), condition)
        x = self.up(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        for block in self.high_up:
            x = block(torch.cat([x, skips.pop()], 1), condition)
        return self.last(F.silu(self.norm(x)))
