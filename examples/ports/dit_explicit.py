"""MeanFlow (arXiv 2505.13447) on diffusers' DiT."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from einops import rearrange
from harness import drawn, main
from torch import Tensor, nn

from pmf import layers
from pmf.dual import Dual, dual


class Given(nn.Module):
    """In place of a block's embedding of one timestep: the condition that the caller computed."""

    def forward(self, condition: Tensor, class_labels: None, hidden_dtype: torch.dtype) -> Tensor:
        """The condition [B, C]."""
        return condition


class DiT(nn.Module):
    """u(z, t, r, y) by diffusers' DiT, conditioned on embeddings of t, t - r and the class y."""

    def __init__(self, width: int = 128, depth: int = 4, classes: int = 10) -> None:
        super().__init__()
        sizes = {"num_attention_heads": width // 32, "attention_head_dim": 32, "num_layers": depth}
        self.dit = DiTTransformer2DModel(**sizes, in_channels=1, sample_size=8, patch_size=2)
        self.time, self.span = TimestepEmbedding(256, width), TimestepEmbedding(256, width)
        self.classes = nn.Embedding(classes, width)
        for i, theirs in enumerate(self.dit.transformer_blocks):
            block = layers.BasicTransformerBlock(width, width // 32, 32, attention_bias=True)
            block.norm1.emb = theirs.norm1.emb = Given()
            nn.init.zeros_(theirs.norm1.linear.weight)
            block.load_state_dict(theirs.state_dict())
            self.dit.transformer_blocks[i] = block

    def condition(self, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """The condition [B, C]."""
        time, span = (get_timestep_embedding(s, 256).to(s.dtype) for s in (t, t - r))
        return self.time(time) + self.span(span) + self.classes(y)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """z [B, 1, 8, 8]; t, r float [B]; y int64 [B]."""
        return self.dit(z, timestep=self.condition(t, r, y)).sample

    def head(self, x: Tensor, condition: Tensor) -> Tensor:
        """Tokens to images: the end of diffusers' forward pass."""
        shift, scale = self.dit.proj_out_1(F.silu(condition)).chunk(2, 1)
        x = self.dit.proj_out_2(self.dit.norm_out(x) * (1 + scale[:, None]) + shift[:, None])
        return rearrange(x, "b (h w) (p q c) -> b c (h p) (w q)", h=4, p=2, q=2)

    def forward_dual(self, z: Dual, t: Dual, r: Tensor, y: Tensor) -> Dual:
        """u and the tangent of its last samples."""
        condition = dual(self.condition, t, r, y)
        x = dual(self.dit.pos_embed, z)
        for block in self.dit.transformer_blocks:
            x = block.forward_dual(x, condition)
        return dual(self.head, x, condition)


def errors(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each image's mean squared error of u + (t - r) stopgrad(du/dt) against v = e - x."""
    t, r, z, v = drawn(x)
    half = len(x) // 2  # r = t before
    u, du_dt = network.forward_dual(Dual(z, v[half:]), Dual(t, torch.ones_like(t[half:])), r, y)
    average = torch.cat([u[:half], u[half:] + (t - r)[half:, None, None, None] * du_dt])
    return (average - v).square().flatten(1).mean(1)


if __name__ == "__main__":
    main(DiT, errors)
