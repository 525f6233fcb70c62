"""`pmf.dual`: arithmetic on values with tangents against torch.func.jvp, and any module on them."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import pmf
from pmf import layers, ops
from pmf.counting import saved_bytes
from pmf.dual import (
    Dual,
    add,
    checkpoint_values,
    chunk,
    concatenate,
    dual,
    gated_residual,
    multiply,
    pointwise,
)
from pmf.errors import InputError
from tests.networks import relative_error

B, S, C = 4, 5, 8


def drawn(*shape):
    return torch.randn(*shape, dtype=torch.float64)


FUNCTIONS = {  # explicit, in PyTorch, shapes of the inputs
    "add": (add, lambda *x: sum(x), [(B, S, C), (B, 1, C), (C,)]),
    "multiply": (multiply, lambda x, y, z: x * y * z, [(B, S, C), (B, 1, C), (C,)]),
    "multiply, small first": (multiply, torch.mul, [(B, 1, 1), (B, S, C)]),
    "numbers": (
        lambda x: gated_residual(multiply(0.5, x, x), add(x, 3), 0.1),
        lambda x: 0.5 * x * x + 0.1 * (x + 3),
        [(B, C)],
    ),
    "pointwise": (functools.partial(pointwise, F.gelu), F.gelu, [(B, S, C)]),
    "chunk": (lambda x: chunk(x, 4)[2], lambda x: x.chunk(4, -1)[2], [(B, S, C)]),
    "chunk of tokens": (lambda x: chunk(x, 5, 1)[3], lambda x: x.chunk(5, 1)[3], [(B, S, C)]),
    "concatenate": (lambda *x: concatenate(x, 1), lambda *x: torch.cat(x, 1), [(B, 2, C), (B, S, C)]),
    "concatenate channels": (lambda *x: concatenate(x), lambda *x: torch.cat(x, -1), [(B, 2), (B, C)]),
    "gated residual": (gated_residual, lambda x, y, g: x + g[:, None] * y, [(B, S, C), (B, S, C), (B, C)]),
    "gated residual, token": (gated_residual, lambda x, y, g: x + g * y, [(B, S, C)] * 3),
    "gated residual, channel": (gated_residual, lambda x, y, g: x + g * y, [(B, S, C), (B, S, C), (C,)]),
    "gated residual, images": (gated_residual, lambda x, y, g: x + g[:, None, None] * y, [(B, S, B, C)] * 2 + [(B, C)]),
    "residual": (gated_residual, torch.add, [(B, S, C), (B, S, C)]),
    "two dimensions": (gated_residual, lambda x, y, g: x + g * y, [(B, C)] * 3),
}


def moving_sets(shapes):
    """Every way in which some of the inputs move; what has no samples stands still."""
    able = [i for i, shape in enumerate(shapes) if shape[0] == B]
    for mask in range(1, 2 ** len(able)):
        yield [i for k, i in enumerate(able) if mask >> k & 1]


@pytest.mark.parametrize("name", FUNCTIONS)
@pytest.mark.parametrize("rows", [1, 3, B])
def test_tangents_are_those_of_torch_func_jvp(name, rows):
    explicit, plain, shapes = FUNCTIONS[name]
    inputs = [drawn(*shape).requires_grad_() for shape in shapes]
    for moving in moving_sets(shapes):
        dots = [torch.randn_like(x) if i in moving else torch.zeros_like(x) for i, x in enumerate(inputs)]
        for dot in dots:
            if len(dot) == B:
                dot[: B - rows] = 0
        value, expected = torch.func.jvp(plain, tuple(inputs), tuple(dots))
        pairs = [(x, dots[i][B - rows :]) if i in moving else x for i, x in enumerate(inputs)]
        y, y_dot = explicit(*pairs)
        assert torch.equal(y, plain(*inputs)) and y.requires_grad and not y_dot.requires_grad
        assert relative_error(y_dot, expected[B - rows :]) < 1e-13, moving
        assert y_dot.shape == value[B - rows :].shape


@pytest.mark.parametrize("name", FUNCTIONS)
def test_nothing_moves_without_tangents_and_tangents_record_nothing(name):
    explicit, plain, shapes = FUNCTIONS[name]
    inputs = [drawn(*shape).requires_grad_() for shape in shapes]
    assert explicit(*inputs).dot is None
    pairs = [Dual(x, torch.randn_like(x)) if len(x) == B else x for x in inputs]
    assert saved_bytes(lambda: explicit(*pairs), inputs) <= saved_bytes(lambda: plain(*inputs), inputs)


MODULES = {
    "Linear": (lambda: nn.Linear(C, 3), (B, S, C)),
    "Linear without bias": (lambda: nn.Linear(C, 3, bias=False), (B, C)),
    "Conv2d": (lambda: nn.Conv2d(C, 6, 3, stride=2, padding=1, groups=2), (B, C, 6, 6)),
    "Conv2d, circular": (lambda: nn.Conv2d(C, 3, 3, padding=1, padding_mode="circular"), (B, C, 6, 6)),
    "Sequential": (lambda: nn.Sequential(nn.Linear(C, 6), nn.SiLU(), nn.Sequential(nn.Linear(6, 3))), (B, C)),
    "LayerNorm": (lambda: nn.LayerNorm(C), (B, S, C)),
    "ours": (lambda: layers.Mlp(C, 16), (B, S, C)),
    "ours in Sequential": (lambda: nn.Sequential(layers.NormModulate(C), nn.Linear(C, 2)), (B, S, C)),
    "a transformer of PyTorch": (lambda: nn.TransformerEncoderLayer(C, 2, 16, 0.0, batch_first=True), (B, S, C)),
}


@pytest.mark.parametrize("name", MODULES)
@pytest.mark.parametrize("rows", [2, B])
def test_modules(name, rows):
    make, shape = MODULES[name]
    torch.manual_seed(0)
    module, x = make().double(), drawn(*shape)
    x_dot = torch.randn_like(x[B - rows :])
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        value, expected = torch.func.jvp(module, (x[B - rows :],), (x_dot,))
    y, y_dot = dual(module, (x, x_dot))
    assert relative_error(y[B - rows :], value) < 1e-12 and relative_error(y_dot, expected) < 1e-12
    assert y.requires_grad and not y_dot.requires_grad
    assert dual(module, x).dot is None and torch.equal(dual(module, x).value, module(x))


def test_an_index_stands_still():
    table, index = nn.Embedding(7, C), torch.tensor([1, 0, 6])
    y, y_dot = dual(table, index)
    assert torch.equal(y, table(index)) and y_dot is None


def test_hooks_run():
    linear = nn.Linear(C, 3).double()
    linear.register_forward_hook(lambda module, inputs, output: 2 * output)
    x = drawn(B, C)
    y, y_dot = dual(nn.Sequential(linear), (x, x))
    assert torch.equal(y, 2 * F.linear(x, linear.weight, linear.bias))
    assert relative_error(y_dot, 2 * x @ linear.weight.T) < 1e-14


def test_hooks_of_our_layers_run():
    norm, x = layers.NormModulate(C), drawn(B, C)
    norm.register_forward_hook(lambda module, inputs, output: 2 * output)
    y, y_dot = dual(norm, (x, x))
    assert (
        torch.equal(y, norm(x)) and relative_error(y_dot, 2 * layers.NormModulate(C).forward_dual((x, x)).dot) < 1e-14
    )


class _Doubled(nn.Linear):
    def forward(self, x):
        return 2 * super().forward(x)


@pytest.mark.parametrize("change", ["parametrised", "own forward", "own class"])
@pytest.mark.parametrize("inside", [False, True], ids=["alone", "inside pmf.jvp"])
def test_changed_linear_layers(change, inside):
    linear, x = (_Doubled if change == "own class" else nn.Linear)(C, C).double(), drawn(B, C)
    if change == "parametrised":
        nn.utils.parametrizations.weight_norm(linear)
        linear.parametrizations.weight.original0.data.mul_(2)
    if change == "own forward":
        linear.forward = lambda x: F.linear(x, linear.weight).square()
    block = layers.CrossAttention(C, 2).double()
    block.q = linear
    function = (lambda x: block(x, x)) if inside else linear
    y, y_dot = pmf.jvp(function, (x[:, None],), (x[:, None],)) if inside else dual(linear, (x, x))
    given = x[:, None] if inside else x
    expected, expected_dot = torch.func.jvp(function, (given,), (given,))
    assert relative_error(y, expected) < 1e-13 and relative_error(y_dot, expected_dot) < 1e-13


def test_functions_of_several_inputs_and_outputs():
    x, y = drawn(B, C), drawn(B, C)
    result = dual(lambda x, y: dict(product=x * y, parts=(x, 3)), (x, x[2:]), y)
    assert relative_error(result["product"].dot, x[2:] * y[2:]) < 1e-14
    assert torch.equal(result["parts"][0].dot, x[2:]) and result["parts"][1] == 3


def test_checkpointed_values_are_recomputed_without_tangents():
    block = layers.DiTBlock(C, 2).double()
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, c = drawn(B, S, C).requires_grad_(), drawn(B, C)
    given = Dual(x, torch.randn_like(x[1:])), Dual(c, torch.randn_like(c[1:]))

    def outcome(run):
        y, y_dot = run()
        return y, y_dot, *torch.autograd.grad(y.square().sum(), [x, *block.parameters()])

    plain = outcome(lambda: block.forward_dual(*given))
    checkpointed = outcome(lambda: pmf.checkpoint_values(block.forward_dual, *given))
    assert all(map(torch.equal, plain, checkpointed))
    assert saved_bytes(lambda: checkpoint_values(block.forward_dual, *given), block.parameters()) <= 8 * (
        x.numel() + c.numel()
    )


def test_checkpointed_values_draw_the_same_random_numbers():
    module, x = nn.Sequential(nn.Linear(C, C), nn.Dropout(), nn.Linear(C, C)).double(), drawn(B, C).requires_grad_()

    def outcome(run):
        torch.manual_seed(0)
        y, y_dot = run(functools.partial(dual, module), Dual(x, torch.ones_like(x)))
        return y, y_dot, *torch.autograd.grad(y.square().sum(), [x, *module.parameters()])

    assert all(map(torch.equal, outcome(lambda layer, x: layer(x)), outcome(checkpoint_values)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x: add((x, x[1:]), (x, x[2:])), r"add: all tangents must cover equally many samples, got \[2, 3\]"),
        (lambda x: add(x, (x[:1], x[:1])), r"add: what has a tangent must have all 2 dimensions and 4 samples"),
        (lambda x: multiply(x, (x[0], x[0])), r"multiply: what has a tangent must .* expand it, got \[8\]"),
        (lambda x: add(x[None], (x, x)), r"add: what has a tangent must have all 3 dimensions and 1 samples"),
        (
            lambda x: add(x, (x, x[:, :1])),
            r"Dual: a tangent must .* value of shape \[4, 8\], tangent of shape \[4, 1\]",
        ),
        (lambda x: dual(nn.Linear(C, 2), Dual(x[1:], x)), r"value of shape \[3, 8\], tangent of shape \[4, 8\]"),
        (lambda x: dual(nn.Linear(C, 2), Dual(x, 1)), r"value of shape \[4, 8\], tangent 1"),
        (lambda x: gated_residual(x, x, x[:, None]), r"gated_residual: gate must have shape .*got \[4, 1, 8\]"),
        (lambda x: multiply((x, x, x)), r"Dual: expected a tensor or a pair \(value, tangent\), got 3 values"),
        (lambda x: chunk(x, 2, 0), "chunk: dim must not be that of the samples, 0, got 0"),
        (lambda x: concatenate([x, x], -2), "concatenate: dim must not be that of the samples, 0, got -2"),
        (lambda x: chunk(x, 3), "chunk: dim -1 must have a size that 3 divides, got 8"),
        (lambda x: concatenate(x, x), "concatenate: parts must be a list of tensors or pairs, got Tensor"),
        (lambda x: concatenate(Dual(x, x)), "concatenate: parts must be a list of tensors or pairs, got Dual"),
        (lambda x: concatenate([]), "concatenate: expected at least one part, got none"),
        (lambda x: concatenate([x, 3]), "concatenate: each part must be a tensor or a pair .*, got int"),
        (lambda x: concatenate([x, x], 5), r"concatenate: dim must be an integer in \[-2, 1\], got 5"),
        (lambda x: chunk(x, 0), "chunk: parts must be an integer of at least 1, got 0"),
        (lambda x: chunk(x, 2.0), "chunk: parts must be an integer of at least 1, got 2.0"),
        (lambda x: chunk(x, 2, "a"), r"chunk: dim must be an integer in \[-2, 1\], got 'a'"),
        (lambda x: chunk(x[0, 0], 2), "chunk: expected tensors with samples, got a tensor without dimensions"),
        (lambda x: chunk(None, 2), "chunk: x must be a tensor or a pair .*, got NoneType"),
        (lambda x: add(), "add: expected at least one argument, got none"),
        (lambda x: add(x, None), "add: each argument must be a tensor, a number or a pair .*, got NoneType"),
        (lambda x: multiply(x, "a"), "multiply: each argument must be a tensor, a number or a pair .*, got str"),
        (lambda x: gated_residual(x, x, "a"), "gated_residual: gate must be a tensor, a number or .*, got str"),
        (lambda x: gated_residual(3, x), "gated_residual: x must be a tensor or a pair .*, got int"),
        (lambda x: gated_residual(x[0], x[0], x[0]), r"gated_residual: x must have shape \[B, ..., C\], got \[8\]"),
        (lambda x: add((x.sum(), x.sum()), 1), "add: each argument must have samples to have a tangent"),
        (lambda x: pointwise(F.gelu, (x.sum(), x.sum())), "pointwise: x must have samples to have a tangent"),
        (lambda x: ops.silu((x.sum(), x.sum())), "silu: x must have samples to have a tangent, got a single number"),
        (lambda x: pointwise(3, x), "pointwise: function must be a function or a module, got int"),
        (lambda x: pointwise(F.gelu, 3), "pointwise: x must be a tensor or a pair .*, got int"),
        (lambda x: dual(None, x), "dual: function must be a function or a module, got NoneType"),
        (lambda x: dual(nn.Linear(C, 2), (x, x[1:]), (x, x[2:])), "dual: all tangents must cover equally many"),
    ],
)
def test_bad_input_is_one_line(call, message):
    with pytest.raises(InputError, match=message) as error:
        call(drawn(B, C))
    assert "\n" not in str(error.value)
