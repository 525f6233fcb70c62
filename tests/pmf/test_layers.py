import pytest
import torch
import torch.nn.functional as F

import pmf
from pmf import blocks, layers, ops
from pmf.counting import saved_bytes
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


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def table():
    angle = drawn(TINY.sequence_length, WIDTH // 4 // 2)
    return layers.Rope(angle.cos(), angle.sin())


ATTENTIONS = {
    "plain": dict(),
    "biases, rms, adjacent pairs": dict(qkv_bias=True, qk_norm="rms", rope="adjacent"),
    "layer norm, half pairs": dict(qk_norm="layer", rope="half"),
    "norm alone, no output bias": dict(qk_norm="rms", proj_bias=False),
    "rotation alone, causal": dict(rope="adjacent", causal=True),
    "grouped heads": dict(num_kv_heads=2, qkv_bias=True, qk_norm="layer", rope="half"),
    "across heads": dict(qk_norm="rms", norm_across_heads=True, rope="half"),
    "across heads, grouped": dict(qk_norm="layer", norm_across_heads=True, num_kv_heads=1),
}
LAYERS = {
    "Linear": (lambda: layers.Linear(WIDTH, 5, bias=True), lambda: ()),
    "norm": (lambda: layers.NormModulate(WIDTH), lambda: (drawn(3, WIDTH), drawn(3, WIDTH))),
    "norm, affine": (
        lambda: layers.NormModulate(WIDTH, kind="layer", elementwise_affine=True, bias=True, eps=1e-5),
        lambda: (drawn(3, 1, WIDTH), tokens()),
    ),
    "SeparateAttention": (
        lambda: layers.SeparateAttention(WIDTH, 4, qk_norm="rms", rope="adjacent"),
        lambda: (table(),),
    ),
    "CrossAttention": (lambda: layers.CrossAttention(WIDTH, 4, context_dim=12), lambda: (drawn(3, 5, 12),)),
    "CrossAttention, norm": (
        lambda: layers.CrossAttention(WIDTH, 4, qkv_bias=True, qk_norm="layer"),
        lambda: (drawn(3, 5, WIDTH),),
    ),
    "CrossAttention, norm across heads": (
        lambda: layers.CrossAttention(WIDTH, 4, context_dim=12, qk_norm="rms", norm_across_heads=True),
        lambda: (drawn(3, 5, 12),),
    ),
    "DiTBlock": (lambda: layers.DiTBlock(WIDTH, 4), lambda: (drawn(3, WIDTH),)),
    "DiTBlock, per token": (
        lambda: layers.DiTBlock(WIDTH, 4, qk_norm="rms", rope="half", act="swiglu"),
        lambda: (tokens(), table()),
    ),
    "ViTBlock": (lambda: layers.ViTBlock(WIDTH, 4), lambda: ()),
    "ViTBlock, everything": (
        lambda: layers.ViTBlock(WIDTH, 4, qkv_bias=True, qk_norm=True, init_values=0.1, rope="adjacent"),
        lambda: (table(),),
    ),
    "pMF's block": (lambda: blocks.Block(TINY), lambda: (rope(),)),
    "pMF's last layer": (lambda: blocks.FinalLayer(TINY), lambda: ()),
    **{
        f"Attention, {name}": (
            lambda options=options: layers.Attention(WIDTH, 4, **options),
            lambda options=options: (table(),) if "rope" in options else (),
        )
        for name, options in ATTENTIONS.items()
    },
    **{
        f"Mlp, {act}": (lambda act=act: layers.Mlp(WIDTH, 21, act=act), lambda: ())
        for act in ("swiglu", "gelu", "gelu_tanh")
    },
    "Mlp without bias": (lambda: layers.Mlp(WIDTH, 21, bias=False), lambda: ()),
}


def parts(name):
    """A layer, its inputs, and a tangent of the last samples of each tensor among them."""
    torch.manual_seed(1)
    make, others = LAYERS[name]
    layer, inputs = randomise(make()), (tokens(), *others())
    return layer, inputs, tuple(torch.randn_like(x) if isinstance(x, torch.Tensor) else None for x in inputs)


def expected(layer, inputs, dots):
    """Value and tangent by torch.func.jvp."""
    moving = [i for i, dot in enumerate(dots) if dot is not None]

    def of_moving(*values):
        given = list(inputs)
        for i, value in zip(moving, values, strict=True):
            given[i] = value
        return layer(*given)

    return torch.func.jvp(of_moving, tuple(inputs[i] for i in moving), tuple(dots[i] for i in moving))


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [1, 3])
def test_forward_dual_is_forward_and_its_jvp(name, rows):
    """Given Duals, plain pairs, or tensors inside pmf.jvp."""
    layer, inputs, dots = parts(name)
    value, tangent = expected(layer, inputs, dots)
    duals = [x if dot is None else Dual(x, dot[3 - rows :]) for x, dot in zip(inputs, dots, strict=True)]
    y, y_dot = layer.forward_dual(*duals)
    assert relative_error(y, value) < 1e-12
    assert relative_error(y_dot, tangent[3 - rows :]) < 1e-12
    assert not y_dot.requires_grad and y.requires_grad == any(True for _ in layer.parameters())
    pairs = [tuple(x) if isinstance(x, Dual) else x for x in duals]
    assert all(map(torch.equal, layer.forward_dual(*pairs), (y, y_dot)))
    if rows == 3:
        moved = [0 if dot is None else dot for dot in dots]
        assert all(
            relative_error(*pair) < 1e-12 for pair in zip(pmf.jvp(layer, inputs, tuple(moved)), (y, y_dot), strict=True)
        )


