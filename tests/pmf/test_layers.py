import pytest
import torch

from pmf import layers, ops
from pmf.errors import InputError
from pmf.packing import held_weights
from pmf.pair import Dual
from tests.networks import TINY, relative_error

WIDTH = TINY.hidden_size


def randomise(module):
    torch.manual_seed(0)
    for p in module.double().parameters():
        torch.nn.init.normal_(p, std=0.3)
    return module


def rope():
    return tuple(t.double() for t in ops.rope_tables(TINY.grid_size, TINY.head_dim))


def tokens():
    return torch.randn(3, TINY.sequence_length, WIDTH, dtype=torch.float64)


ADALN = TINY.__class__(**{**TINY.__dict__, "conditioning": "adaln"})

LAYERS = {
    "Linear": (lambda: layers.Linear(WIDTH, 5, bias=True), ()),
    "NormModulate": (lambda: layers.NormModulate(WIDTH), ()),
    "Attention": (lambda: layers.Attention(TINY), (rope(),)),
    "SwiGLU": (lambda: layers.SwiGLU(TINY), ()),
    "Block": (lambda: layers.Block(TINY), (rope(),)),
    "FinalLayer": (lambda: layers.FinalLayer(TINY), ()),
}


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_forward_dual_is_forward_and_its_jvp(name, rows):
    make, extra = LAYERS[name]
    layer, x = randomise(make()), tokens()
    x_dot = torch.randn_like(x[3 - rows :])
    y, y_dot = layer.forward_dual(Dual(x, x_dot), *extra)
    value, tangent = torch.func.jvp(lambda x: layer(x, *extra), (x[3 - rows :],), (x_dot,))
    assert relative_error(y[3 - rows :], value) < 1e-12
    assert relative_error(y_dot, tangent) < 1e-12
    assert not y_dot.requires_grad and y.requires_grad


def test_block_under_adaln_takes_the_tangent_of_its_condition():
    block = randomise(layers.Block(ADALN))
    x = torch.randn(3, ADALN.sequence_length, WIDTH, dtype=torch.float64)
    c = torch.randn(3, WIDTH, dtype=torch.float64)
    x_dot, c_dot = torch.randn_like(x[1:]), torch.randn_like(c[1:])
    _, dot = block.forward_dual(Dual(x, x_dot), rope(), Dual(c, c_dot))
    _, expected = torch.func.jvp(lambda x, c: block(x, rope(), c), (x[1:], c[1:]), (x_dot, c_dot))
    assert relative_error(dot, expected) < 1e-12


def test_block_starts_as_the_identity():
    for config in (TINY, ADALN):
        x = torch.randn(2, config.sequence_length, WIDTH)
        condition = () if config is TINY else (torch.randn(2, WIDTH),)
        table = ops.rope_tables(config.grid_size, config.head_dim)
        assert torch.equal(layers.Block(config)(x, table, *condition), x)


def test_mlp_padding_changes_nothing():
    mlp = randomise(layers.SwiGLU(TINY))
    assert mlp.w1.out_features % 8 != 0
    x = tokens()
    plain = torch.nn.functional.silu(x @ mlp.w1.weight.T) * (x @ mlp.w3.weight.T) @ mlp.w2.weight.T
    assert relative_error(mlp(x), plain) < 1e-14


def test_initialisation_follows_the_published_laws():
    torch.manual_seed(0)
    linear = layers.SwiGLU(TINY.__class__(hidden_size=512, num_heads=8)).w1
    assert linear.weight.std().item() == pytest.approx(0.32 / 512**0.5, rel=0.02)
    embedder = layers.ScalarEmbedder(512)
    assert embedder.fc1.weight.std().item() == pytest.approx(1 / 256**0.5, rel=0.02)
    assert embedder.fc1.bias.abs().max() == 0
    patch = layers.PatchEmbed(TINY.__class__(hidden_size=512, num_heads=8))
    assert patch.positions.std().item() == pytest.approx(0.02, rel=0.02)
    fan_in, fan_out = 3 * 16 * 16, 128
    assert patch.proj1.weight.abs().max().item() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.01)


def test_weights_are_joined_once_while_held():
    attention = randomise(layers.Attention(TINY))
    x = tokens()
    plain = attention(x, rope())
    assert attention.packed()[0] is not attention.packed()[0]
    with held_weights(attention, "cpu"):
        held = attention(x, rope())
        assert attention.packed()[0] is attention.packed()[0]
    assert torch.equal(held, plain)
    held.sum().backward()
    assert all(p.grad is not None for p in attention.parameters())
    with torch.no_grad():
        attention.q_proj.weight.mul_(2)
    assert not torch.equal(attention(x, rope()), plain)


def test_inputs_by_name():
    norm, x = randomise(layers.NormModulate(WIDTH)), tokens()
    scale, shift = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(norm(x=x, shift=shift, scale=scale), norm(x, scale, shift))


def test_forward_refuses_a_tangent():
    norm, x = randomise(layers.NormModulate(WIDTH)), tokens()
    assert torch.equal(norm(Dual(x)), norm(x))
    with pytest.raises(InputError, match=r"^NormModulate: forward takes values only, got a tangent; use forward_dual"):
        norm(Dual(x, x))
