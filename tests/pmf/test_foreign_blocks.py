"""Blocks of timm, diffusers, DiT and SiT replaced by ours: state dicts, outputs, gradients, tangents."""

import functools

import pytest
import torch
from torch import nn

from pmf import layers
from pmf.errors import InputError
from pmf.pair import Dual
from tests.networks import relative_error

timm_blocks = pytest.importorskip("timm.models.vision_transformer")
diffusers_attention = pytest.importorskip("diffusers.models.attention")
DiTTransformer2DModel = pytest.importorskip("diffusers").DiTTransformer2DModel
pytestmark = [pytest.mark.extras, pytest.mark.filterwarnings("ignore")]
WIDTH, HEADS, CLASSES = 32, 4, 10


class TheirDiTBlock(nn.Module):
    """The block of DiT and SiT, which their repositories build of timm's Attention and Mlp."""

    def __init__(self):
        super().__init__()
        norm = functools.partial(nn.LayerNorm, WIDTH, elementwise_affine=False, eps=1e-6)
        gelu = functools.partial(nn.GELU, approximate="tanh")
        self.norm1, self.attn = norm(), timm_blocks.Attention(WIDTH, num_heads=HEADS, qkv_bias=True)
        self.norm2, self.mlp = norm(), timm_blocks.Mlp(WIDTH, 4 * WIDTH, act_layer=gelu, drop=0)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(WIDTH, 6 * WIDTH))

    def forward(self, x, c):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.adaLN_modulation(c)[:, None].chunk(6, -1)
        x = x + gate1 * self.attn(self.norm1(x) * (1 + scale1) + shift1)
        return x + gate2 * self.mlp(self.norm2(x) * (1 + scale2) + shift2)


class TimeFeatures(nn.Module):
    """The features of a time that diffusers computes, but in float64."""

    def forward(self, t):
        angle = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 127)
        return torch.cat([angle.cos(), angle.sin()], -1)


def theirs_of_diffusers(norm_type, **options):
    common = dict(activation_fn="gelu-approximate", norm_type=norm_type, norm_elementwise_affine=False)
    block = diffusers_attention.BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, **common, **options)
    if norm_type == "ada_norm_zero":
        block.norm1.emb.time_proj = TimeFeatures()
    return block


