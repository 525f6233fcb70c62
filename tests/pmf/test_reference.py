"""Reference ops in float64: values against plain formulas, tangents against torch.func.jvp."""

import math

import pytest
import torch
import torch.nn.functional as F

from pmf import Dual, ops, reference
from pmf.reference import norm
from tests.networks import relative_error

B, S, C, H, D = 3, 7, 12, 2, 8


def draw(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def tables(length, *samples):
    angle = draw(*samples, length, D // 2)
    return angle.cos(), angle.sin()


def patch_primals(prefix):
    positions = draw(4 + (3 if prefix else 0), C)
    return (
        draw(B, 2, 8, 8),
        draw(5, 2, 4, 4),
        draw(5),
        draw(C, 5, 1, 1),
        draw(C),
        positions,
        draw(B, 3, C) if prefix else None,
    )


def with_lengths(q, k, v, **options):
    """Attention with a length for each of the last samples."""
    lengths = torch.tensor([4, 1, k.value.shape[1]])
    return reference.attention(q, k, v, key_lengths=lengths[B - len(q.value) :], **options)


CASES = {
    "norm rms": (
        reference.norm_modulate,
        lambda: (draw(B, S, C), draw(C), draw(B, C), draw(B, C)),
        (0, 2, 3),
        {},
    ),
    "norm layer": (
        reference.norm_modulate,
        lambda: (draw(B, S, C), None, draw(B, C), None),
        (0, 2),
        dict(kind="layer"),
    ),
    "norm plain": (reference.norm_modulate, lambda: (draw(B, S, C), None, None, None), (0,), {}),
    "norm shift": (
        reference.norm_modulate,
        lambda: (draw(B, S, C), draw(C), None, draw(B, C)),
        (0, 3),
        {},
    ),
    "residual": (
        reference.residual_norm_modulate,
        lambda: (draw(B, S, C), draw(B, S, C), draw(B, C), draw(C), draw(B, C), draw(B, C)),
        (0, 1, 2, 4, 5),
        {},
    ),
    "residual channel": (
        reference.residual_norm_modulate,
        lambda: (draw(B, S, C), draw(B, S, C), draw(C), draw(C), None, None),
        (0, 1),
        {},
    ),
    "rope": (
        reference.qk_norm_rope,
        lambda: (draw(B, S, 3, H, D), draw(D), draw(D), *tables(S - 2)),
        (0,),
        dict(prefix_length=2),
    ),
    "rope half of grouped heads": (
        reference.qk_norm_rope,
        lambda: (draw(B, S, 2 * H, D), draw(D), None, *tables(S)),
        (0,),
        dict(norm="layer", pairs="half", num_kv_heads=1),
    ),
    "rope across heads": (
        reference.qk_norm_rope,
        lambda: (draw(B, S, 3, H, D), draw(H * D), draw(H * D), *tables(S - 1)),
        (0,),
        dict(across_heads=True, prefix_length=1),
    ),
    "rope alone": (reference.norm_rope, lambda: (draw(B, S, H, D), None, *tables(S)), (0,), dict(norm=None)),
    "heads normalised": (
        reference.norm_rope,
        lambda: (draw(B, S, H, D), draw(D), None, None),
        (0,),
        dict(norm="layer"),
    ),
    "attention": (
        reference.attention,
        lambda: (draw(B, S, H, D), draw(B, 5, H, D), draw(B, 5, H, D)),
        (0, 1, 2),
        dict(scale=D**-0.5),
    ),
    "norm per token": (
        reference.norm_modulate,
        lambda: (draw(B, S, C), draw(C), draw(B, S, C), draw(B, S, C)),
        (0, 2, 3),
        dict(kind="layer"),
    ),
    "residual per token": (
        reference.residual_norm_modulate,
        lambda: (draw(B, S, C), draw(B, S, C), draw(B, S, C), None, draw(B, C), draw(B, S, C)),
        (0, 1, 2, 4, 5),
        {},
    ),
    "residual without gate": (
        reference.residual_norm_modulate,
        lambda: (draw(B, S, C), draw(B, S, C), None, draw(C), None, None),
        (0, 1),
        {},
    ),
    "gelu": (reference.gelu, lambda: (draw(B, S, C),), (0,), dict(approximate="none")),
    "gelu tanh": (reference.gelu, lambda: (draw(B, S, C),), (0,), dict(approximate="tanh")),
    "attention causal": (
        reference.attention,
        lambda: tuple(draw(B, S, H, D) for _ in range(3)),
        (0, 1, 2),
        dict(scale=D**-0.5, causal=True),
    ),
    "attention grouped": (
        reference.attention,
        lambda: (draw(B, S, 3 * H, D), draw(B, 5, H, D), draw(B, 5, H, D)),
        (0, 1, 2),
        dict(scale=D**-0.5),
    ),
    "attention lengths": (
        with_lengths,
        lambda: (draw(B, S, H, D), draw(B, 5, H, D), draw(B, 5, H, D)),
        (0, 1, 2),
        dict(scale=D**-0.5),
    ),
    "attention grouped causal lengths": (
        with_lengths,
        lambda: (draw(B, S, 3 * H, D), draw(B, S, H, D), draw(B, S, H, D)),
        (0, 1, 2),
        dict(scale=D**-0.5, causal=True),
    ),
    "swiglu": (reference.swiglu, lambda: (draw(B, S, 2 * C),), (0,), {}),
    "silu": (reference.silu, lambda: (draw(B, C),), (0,), {}),
    "scalar": (reference.scalar_features, lambda: (draw(B),), (0,), {}),
    "patch": (reference.patch_embed, lambda: patch_primals(False), (0,), {}),
    "patch prefix": (reference.patch_embed, lambda: patch_primals(True), (0, 6), {}),
}


TAKES = {name: (0, 2, 3) for name in CASES if name.startswith("norm")}
TAKES |= {name: (0, 1, 2, 4, 5) for name in CASES if name.startswith("residual")}
TAKES |= {name: (0, 6) for name in CASES if name.startswith("patch")}
"""Inputs that are passed as Duals, for ops where some of them may be absent or per channel."""


def run(op, primals, dots, tangible, options):
    """Values and tangents of a reference op; its inputs at `tangible` are Duals, even absent ones."""
    given = (Dual(p, d) if i in tangible else p for i, (p, d) in enumerate(zip(primals, dots, strict=True)))
    results = op(*given, **options)
    duals = [results] if isinstance(results, Dual) else results
    return [dual.value for dual in duals], [dual.dot for dual in duals]


def subsets(indices):
    """All indices together, and each alone."""
    return [indices, *((i,) for i in indices if len(indices) > 1)]


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("rows", [0, 1, B])
def test_tangent_is_the_jvp_of_the_value(name, rows):
    torch.manual_seed(0)
    op, make, tangible, options = CASES[name]
    primals, takes = make(), TAKES.get(name, tangible)
    nothing = (None,) * len(primals)
    for chosen in subsets(tangible):
        dots = {i: draw(rows, *primals[i].shape[1:]) for i in chosen}
        value, dot = run(op, primals, [dots.get(i) for i in range(len(primals))], takes, options)

        def of(*moving, chosen=chosen):
            given = [p if p is None else p[len(p) - rows :] if i in tangible else p for i, p in enumerate(primals)]
            for i, m in zip(chosen, moving, strict=True):
                given[i] = m
            return tuple(run(op, given, nothing, takes, options)[0])

        _, expected = torch.func.jvp(of, tuple(primals[i][B - rows :] for i in chosen), tuple(dots[i] for i in chosen))
        for v, d, e in zip(value, dot, expected, strict=True):
            d = torch.zeros_like(e) if d is None else d
            assert d.shape[0] == rows and d.shape[1:] == v.shape[1:]
            assert torch.allclose(d, e, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", CASES)
def test_tangent_is_never_recorded_and_absent_without_tangents(name):
    torch.manual_seed(0)
    op, make, tangible, options = CASES[name]
    primals = tuple(None if p is None else p.requires_grad_() for p in make())
    dots = tuple(draw(*p.shape) if i in tangible else None for i, p in enumerate(primals))
    takes = TAKES.get(name, tangible)
    value, dot = run(op, primals, dots, takes, options)
    alone, absent = run(op, primals, (None,) * len(primals), takes, options)
    for v, d, a, n in zip(value, dot, alone, absent, strict=True):
        assert not d.requires_grad and v.requires_grad and n is None
        assert torch.equal(v, a)
    leaves = [p for p in primals if p is not None]
    beside, without = (torch.autograd.grad([v.sin().sum() for v in values], leaves) for values in (value, alone))
    assert all(torch.equal(g, w) for g, w in zip(beside, without, strict=True))


def test_norms_are_torchs_own():
    x, weight, scale, shift = CASES["norm rms"][1]()
    expected = F.rms_norm(x, (C,), weight, 1e-6) * (1 + scale[:, None]) + shift[:, None]
    assert relative_error(ops.norm_modulate(x, weight, scale, shift), expected) < 1e-14
    expected = F.layer_norm(x, (C,), weight, eps=1e-6)
    assert relative_error(ops.norm_modulate(x, weight, kind="layer"), expected) < 1e-14


@pytest.mark.parametrize("kind", ["rms", "layer"])
def test_the_gradient_of_a_norm_is_that_of_its_operations(kind):
    torch.manual_seed(0)
    x = draw(B, S, C).requires_grad_()
    weights = draw(B, S, C), draw(B, S, 1)

    def of(statistics):
        """First and second derivatives through both outputs."""
        objective = sum((y.sin() * w).sum() for y, w in zip(statistics(x, kind, 1e-6), weights, strict=True))
        (first,) = torch.autograd.grad(objective, x, create_graph=True)
        return first, *torch.autograd.grad(first.cos().sum(), x)

    for mine, plain in zip(of(norm.normalise), of(norm._statistics), strict=True):
        assert relative_error(mine, plain) < 1e-13


def test_attention_is_torchs_own():
    q, k, v = CASES["attention"][1]()
    heads_first = [x.transpose(1, 2) for x in (q, k, v)]
    expected = F.scaled_dot_product_attention(*heads_first).transpose(1, 2)
    assert relative_error(ops.attention(q, k, v), expected) < 1e-14


def test_rotation_is_complex_multiplication_by_the_angle():
    torch.manual_seed(0)
    grid = 3
    cos, sin = (x.double() for x in reference.rope_tables(grid, D))
    qkv = draw(B, 2 + grid**2, 3, H, D)
    q, k, v = ops.qk_norm_rope(
        qkv, torch.ones(D, dtype=torch.float64), torch.ones(D, dtype=torch.float64), cos, sin, prefix_length=2
    )
    n = F.rms_norm(qkv[:, :, :2], (D,), eps=1e-6)
    turn = torch.complex(cos, sin)[:, None]
    for actual, plain in zip((q, k), n.unbind(2), strict=True):
        pairs = torch.view_as_complex(plain[:, 2:].unflatten(-1, (-1, 2)).contiguous())
        assert relative_error(actual[:, 2:], torch.view_as_real(pairs * turn).flatten(-2)) < 1e-14
        assert torch.equal(actual[:, :2], plain[:, :2])
    assert torch.equal(v, qkv[:, :, 2])


def rotated(x, cos, sin, pairs):
    """The rotation as diffusers' apply_rotary_emb writes it, with tables repeated to D."""
    if pairs == "adjacent":
        cos, sin = cos.repeat_interleave(2, -1), sin.repeat_interleave(2, -1)
        real, imaginary = x.unflatten(-1, (-1, 2)).unbind(-1)
        turned = torch.stack([-imaginary, real], -1).flatten(-2)
    else:
        cos, sin = torch.cat([cos, cos], -1), torch.cat([sin, sin], -1)
        real, imaginary = x.unflatten(-1, (2, -1)).unbind(-2)
        turned = torch.cat([-imaginary, real], -1)
    return x * cos + turned * sin


@pytest.mark.parametrize("across", [False, True])
@pytest.mark.parametrize("samples", [(), (B,)])
@pytest.mark.parametrize("pairs", ["adjacent", "half"])
@pytest.mark.parametrize("norm", ["rms", "layer", None])
def test_heads_are_normalised_by_torch_and_rotated_by_real_formulas(norm, pairs, samples, across):
    torch.manual_seed(0)
    heads, kv_heads, prefix = 3, 2, 2
    qkv, (cos, sin) = draw(B, S, heads + 2 * kv_heads, D), tables(S - prefix, *samples)
    parameters = {}
    options = dict(cos=cos, sin=sin, norm=norm, across_heads=across, pairs=pairs, prefix_length=prefix, eps=None)
    parts = {"q": qkv[:, :, :heads], "k": qkv[:, :, heads : heads + kv_heads]}
    expected = []
    for name, part in parts.items():
        width = (part.shape[2] * D if across else D,)
        weight, bias = (draw(*width), draw(*width)) if norm else (None, None)
        parameters |= {f"{name}_weight": weight, f"{name}_bias": bias}
        wide = part.flatten(2) if across else part
        if norm == "rms":
            wide = F.rms_norm(wide, width, weight) + bias
        elif norm == "layer":
            wide = F.layer_norm(wide, width, weight, bias, torch.finfo(torch.float64).eps)
        n = wide.reshape(part.shape)
        turned = rotated(n[:, prefix:], cos.unsqueeze(-2), sin.unsqueeze(-2), pairs)
        expected.append(torch.cat([n[:, :prefix], turned], 1))
        alone = ops.norm_rope(part, weight, bias=bias, **options)
        assert relative_error(alone, expected[-1]) < 1e-13
        if norm is None:  # y is linear in x
            y, y_dot = ops.norm_rope(Dual(part, part[1:]), **options)
            assert relative_error(y_dot, y[1:]) < 1e-13
    q, k, v = ops.qk_norm_rope(qkv, num_kv_heads=kv_heads, **parameters, **options)
    assert relative_error(q, expected[0]) < 1e-13 and relative_error(k, expected[1]) < 1e-13
    assert torch.equal(v, qkv[:, :, heads + kv_heads :])


def test_rotation_takes_heads_of_any_layout():
    qkv, *rest = CASES["rope"][1]()
    options = CASES["rope"][3]
    expected = reference.qk_norm_rope(Dual(qkv, qkv), *rest, **options)
    turned = qkv.permute(4, 2, 3, 1, 0).contiguous().permute(4, 3, 1, 2, 0)  # the same values, samples innermost
    actual = reference.qk_norm_rope(Dual(turned, turned), *rest, **options)
    assert turned.stride() != qkv.stride() and torch.equal(turned, qkv)
    for x, y in zip(actual, expected, strict=True):
        assert torch.allclose(x.value, y.value, rtol=1e-14, atol=1e-14)
        assert torch.allclose(x.dot, y.dot, rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("pairs", ["adjacent", "half"])
def test_rotation_takes_heads_from_any_place_in_memory(pairs):
    memory, angle = torch.randn(1 + 2 * 3 * 2 * 8), torch.randn(3, 4)
    x = memory[1:].view(2, 3, 2, 8)
    tables = dict(cos=angle.cos(), sin=angle.sin(), norm=None, pairs=pairs)
    actual, expected = (ops.norm_rope(given, **tables) for given in ((x, x[1:]), (x.clone(), x[1:].clone())))
    assert torch.equal(actual.value, expected.value) and torch.equal(actual.dot, expected.dot)


def test_rope_tables_turn_rows_first_then_columns():
    cos, sin = reference.rope_tables(4, 16)
    frequency = 10000.0 ** (-torch.arange(4, dtype=torch.float64) / 4)
    row, column = 2, 3
    angle = torch.cat([row * frequency, column * frequency])
    assert torch.allclose(cos[row * 4 + column], angle.cos().float())
    assert torch.allclose(sin[row * 4 + column], angle.sin().float())


def test_patches_are_laid_out_row_column_channel_and_come_back():
    images = torch.arange(2 * 3 * 4 * 4).reshape(2, 3, 4, 4)
    tokens = reference.patchify(images, 2)
    assert tokens[0, 1].tolist() == [images[0, c, i, 2 + j].item() for i in (0, 1) for j in (0, 1) for c in range(3)]
    assert torch.equal(reference.unpatchify(tokens, 2, 3), images)


def test_scalar_features_are_cosines_then_sines():
    features, _ = reference.scalar_features(Dual(torch.tensor([0.7])))
    assert features[0, 1].item() == pytest.approx(math.cos(0.7 * 10000 ** (-1 / 128)), abs=1e-6)
    assert features[0, 129].item() == pytest.approx(math.sin(0.7 * 10000 ** (-1 / 128)), abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_the_rounded_float32_result(dtype):
    torch.manual_seed(0)
    x, x_dot = torch.randn(2, B, S, C).to(dtype)
    y, y_dot = ops.norm_modulate(Dual(x, x_dot))
    exact, exact_dot = ops.norm_modulate(Dual(x.float(), x_dot.float()))
    assert y.dtype == y_dot.dtype == dtype
    assert torch.equal(y, exact.to(dtype)) and torch.equal(y_dot, exact_dot.to(dtype))
