"""MeanFlow (arXiv 2505.13447) on diffusers' DiT."""

from __future__ import annotations

import torch
from diffusers import DiTTransformer2DModel
from diffusers.models.embeddings import TimestepEmbedding, get_timestep_embedding
from harness import drawn, main
from torch import Tensor, nn

import pmf


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
        for block in self.dit.transformer_blocks:
            block.norm1.emb = Given()
            nn.init.zeros_(block.norm1.linear.weight)

    def condition(self, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """The condition [B, C]."""
        time, span = (get_timestep_embedding(s, 256).to(s.dtype) for s in (t, t - r))
        return self.time(time) + self.span(span) + self.classes(y)

    def forward(self, z: Tensor, t: Tensor, r: Tensor, y: Tensor) -> Tensor:
        """z [B, 1, 8, 8]; t, r float [B]; y int64 [B]."""
        return self.dit(z, timestep=self.condition(t, r, y)).sample


def errors(network: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Each image's mean squared error of u + (t - r) stopgrad(du/dt) against v = e - x."""
    t, r, z, v = drawn(x)
    u, du_dt = pmf.jvp(network, (z, t, r, y), (v, 1, 0, None))
    average = u + (t - r)[:, None, None, None] * du_dt.detach()
    return (average - v).square().flatten(1).mean(1)


if __name__ == "__main__":
    main(DiT, errors)
