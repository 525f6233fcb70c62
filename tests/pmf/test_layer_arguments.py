"""Arguments of the layers' constructors and calls: each wrong one is one line that names the layer and the argument."""

import numpy as np
import pytest
import torch

from pmf import layers
from pmf.errors import InputError

X, NARROW, TIME = torch.randn(2, 5, 16), torch.randn(2, 5, 8), torch.rand(2)
SINGLE = dict(norm_type="ada_norm_single")


def diffusers(dim=16, heads=2, head_dim=8, **options):
    return layers.BasicTransformerBlock(dim, heads, head_dim, **options)


def embedders(*scalars):
    return layers.ScalarEmbedders(["a", "b"], 8).forward_dual(*scalars)


POSITIVE = "must be an integer of at least 1, got"
CONSTRUCTED = [
    *((f"Attention: dim {POSITIVE} {v!r}", lambda v=v: layers.Attention(v, 4)) for v in ("16", -16, 0, 16.0, None)),
    *((f"Attention: num_heads must be an integer of at least 0, got {v!r}", lambda v=v: layers.Attention(16, v))
      for v in ("4", 4.0, None, -4)),
    *((f"Attention: num_kv_heads {POSITIVE} {v!r}", lambda v=v: layers.Attention(16, 4, num_kv_heads=v))
      for v in (2.0, 0, "2")),
    ("Attention: prefix_length must be an integer of at least 0, got None",
     lambda: layers.Attention(16, 4, prefix_length=None)),
    ("Attention: causal must be True or False, got 'no'", lambda: layers.Attention(16, 4, causal="no")),
    ("Attention: eps must be a finite number of at least 0, got '1'", lambda: layers.Attention(16, 4, eps="1")),
    (f"CrossAttention: dim {POSITIVE} '16'", lambda: layers.CrossAttention("16", 4)),
    *((f"CrossAttention: context_dim {POSITIVE} {v!r}", lambda v=v: layers.CrossAttention(16, 4, context_dim=v))
      for v in (0, 2.5)),
    (f"Mlp: hidden {POSITIVE} 0", lambda: layers.Mlp(16, 0)),
    (f"Mlp: dim {POSITIVE} '16'", lambda: layers.Mlp("16", 32)),
    (f"DiTBlock: hidden_size {POSITIVE} '16'", lambda: layers.DiTBlock("16", 4)),
    *((f"DiTBlock: mlp_ratio must give a hidden width of at least 1, got {v}", lambda v=v: layers.DiTBlock(16, 4, v))
      for v in (-1, 0.01)),
    ("DiTBlock: mlp_ratio must be a finite number, got '4'", lambda: layers.DiTBlock(16, 4, "4")),
    (f"ViTBlock: num_heads {POSITIVE} None", lambda: layers.ViTBlock(16, None)),
    ("ViTBlock: qk_norm must be True or False, got 'rms'", lambda: layers.ViTBlock(16, 4, qk_norm="rms")),
    ("LayerScale: init_values must be a finite number, got 'a'", lambda: layers.ViTBlock(16, 4, init_values="a")),
    (f"NormModulate: dim {POSITIVE} '16'", lambda: layers.NormModulate("16")),
    ("NormModulate: eps must be a finite number of at least 0, got -1", lambda: layers.NormModulate(16, eps=-1)),
    (f"Linear: in_features {POSITIVE} '8'", lambda: layers.Linear("8", 2)),
    (f"WideLinear: out_features {POSITIVE} 0", lambda: layers.WideLinear(8, 0)),
    (f"TimestepEmbedder: hidden_size {POSITIVE} '16'", lambda: layers.TimestepEmbedder("16")),
    ("TimestepEmbedder: frequency_embedding_size must be even, got 7", lambda: layers.TimestepEmbedder(16, 7)),
    (f"ScalarEmbedder: width {POSITIVE} 0", lambda: layers.ScalarEmbedder(0)),
    (f"PatchEmbed: image_size {POSITIVE} '8'", lambda: layers.PatchEmbed("8", 2, 1, 16)),
    (f"PatchEmbed: patch_size {POSITIVE} 0", lambda: layers.PatchEmbed(8, 0, 1, 16)),
    (f"PatchEmbed: bottleneck {POSITIVE} 0", lambda: layers.PatchEmbed(8, 2, 1, 16, bottleneck=0, positions=True)),
    (f"BasicTransformerBlock: dim {POSITIVE} '16'", lambda: diffusers("16")),
    ("BasicTransformerBlock: heads must fill dim 16, got 8", lambda: diffusers(head_dim=4)),
    (f"BasicTransformerBlock: num_embeds_ada_norm {POSITIVE} '3'", lambda: diffusers(num_embeds_ada_norm="3")),
]  # fmt: skip
CALLED = [
    ("ViTBlock: x must be a tensor [B, S, 16], got [2, 5, 8]", lambda: layers.ViTBlock(16, 4)(NARROW)),
    ("DiTBlock: x must be a tensor [B, S, 16], got [2, 5, 8]", lambda: layers.DiTBlock(16, 4)(NARROW, X)),
    ("DiTBlock: c must be a tensor [..., 16], got [2, 8]", lambda: layers.DiTBlock(16, 4)(X, NARROW[:, 0])),
    ("DiTBlock: c must be a tensor [..., 16], got NoneType", lambda: layers.DiTBlock(16, 4)(X, None)),
    ("Mlp: x must be a tensor [..., 16], got [2, 5, 8]", lambda: layers.Mlp(16, 32)(NARROW)),
    ("Mlp: x must be a tensor [..., 16], got list", lambda: layers.Mlp(16, 32)([1])),
    ("NormModulate: x must be a tensor [..., 16], got [2, 5, 8]",
     lambda: layers.NormModulate(16, elementwise_affine=True)(NARROW)),
    ("Linear: x must be a tensor [..., 8], got [2, 5, 16]", lambda: layers.Linear(8, 2).forward_dual(X)),
    ("WideLinear: x must be a tensor [..., 8], got [2, 5, 16]", lambda: layers.WideLinear(8, 2)(X)),
    ("Attention: rope must be a pair (cos, sin), got a tensor", lambda: layers.Attention(16, 4, rope="half")(X, X)),
    ("Attention: rope must be a pair (cos, sin), got 1 values", lambda: layers.Attention(16, 4, rope="half")(X, (X,))),
    ("ScalarEmbedders: expected 2 scalars, a, b, got 1", lambda: embedders(TIME)),
    ("ScalarEmbedders: b must be a tensor [B], as the first scalar, got [1]", lambda: embedders(TIME, TIME[:1])),
    ("ScalarEmbedders: b must be a tensor [B], as the first scalar, got int", lambda: embedders(TIME, 3)),
    ("PatchEmbed: images must be [B, 1, H, W] with sides that 2 divides, got NoneType",
     lambda: layers.PatchEmbed(8, 2, 1, 16)(None)),
    ("PatchEmbed: prefix must be a tensor [B, S, 16], got [2, 5, 8]",
     lambda: layers.PatchEmbed(8, 2, 1, 16)(torch.randn(2, 1, 8, 8), NARROW)),
    ("BasicTransformerBlock: x must be a tensor [B, S, 16], got [2, 5, 8]",
     lambda: diffusers()(NARROW, timestep=X[:, 0])),
    ("BasicTransformerBlock: timestep must be a tensor [..., 16], got [2]", lambda: diffusers()(X, timestep=TIME)),
    ("BasicTransformerBlock: timestep must be [B, 96] with ada_norm_single, got [2]",
     lambda: diffusers(**SINGLE)(X, timestep=TIME)),
    ("BasicTransformerBlock: class_labels must be an integer tensor [B], got torch.float32",
     lambda: diffusers(num_embeds_ada_norm=3)(X, timestep=TIME, class_labels=TIME)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), CONSTRUCTED + CALLED, ids=range(len(CONSTRUCTED + CALLED)))
def test_a_wrong_argument_is_named(message, call):
    with pytest.raises(InputError) as error:
        call()
    assert str(error.value) == message


def test_sizes_of_numpy_and_whole_numbers_are_taken():
    block = layers.ViTBlock(np.int64(16), np.int64(4), np.float32(2), init_values=1)
    assert block.ls1.gamma.dtype == torch.float32 and block(X).shape == X.shape
    assert layers.Attention(16, 4, num_kv_heads=np.int64(2), prefix_length=np.int64(0))(X).shape == X.shape
