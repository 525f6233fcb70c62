"""Scalars and images as vectors and tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pmf import ops
from pmf.dual import acts_as, add, concatenate, dual, linear_dual
from pmf.errors import InputError, require
from pmf.fields import check_flags, checked_integer
from pmf.layers.base import DualModule, Linear, check_sizes, check_tokens, warn_of_hooks
from pmf.packing import Join, PackedModule
from pmf.pair import ABSENT, Dual


class TimestepEmbedder(DualModule):
    """A time [B] as a vector [B, C], as in DiT and SiT: sinusoidal features, then `mlp`: Linear, SiLU, Linear."""

    def __init__(self, hidden_size: int, frequency_embedding_size: int = 256) -> None:
        super().__init__()
        check_sizes("TimestepEmbedder", hidden_size=hidden_size)
        checked_integer("TimestepEmbedder", "frequency_embedding_size", frequency_embedding_size, 2)
        even = frequency_embedding_size % 2 == 0
        require(
            even, lambda: f"TimestepEmbedder: frequency_embedding_size must be even, got {frequency_embedding_size}"
        )
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
        check_sizes("ScalarEmbedder", width=width)
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
        scalars = tuple(map(Dual.of, scalars))
        self._check(scalars)
        weight1, bias1, weight2, bias2 = self.packed()
        values, dot = torch.cat([s.value for s in reversed(scalars)]), scalars[0].dot
        features = ops.scalar_features(Dual(values, dot)).map(lambda x: x.to(weight1.dtype))
        embedded = self._each(ops.silu(self._each(features, weight1, bias1)), weight2, bias2)
        first, *others = reversed(embedded.value.chunk(len(scalars)))
        return Dual(first, embedded.dot), *map(Dual, others)

    def _check(self, scalars: tuple[Dual, ...]) -> None:
        """Errors: `InputError` unless there is a tensor [B] for each name."""
        if len(scalars) != len(self):
            raise InputError(f"ScalarEmbedders: expected {len(self)} scalars, {', '.join(self)}, got {len(scalars)}")
        first = getattr(scalars[0].value, "shape", None)
        for name, scalar in zip(self, scalars, strict=True):
            sizes = getattr(scalar.value, "shape", None)
            if sizes is None or len(sizes) != 1 or sizes != first:
                got = type(scalar.value).__name__ if sizes is None else list(sizes)
                raise InputError(f"ScalarEmbedders: {name} must be a tensor [B], as the first scalar, got {got}")

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
        check_sizes("PatchEmbed", image_size=image_size, patch_size=patch_size, in_channels=in_channels, dim=dim)
        if bottleneck is not None:
            check_sizes("PatchEmbed", bottleneck=bottleneck)
        checked_integer("PatchEmbed", "prefix_length", prefix_length, 0)
        check_flags("PatchEmbed", positions=positions)
        require(
            image_size % patch_size == 0,
            lambda: f"PatchEmbed: image_size must be a multiple of patch_size, got {image_size} and {patch_size}",
        )
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
        sizes: tuple = getattr(images.value, "shape", ())
        if len(sizes) != 4 or sizes[1] != channels or sizes[2] % p != 0 or sizes[3] % p != 0:
            wanted = f"[B, {channels}, H, W] with sides that {p} divides"
            found = list(sizes) if hasattr(images.value, "shape") else type(images.value).__name__
            raise InputError(f"PatchEmbed: images must be {wanted}, got {found}")
        if prefix.value is not None:
            check_tokens("PatchEmbed", "prefix", prefix, len(weight))
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
