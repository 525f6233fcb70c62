"""Scalars and images as vectors and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import ops
from pmf.dual import acts_as, add, concatenate, dual, linear_dual
from pmf.errors import InputError, require
from pmf.layers.base import DualModule, Linear, warn_of_hooks
from pmf.packing import Join, PackedModule
from pmf.pair import ABSENT, Dual


class TimestepEmbedder(DualModule):
    """A time [B] as a vector [B, C], as in DiT and SiT: sinusoidal features, then `mlp`: Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        self.frequency_embedding_size = frequency_embedding_size
        first = nn.Linear(frequency_embedding_size, hidden_size)
        self.mlp = nn.Sequential(first, nn.SiLU(), nn.Linear(hidden_size, hidden_size))

    def forward_dual(self, t: Dual) -> Dual:
        """The embedding of t [B], of any unit (DiT counts to 1000, SiT from 0 to 1), and its tangent."""
        features = ops.scalar_features(Dual.of(t), self.frequency_embedding_size)
        first, _, second = self.mlp
        dtype = next(first.parameters()).dtype
        hidden = dual(first, features.map(lambda x: x.to(dtype)))
        return dual(second, ops.silu(hidden))


class ScalarEmbedder(DualModule):
    """A scalar [B] as a vector [B, C]: 256 sinusoidal features, Linear, SiLU, Linear."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.fc1 = Linear(256, width, bias=True)
        self.fc2 = Linear(width, width, bias=True)

    def forward_dual(self, s: Dual) -> Dual:
        """The embedding of s, and its tangent."""
        features = ops.scalar_features(Dual.of(s)).map(lambda x: x.to(self.fc1.weight.dtype))
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
    """Images to tokens: patches by a p x p convolution, and positions.

    bottleneck: two convolutions, `proj1` to the bottleneck and `proj2` to dim, fused; None: one, `proj`, as in timm
    and DiT. positions: learned ones [prefix_length + N, dim], prefix tokens included; False: none.
    """

    def __init__(
        self, image_size: int, patch_size: int, in_channels: int, dim: int, *, bottleneck: int | None = None,
        positions: bool = False, prefix_length: int = 0, impl: str | None = None,
    ) -> None:  # fmt: skip
        super().__init__(impl)
        whole = patch_size > 0 and image_size % patch_size == 0
        require(whole, f"PatchEmbed: image_size must be a multiple of patch_size, got {image_size} and {patch_size}")
        require(positions or bottleneck is None, "PatchEmbed: a bottleneck needs positions=True")
        if bottleneck is None:
            self.proj = nn.Conv2d(in_channels, dim, patch_size, stride=patch_size)
        else:
            self.proj1 = nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size)
            self.proj2 = nn.Conv2d(bottleneck, dim, 1)
        length = prefix_length + (image_size // patch_size) ** 2
        self.positions = nn.Parameter(torch.empty(length, dim)) if positions else None
        for conv in (self.proj,) if bottleneck is None else (self.proj1, self.proj2):
            nn.init.xavier_uniform_(conv.weight.flatten(1))
            nn.init.zeros_(conv.bias)
        if self.positions is not None:
            nn.init.normal_(self.positions, std=0.02)

    def forward_dual(self, images: Dual, prefix: Dual = ABSENT) -> Dual:
        """[prefix, patches] + positions: images [B, c, H, W], prefix [B, P, C] or None -> [B, S, C]."""
        images, prefix = Dual.of(images), Dual.of(prefix)
        if hasattr(self, "proj"):
            return self._by_one_product(images, prefix)
        first, second = self.proj1, self.proj2
        weights = first.weight, first.bias, second.weight, second.bias
        return ops.patch_embed(images, *weights, self.positions, prefix, impl=self.impl)

    def _by_one_product(self, images: Dual, prefix: Dual) -> Dual:
        weight, bias = self.proj.weight, self.proj.bias
        _, channels, p, _ = weight.shape
        if not self._tiles(self.proj):
            raise InputError(f"PatchEmbed: proj must be a Conv2d of square patches, got {self.proj}")
        warn_of_hooks("PatchEmbed", self.proj)
        sizes = list(images.value.shape)
        fits = len(sizes) == 4 and sizes[1] == channels and sizes[2] % p == sizes[3] % p == 0
        require(fits, f"PatchEmbed: images must be [B, {channels}, H, W] with sides that {p} divides, got {sizes}")
        patches = images.map(lambda x: ops.patchify(x.to(weight.dtype), p))
        tokens = linear_dual(patches, weight.permute(0, 2, 3, 1).flatten(1), bias)
        tokens = tokens if prefix.value is None else concatenate([prefix, tokens], 1)
        if self.positions is None:
            return tokens
        length, got = len(self.positions), tokens.value.shape[1]
        if got != length:
            raise InputError(f"PatchEmbed: images and prefix must make {length} tokens, got {got}")
        return add(tokens, self.positions)

    @staticmethod
    def _tiles(conv: nn.Conv2d) -> bool:
        """Whether a convolution is one product with each patch."""
        whole = conv.stride == conv.kernel_size and conv.padding == (0, 0) and conv.groups == 1
        square = conv.kernel_size[0] == conv.kernel_size[1] and conv.dilation == (1, 1)
        return acts_as(conv, nn.Conv2d, hooks=True) and whole and square