@pytest.mark.parametrize("name", LAYERS)
def test_backward_keeps_nothing_of_the_tangent(name):
    layer, inputs, dots = parts(name)
    inputs = [x.requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
    duals = [x if dot is None else Dual(x, dot) for x, dot in zip(inputs, dots, strict=True)]
    trained = [*layer.parameters(), *(x for x in inputs if isinstance(x, torch.Tensor))]
    plain = saved_bytes(lambda: layer(*inputs), layer.parameters())
    assert saved_bytes(lambda: layer.forward_dual(*duals).value, layer.parameters()) <= plain
    gradients = [
        torch.autograd.grad(run().square().sum(), trained)
        for run in (lambda: layer(*inputs), lambda: layer.forward_dual(*duals).value)
    ]
    assert all(map(torch.equal, *gradients))


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("norm", ["rms", "layer"])
def test_cross_attention_is_that_of_torch(norm, across):
    layer = randomise(layers.CrossAttention(WIDTH, 4, context_dim=12, qk_norm=norm, norm_across_heads=across))
    x, context, lengths = tokens(), drawn(3, 5, 12), torch.tensor([5, 1, 3])

    def heads(x, norm=None):
        x = x if norm is None or not across else norm(x)
        x = x.unflatten(-1, (4, -1))
        return (x if norm is None or across else norm(x)).transpose(1, 2)

    k, v = layer.kv(context).chunk(2, -1)
    mask = (torch.arange(5) < lengths[:, None])[:, None, None]
    mixed = F.scaled_dot_product_attention(
        heads(layer.q(x), layer.q_norm), heads(k, layer.k_norm), heads(v), attn_mask=mask
    )
    expected = layer.proj(mixed.transpose(1, 2).flatten(2))
    assert relative_error(layer(x, context, key_lengths=lengths), expected) < 1e-12


def test_block_under_adaln_takes_the_tangent_of_its_condition():
    block = randomise(blocks.Block(ADALN))
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
        assert torch.equal(blocks.Block(config)(x, table, *condition), x)


def test_mlp_padding_changes_nothing():
    mlp = randomise(layers.Mlp(WIDTH, TINY.mlp_width, act="swiglu", bias=False))
    assert mlp.w1.out_features % 8 != 0
    x = tokens()
    plain = torch.nn.functional.silu(x @ mlp.w1.weight.T) * (x @ mlp.w3.weight.T) @ mlp.w2.weight.T
    assert relative_error(mlp(x), plain) < 1e-14


def test_initialisation_follows_the_published_laws():
    torch.manual_seed(0)
    config = TINY.__class__(hidden_size=512, num_heads=8)
    linear = blocks.Block(config).mlp.w1
    assert linear.weight.std().item() == pytest.approx(0.32 / 512**0.5, rel=0.02)
    embedder = layers.ScalarEmbedder(512)
    assert embedder.fc1.weight.std().item() == pytest.approx(1 / 256**0.5, rel=0.02)
    assert embedder.fc1.bias.abs().max() == 0
    patch = layers.PatchEmbed(256, 16, 3, 512, bottleneck=128, positions=True, prefix_length=20)
    assert patch.positions.std().item() == pytest.approx(0.02, rel=0.02)
    fan_in, fan_out = 3 * 16 * 16, 128
    assert patch.proj1.weight.abs().max().item() == pytest.approx((6 / (fan_in + fan_out)) ** 0.5, rel=0.01)


def test_weights_are_joined_once_while_held():
    attention = randomise(blocks.Block(TINY)).attn
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
    norm, x = randomise(layers.NormModulate(WIDTH, elementwise_affine=True)), tokens()
    scale, shift = torch.randn(2, 3, WIDTH, dtype=torch.float64)
    assert torch.equal(norm(x=x, shift=shift, scale=scale), norm(x, scale, shift))


def test_forward_refuses_a_tangent():
    norm, x = randomise(layers.NormModulate(WIDTH, elementwise_affine=True)), tokens()
    assert torch.equal(norm(Dual(x)), norm(x))
    with pytest.raises(InputError, match=r"^NormModulate: forward takes values only, got a tangent; use forward_dual"):
        norm(Dual(x, x))


def test_a_missing_context_is_one_line():
    x = torch.randn(2, 5, 64)
    block = layers.BasicTransformerBlock(64, 4, 16, cross_attention_dim=8)
    with pytest.raises(InputError, match=r"^BasicTransformerBlock: encoder_hidden_states must be given .*, got None$"):
        block(x, timestep=x[:, 0])


LAST_WEIGHTS = {
    "Attention": (lambda: layers.Attention(WIDTH, 4), "proj.weight"),
    "Attention's bias": (lambda: layers.Attention(WIDTH, 4), "proj.bias"),
    "Mlp": (lambda: layers.Mlp(WIDTH, 40), "fc2.weight"),
    "ViTBlock": (lambda: layers.ViTBlock(WIDTH, 4, init_values=0.3), "ls2.gamma"),
    "WideLinear": (lambda: layers.WideLinear(WIDTH, 8), "weight"),
}


@pytest.mark.parametrize("name", LAST_WEIGHTS)
@pytest.mark.parametrize("input_moves", [False, True])
def test_a_weight_and_the_input_move(name, input_moves):
    make, weight = LAST_WEIGHTS[name]
    layer = randomise(make())
    primals = layer.get_parameter(weight).detach(), tokens()
    dots = torch.randn_like(primals[0]), torch.randn_like(primals[1]) if input_moves else torch.zeros_like(primals[1])

    def run(weight_value, x):
        return torch.func.functional_call(layer, {weight: weight_value}, (x,))

    _, dot = pmf.jvp(run, primals, dots if input_moves else (dots[0], None))
    assert relative_error(dot, torch.func.jvp(run, primals, dots)[1]) < 1e-12


class _Doubled(torch.nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["class", "forward"])
@pytest.mark.parametrize("make", [lambda: layers.Attention(WIDTH, 4).double(), lambda: layers.Mlp(WIDTH, 40).double()])
def test_projections_that_are_more_than_their_weights_are_refused(make, change):
    layer = make()
    last = layer.projections()[1]
    if change == "class":
        last.__class__ = _Doubled
    else:
        last.forward = lambda x: 2 * x
    with pytest.raises(InputError, match=r"projections must be nn.Linear layers, got .* with a forward of its own"):
        layer(tokens())


@pytest.mark.parametrize("name", ["ViTBlock, everything", "Mlp, gelu", "CrossAttention, norm"])
def test_hooks_of_parts_are_warned_of(name):
    """Tools that watch every module set them."""
    layer, x, _ = parts(name)
    expected = layer(*x)
    for module in layer.modules():
        module.register_forward_hook(lambda module, inputs, output: None)
    with pytest.warns(UserWarning, match=r"^(Attention|Mlp): hooks of its parts do not run"):
        assert torch.equal(layer(*x), expected)


def test_parametrised_projections_are_taken():
    layer = layers.Attention(WIDTH, 4).double()
    torch.nn.utils.parametrizations.weight_norm(layer.qkv)
    layer.qkv.parametrizations.weight.original0.data.mul_(2)
    plain = layers.Attention(WIDTH, 4).double()
    plain.load_state_dict({"qkv.weight": layer.qkv.weight.detach(), **layer.proj.state_dict(prefix="proj.")})
    x = tokens()
    assert torch.equal(layer(x), plain(x))
    layer(x).sum().backward()
    assert layer.qkv.parametrizations.weight.original1.grad is not None


@pytest.mark.parametrize("change", ["stride", "padding"])
def test_another_convolution_of_patches_is_refused(change):
    layer = layers.PatchEmbed(8, 4, 3, WIDTH)
    layer.proj = torch.nn.Conv2d(3, WIDTH, 4, **{"stride": 4, change: 2})
    with pytest.raises(InputError, match=r"^PatchEmbed: proj must be a Conv2d of square patches, got Conv"):
        layer(torch.randn(2, 3, 8, 8))


def replaced(layer, name, part):
    setattr(layer, name, part)
    return layer.double()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda x: replaced(layers.Attention(WIDTH, 4, qk_norm="rms"), "k_norm", torch.nn.LayerNorm(WIDTH // 4))(x),
            "Attention: with qk_norm='rms' q_norm and k_norm must be as they were, got LayerNorm",
        ),
        (
            lambda x: replaced(layers.CrossAttention(WIDTH, 4, qk_norm="layer"), "q_norm", torch.nn.Identity())(x, x),
            "with qk_norm='layer' q_norm and k_norm must be as they were, got Identity",
        ),
        (
            lambda x: replaced(layers.SeparateAttention(WIDTH, 4), "k_proj", torch.nn.Linear(WIDTH, WIDTH))(x),
            "Attention: projections must all have a bias, or none of them",
        ),
        (
            lambda x: layers.PatchEmbed(4, 4, 3, WIDTH, positions=True)(torch.randn(2, 3, 8, 8)),
            "PatchEmbed: images and prefix must make 1 tokens, got 4",
        ),
        (lambda x: layers.Attention(WIDTH, 4)(x[0]), r"Attention: x must be a tensor \[B, S, \d+\], got \[\d+, \d+\]"),
        (lambda x: layers.Attention(WIDTH, 4)(x[..., 1:]), r"Attention: x must be a tensor \[B, S, \d+\], got"),
        (lambda x: layers.CrossAttention(WIDTH, 4)(x, None), "CrossAttention: context must be a tensor .*got NoneType"),
        (lambda x: layers.Attention(WIDTH, 0), "Attention: dim must be a multiple of num_heads, got .* and 0"),
        (lambda x: layers.Attention(WIDTH, 4).double()(x, key_lengths=x[:, 0, 0]), "key_lengths .*, got torch.float64"),
        (lambda x: layers.BasicTransformerBlock(WIDTH, 1, WIDTH)(x), "timestep must be a floating tensor, got None"),
        (
            lambda x: layers.BasicTransformerBlock(WIDTH, 1, WIDTH, norm_type="ada_norm_single")(x, timestep=x[:, 0]),
            r"timestep must be \[B, \d+\] with ada_norm_single, got \[3, \d+\]",
        ),
    ],
)
def test_bad_input_of_layers_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(tokens())
    assert "\n" not in str(error.value)
