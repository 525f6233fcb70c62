"""MeanFlow (arXiv 2505.13447) on timm's ViT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from harness import drawn, main
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from pmf import layers
from pmf.dual import Dual, dual
from pmf.layers import Residual


class Embedding(nn.Module):
    """A time [B] as a vector [B, C]."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, s: Tensor) -> Tensor:
        """s [B] -> [B, C]."""
        index = torch.arange(128, device=s.device, dtype=s.dtype)
        angle = s[:, None] * 10000 ** (-index / 128)
        return self.mlp(torch.cat([angle.cos(), angle.sin()], 1))


class ViT(nn.Module):
    """u(z, t, r, y) by timm's ViT, with embeddings of t, t - r and the class y as three more tokens."""

    def __init__(self, width: int = 128, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        options = {"class_token": False, "global_pool": ""}
        self.vit = VisionTransformer(8, 2, 1, 4, embed_dim=width, depth=depth, num_heads=width // 32, **options)
        for i, theirs in enumerate(self.vit.blocks):
            self.vit.blocks[i] = layers.ViTBlock(width, width // 32, qkv_bias=True)
            self.vit.blocks[i].load_state_dict(theirs.state_dict())
        self.time, self.span = Embedding(width), Embedding(width)
        self.classes = nn.Embedding(classes, width)

    def tokens(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """Conditions and patches [B, 3 + N, C]."""
        conditions = torch.stack([self.time(t), self.span(t - r), self.classes(y)], 1)
        return torch.cat([conditions, self.vit.patch_embed(z) + self.vit.pos_embed], 1)

    def images(self, x: Tensor) -> Tensor:
        """The patches among tokens as images."""
        return F.pixel_shuffle(self.vit.head(x[:, 3:]).mT.unflatten(2, (4, 4)), 2)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """z [B, 1, 8, 8]; t, r float [B]; y int64 [B]."""
        return self.images(self.vit.norm(self.vit.blocks(self.tokens(z, t, r, y))))

    def forward_dual(self, z: Dual, t: Dual, r: Tensor, y: Tensor) -> Dual:
        """u and the tangent of its last samples."""
        stream = Residual(dual(self.tokens, z, t, r, y))
        for block in self.vit.blocks:
            stream = block.forward_residual(stream)
        return dual(self.images, dual(self.vit.norm, stream.add()))


def errors(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each image's mean squared error of u + (t - r) stopgrad(du/dt) against v = e - x."""
    t, r, z, v = drawn(x)
    half = len(x) // 2  # r = t before
    u, du_dt = network.forward_dual(Dual(z, v[half:]), Dual(t, torch.ones_like(t[half:])), r, y)
    average = torch.cat([u[:half], u[half:] + (t - r)[half:, None, None, None] * du_dt])
    return (average - v).square().flatten(1).mean(1)


if __name__ == "__main__":
    main(ViT, errors)