def ours_of_diffusers(norm_type, **options):
    return layers.BasicTransformerBlock(WIDTH, HEADS, WIDTH // HEADS, norm_type=norm_type, **options)


def tokens(length=7):
    return torch.randn(3, length, WIDTH, dtype=torch.float64)


def vector(*shape):
    return torch.randn(3, *shape, dtype=torch.float64)


VIT = dict(qkv_bias=True, qk_norm=True, init_values=0.1)
ZERO, SINGLE = dict(attention_bias=True, num_embeds_ada_norm=CLASSES), dict(attention_bias=True)
CROSS = dict(cross_attention_dim=WIDTH)
LABELS = torch.tensor([1, 9, 10])
CASES = {  # their block, ours, moving inputs, how both are called with them
    "timm ViT": (
        lambda: timm_blocks.Block(WIDTH, HEADS),
        lambda: layers.ViTBlock(WIDTH, HEADS),
        lambda: (tokens(),),
        lambda block, x: block(x),
    ),
    "timm ViT, qk norm, layer scale": (
        lambda: timm_blocks.Block(WIDTH, HEADS, **VIT),
        lambda: layers.ViTBlock(WIDTH, HEADS, **VIT),
        lambda: (tokens(),),
        lambda block, x: block(x),
    ),
    "DiT": (
        TheirDiTBlock,
        lambda: layers.DiTBlock(WIDTH, HEADS),
        lambda: (tokens(), vector(WIDTH)),
        lambda block, *inputs: block(*inputs),
    ),
    "diffusers DiT": (
        lambda: theirs_of_diffusers("ada_norm_zero", **ZERO),
        lambda: ours_of_diffusers("ada_norm_zero", **ZERO),
        lambda: (tokens(), torch.rand(3, dtype=torch.float64)),
        lambda block, x, t: block(x, timestep=t, class_labels=LABELS),
    ),
    "diffusers DiT with context": (
        lambda: theirs_of_diffusers("ada_norm_zero", **ZERO, **CROSS),
        lambda: ours_of_diffusers("ada_norm_zero", **ZERO, **CROSS),
        lambda: (tokens(), torch.rand(3, dtype=torch.float64), tokens(5)),
        lambda block, x, t, c: block(x, timestep=t, class_labels=LABELS, encoder_hidden_states=c),
    ),
    "diffusers PixArt": (
        lambda: theirs_of_diffusers("ada_norm_single", **SINGLE),
        lambda: ours_of_diffusers("ada_norm_single", **SINGLE),
        lambda: (tokens(), vector(6 * WIDTH)),
        lambda block, x, t: block(x, timestep=t),
    ),
    "diffusers PixArt with context": (
        lambda: theirs_of_diffusers("ada_norm_single", **SINGLE, **CROSS),
        lambda: ours_of_diffusers("ada_norm_single", **SINGLE, **CROSS),
        lambda: (tokens(), vector(6 * WIDTH), tokens(5)),
        lambda block, x, t, c: block(x, timestep=t, encoder_hidden_states=c),
    ),
}


def randomised(block):
    torch.manual_seed(0)
    for parameter in block.double().parameters():
        nn.init.normal_(parameter, std=0.3)
    return block


@pytest.mark.parametrize("less", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_outputs_gradients_and_tangents_are_those_of_the_block_whose_state_dict_is_loaded(name, less):
    make_theirs, make_ours, draw, call = CASES[name]
    theirs, ours = randomised(make_theirs()).eval(), make_ours().double()  # in training, diffusers drops labels
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    layers.keep_less(ours, less)
    torch.manual_seed(1)
    inputs = [x.requires_grad_() for x in draw()]
    wanted, y = call(theirs, *inputs), call(ours, *inputs)
    assert relative_error(y, wanted) < 1e-12
    names, cotangent = list(theirs.state_dict()), torch.randn_like(y)
    expected = torch.autograd.grad(wanted, [*inputs, *map(theirs.get_parameter, names)], cotangent)
    found = torch.autograd.grad(y, [*inputs, *map(ours.get_parameter, names)], cotangent)
    largest = max(gradient.norm() for gradient in expected)  # that of a bias of keys is zero but for rounding
    assert all((a - b).norm() < 1e-12 * largest for a, b in zip(found, expected, strict=True))
    inputs = [x.detach() for x in inputs]
    dots = tuple(map(torch.randn_like, inputs))
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        _, expected = torch.func.jvp(functools.partial(call, theirs), tuple(inputs), dots)
    labels = {"class_labels": LABELS} if "diffusers DiT" in name else {}
    _, dot = ours.forward_dual(*(Dual(x, x_dot[1:]) for x, x_dot in zip(inputs, dots, strict=True)), **labels)
    assert relative_error(dot, expected[1:]) < 1e-12


def test_times_are_embedded_as_by_diffusers():
    """In float32, with the features that diffusers computes."""
    theirs = diffusers_attention.BasicTransformerBlock(
        WIDTH, HEADS, WIDTH // HEADS, activation_fn="gelu-approximate", norm_type="ada_norm_zero", **ZERO,
        norm_elementwise_affine=False,
    )  # fmt: skip
    ours, x, t = ours_of_diffusers("ada_norm_zero", **ZERO), tokens().float(), torch.tensor([0.0, 12.0, 999.0])
    ours.load_state_dict(theirs.state_dict())
    expected = theirs.eval()(x, timestep=t, class_labels=LABELS)
    torch.testing.assert_close(ours(x, timestep=t, class_labels=LABELS), expected, rtol=1e-4, atol=1e-4)


def test_a_published_vit_of_blocks_of_ours():
    """The whole network of timm with its blocks replaced, in float32."""
    network = timm_blocks.VisionTransformer(img_size=32, patch_size=8, embed_dim=WIDTH, depth=2, num_heads=HEADS).eval()
    x = torch.randn(2, 3, 32, 32)
    expected = network(x)
    for i, theirs in enumerate(network.blocks):
        ours = layers.ViTBlock(WIDTH, HEADS, qkv_bias=True)
        ours.load_state_dict(theirs.state_dict())
        network.blocks[i] = ours
    torch.testing.assert_close(network(x), expected)


def test_the_dit_of_diffusers_of_blocks_of_ours():
    """The whole network with its blocks replaced, in float32; its last layer reads the first block's embedding."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=HEADS, attention_head_dim=WIDTH // HEADS, num_layers=2)
    network = DiTTransformer2DModel(**sizes, in_channels=4, sample_size=8, num_embeds_ada_norm=CLASSES).eval()
    call = functools.partial(network, torch.randn(3, 4, 8, 8), torch.tensor([0.0, 12.0, 999.0]), class_labels=LABELS)
    expected = call().sample
    for i, theirs in enumerate(network.transformer_blocks):
        ours = ours_of_diffusers("ada_norm_zero", **ZERO)
        ours.load_state_dict(theirs.state_dict())
        network.transformer_blocks[i] = ours
    torch.testing.assert_close(call().sample, expected, rtol=1e-4, atol=1e-4)


def test_masks_are_refused():
    block = ours_of_diffusers("ada_norm_single")
    with pytest.raises(InputError, match=r"^BasicTransformerBlock: attention_mask must be None, got Tensor$"):
        block(tokens(), attention_mask=tokens(), timestep=vector(6 * WIDTH))


def test_adapters_are_refused():
    """Ours read the weights alone, so an adapter would be lost."""
    block = layers.ViTBlock(WIDTH, HEADS).double()
    block.attn.qkv = nn.Sequential(block.attn.qkv)
    with pytest.raises(InputError, match=r"^Attention: projections must be nn.Linear layers, got Sequential$"):
        block(tokens())


def test_embedders_of_dit():
    timm_patch = timm_blocks.PatchEmbed(8, 2, 4, WIDTH, bias=True).double()
    patch = layers.PatchEmbed(8, 2, 4, WIDTH).double()
    patch.load_state_dict(timm_patch.state_dict())
    x = torch.randn(3, 4, 8, 8, dtype=torch.float64)
    assert relative_error(patch(x), timm_patch(x)) < 1e-14
    embedder = layers.TimestepEmbedder(WIDTH).double()
    assert list(embedder.state_dict()) == ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    t = torch.rand(3, dtype=torch.float64)
    angle = t[:, None] * 10000 ** (-torch.arange(128, dtype=torch.float64) / 128)
    assert relative_error(embedder(t), embedder.mlp(torch.cat([angle.cos(), angle.sin()], -1))) < 1e-12
