"""Layers as nn.Modules with ordinary signatures: `forward` for values, `forward_dual` for values and tangents.

Each layer is written once, as `forward_dual` on `Dual`s; `forward` calls it without tangents, and inside `pmf.jvp`
with the values that move. Tokens are [B, S, C], heads [B, S, H, D].
"""

from pmf.layers.attention import Attention as Attention
from pmf.layers.attention import CrossAttention as CrossAttention
from pmf.layers.attention import Rope as Rope
from pmf.layers.attention import SeparateAttention as SeparateAttention
from pmf.layers.base import DualModule as DualModule
from pmf.layers.base import Linear as Linear
from pmf.layers.base import WideLinear as WideLinear
from pmf.layers.base import keep_less as keep_less
from pmf.layers.blocks import DiTBlock as DiTBlock
from pmf.layers.blocks import LayerScale as LayerScale
from pmf.layers.blocks import SiTBlock as SiTBlock
from pmf.layers.blocks import TransformerBlock as TransformerBlock
from pmf.layers.blocks import ViTBlock as ViTBlock
from pmf.layers.diffusers_blocks import BasicTransformerBlock as BasicTransformerBlock
from pmf.layers.embeddings import PatchEmbed as PatchEmbed
from pmf.layers.embeddings import ScalarEmbedder as ScalarEmbedder
from pmf.layers.embeddings import ScalarEmbedders as ScalarEmbedders
from pmf.layers.embeddings import TimestepEmbedder as TimestepEmbedder
from pmf.layers.mlp import Mlp as Mlp
from pmf.layers.norms import NormModulate as NormModulate
from pmf.layers.norms import Residual as Residual
