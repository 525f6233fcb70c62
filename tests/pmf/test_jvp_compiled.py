"""`pmf.jvp` under torch.compile, in one graph: functions with a rule and without, and a network of them."""

import functools
import operator
import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from einops import einsum, pack, rearrange, reduce, repeat, unpack
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

import pmf
from pmf.counting import saved_bytes
from tests.pmf.jvp_checks import F64, PARTITIONED, drawn
from tests.pmf.test_jvp_refusals import Scaled

X = drawn(3, 4, 5)


def compiled(function, *given, **options):
    torch._dynamo.reset()
    x = torch.randn(3, 4, 5, dtype=torch.float64)
    call = torch.compile(
        lambda x: pmf.jvp(lambda y: function(y, *given, **options), (x,), (x.cos(),)),
        fullgraph=True,
        backend="aot_eager",
    )
    with sdpa_kernel(SDPBackend.MATH):
        return call(x), torch.func.jvp(lambda y: function(y, *given, **options), (x,), (x.cos(),))


@pytest.mark.parametrize(
    ("function", "given"),
    [(F.silu, ()), (F.relu, ()), (F.leaky_relu, (0.2,)), (F.mish, ()), (F.dropout, (0.5, False)),
     (F.dropout, (0.0,)), (F.dropout1d, (0.5, False)), (F.softmax, (-1,)), (F.layer_norm, ((5,),)), (F.gelu, ()),
     (torch.var, (-1,)), (operator.pow, (2,)), (operator.mul, (torch.ones(5),)),
     (lambda x: torch.where(x > 0, x, x < x.cos()), ()), (lambda x: x * x.isfinite(), ()),
     (lambda x: pad_sequence([x[0], x[1, :3]], batch_first=True), ()),
     (lambda x: x.new(x.shape).fill_(2.0) * x, ()), (lambda x: x * np.sqrt(2), ()), (lambda x: np.float32(2) - x, ()),
     (lambda x: np.float64(3) / (x + np.sqrt(x.shape[-1])), ()), (lambda x: x * (x > np.float64(0.5)), ())],
)  # fmt: skip
def test_functions_that_networks_call_compile(function, given):
    for got, expected in zip(*compiled(function, *given), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="Dynamo asks no object for its __float__ before torch 2.13")
@pytest.mark.parametrize(
    "function", [lambda x: x * float(x.sum()) + int(x[0, 0, 0] * 10), lambda x: torch.quantile(x, 0.3, -1)]
)
@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_numbers_read_from_moving_tensors_compile(function):
    for got, expected in zip(*compiled(function), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("operation", [operator.matmul, operator.imatmul, operator.sub, operator.truediv])
@pytest.mark.parametrize("operands", ["x and a tensor", "a tensor and x", "two that move"])
def test_compiled_operators_take_their_operands_in_order(operation, operands):
    torch._dynamo.reset()
    x, other, v = drawn(4, 4), drawn(4, 4, seed=1), drawn(4, 4, seed=2)

    def function(x):
        if operands == "two that move":
            return operation(x * 1, x.sin())
        return operation(x * 1, other) if operands == "x and a tensor" else operation(other.clone(), x)

    got = torch.compile(lambda: pmf.jvp(function, (x,), (v,)), fullgraph=True, backend="aot_eager")()
    for a, b in zip(got, torch.func.jvp(function, (x,), (v,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def written_through(x, view):
    with torch.no_grad():  # where it records, PyTorch lets nobody write to one of several views
        y = x * 1
        view(y).mul_(3)
    return y * x


WITHOUT_RULE = {
    "interpolate": lambda x: F.interpolate(x[None], scale_factor=2, mode="bilinear"),
    "pad": lambda x: F.pad(x, (1, 2, 1, 0), mode="reflect"),
    "pools": lambda x: F.adaptive_avg_pool2d(x, 2) * F.max_pool2d(x, 2)[:, :, :2],
    "largest": lambda x: x.amax(1, keepdim=True) + x.max(1, keepdim=True).values * x.argmax(-1, keepdim=True),
    "bounds": lambda x: x.clamp(-0.5, 0.5) * torch.maximum(x, x.cos()),
    "norms": lambda x: F.normalize(x, dim=-1) * x.norm(dim=-1, keepdim=True) + torch.linalg.vector_norm(x),
    "activations": lambda x: (
        F.elu(x) + F.selu(x) * F.hardtanh(x) - F.logsigmoid(x) + F.rrelu(x) + F.glu(x[..., :4]).sum()
    ),
    "powers": lambda x: 2**x + x.abs() ** x,
    "remainders": lambda x: x % 0.3,
    "products": lambda x: torch.addcmul(x, x, x.cos(), value=0.5) + torch.lerp(x, x.sin(), 0.3),
    "order": lambda x: x.sort(-1).values[..., :3] * x.topk(3, -1).values,
    "tuples": lambda x: torch.cat((x, torch.ones(3, 4, 1, dtype=F64), x), dim=-1) * torch.stack((x, x)).sum(),
    "attention": lambda x: F.scaled_dot_product_attention(x, x.cos(), x.sin(), is_causal=True),
    "activations that PyTorch does not list": lambda x: F.hardswish(x) * F.hardsigmoid(x) + F.tanh(x) * F.sigmoid(x),
    "inner functions": lambda x: torch._C._nn.elu(x, 0.5) * torch._C._nn.softplus(x),
    "upsampling": lambda x: F.upsample_nearest(x[None], scale_factor=2),
    "strides": lambda x: (x[1:] * 2).as_strided((3, 4), (8, 2)),
    "names of NumPy": lambda x: torch.softmax(x, axis=1) + x.sum(axis=1, keepdims=True),
    "names of former versions": lambda x: (
        F.l1_loss(x, x.cos(), size_average=False) * F.mse_loss(x, x.cos(), reduce=False)
        + F.smooth_l1_loss(x, x.cos(), reduction="elementwise_mean")
    ),
    "a warning": lambda x: F.softmax(x[0]) + F.mse_loss(x, x[:1].cos()),
    "length": lambda x: x / len(x) + sum(x.unbind()) / x.numel(),
    "classes": lambda x: x * 2 if isinstance(x, torch.Tensor) and torch.is_tensor(x) and not x.is_nested else x * 3,
    "other classes": lambda x: x * 2 if isinstance(x, nn.Parameter | int) else x * 3,
    "a gradient cut": lambda x: x * x.detach().amax(),
    "a view of parts": lambda x: written_through(x, lambda y: torch.split(y, 2, 1)[0]),
    "a view of one more dimension": lambda x: written_through(x, lambda y: torch.atleast_3d(y)[0]),
    "a broadcast view": lambda x: written_through(x, lambda y: torch.broadcast_tensors(y, x)[0]),
}


ASKED = {
    "sizes": lambda x: x * x.size(0) / x.dim() + x.shape[1] * len(x) * x.ndim * x.itemsize,
    "kinds": lambda x: x * 2 if x.is_floating_point() and x.dtype == F64 and not x.is_nested and not x.is_cuda else x,
    "views": lambda x: x.mT @ x + x.flatten(1).sum() + x.data.mean() + sum(x.chunk(2, 1)).sum(),
    "powers in place": lambda x: operator.ipow(x.clone(), 2) + operator.ipow(x.abs(), x.cos()),
    "writing": lambda x: x.clone().mul_(2).index_fill_(0, torch.tensor([0]), 1.0),
    "writing a diagonal": lambda x: (x[0] @ x[0].mT).fill_diagonal_(2.0, wrap=True) @ x,
}
"""What networks ask a tensor, and its methods."""


@pytest.mark.parametrize("name", [*WITHOUT_RULE, *ASKED])
def test_compiled_blocks_inside_an_eager_call(name):
    torch._dynamo.reset()
    function = (WITHOUT_RULE | ASKED)[name]
    block = torch.compile(function, fullgraph=True, backend="aot_eager")
    x, v = drawn(3, 4, 5).requires_grad_(), drawn(3, 4, 5, seed=1)
    got = pmf.jvp(lambda x: block(x.sin()), (x,), (v,))
    expected = pmf.jvp(lambda x: function(x.sin()), (x,), (v,))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    one, other = (torch.autograd.grad(out.square().sum(), x)[0] for out, _ in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", [*WITHOUT_RULE, *ASKED])
def test_functions_without_rule_compile(name):
    for got, expected in zip(*compiled((WITHOUT_RULE | ASKED)[name]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


def test_a_compiled_floor_stands_still():
    torch._dynamo.reset()
    x, v = 3 * drawn(3, 4, 5), drawn(3, 4, 5, seed=1)
    call = torch.compile(lambda x: pmf.jvp(lambda x: x * (x // 0.3) + 2 // x, (x,), (v,)), fullgraph=True)
    out, dot = call(x)
    torch.testing.assert_close(out, x * (x / 0.3).floor() + (2 / x).floor())
    torch.testing.assert_close(dot, v * (x / 0.3).floor())


W = drawn(10, 7)


def with_einops(x):
    patches = rearrange(x, "b (h p) w -> b h (p w)", p=2)
    patches = patches * repeat(x.mean((1, 2)), "b -> b h d", h=2, d=1)
    products = einsum(patches, W, "b h c, c d -> b h d")
    tokens, shapes = pack([products, reduce(products, "b h d -> b d", "max")], "b * d")
    parts = unpack(tokens.sin(), shapes, "b * d")
    return rearrange([parts[0][:, 0], parts[1]], "k b d -> b (k d)")


@pytest.mark.skipif(torch.__version__ < (2, 13), reason="Dynamo takes a function of einops as one operator")
def test_einops_compiles():
    for got, expected in zip(*compiled(with_einops), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    "function",
    [
        nn.SiLU(inplace=True),
        nn.ReLU(inplace=True),
        nn.ELU(inplace=True),
        lambda y: F.leaky_relu(y, 0.1, True),
        lambda y: F.hardtanh(y, -0.5, 0.5, inplace=True),
    ],
)
def test_activations_in_place_compile(function):
    """The view sees the change; backward finds what it has kept as it was."""

    def network(x):
        y = x.sin()
        view = y[:, 1:]
        return function(y) * y.exp() + view.sum()

    torch._dynamo.reset()
    x, v = drawn(3, 4, 5).requires_grad_(), drawn(3, 4, 5, seed=1)
    got = torch.compile(lambda x: pmf.jvp(network, (x,), (v,)), fullgraph=True, backend="aot_eager")(x)
    expected = pmf.jvp(network, (x,), (v,))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    one, other = (torch.autograd.grad(u.square().sum(), x)[0] for u, _ in (got, expected))
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("function", "kept"), [(F.dropout, 1), (F.dropout2d, 25)])
@pytest.mark.parametrize("inplace", [False, True])
def test_value_and_tangent_of_a_compiled_dropout_lose_the_same(function, kept, inplace):
    """`kept` numbers live or die together."""
    torch._dynamo.reset()
    x, v = drawn(40, 8, 5, 5).requires_grad_(), drawn(40, 8, 5, 5, seed=1)

    def network(x):
        return function(x * 1, 0.25, inplace=inplace)

    out, dot = torch.compile(lambda x: pmf.jvp(network, (x,), (v,)), fullgraph=True, backend="aot_eager")(x)
    mask = out / x
    torch.testing.assert_close(dot / v, mask)
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], mask)
    groups = mask.reshape(-1, kept)
    torch.testing.assert_close(groups, groups[:, :1].expand_as(groups))
    assert set(groups[:, 0].round(decimals=9).tolist()) == {0, round(4 / 3, 9)}
    deviation = (0.25 * 0.75 / len(groups)) ** 0.5
    assert abs((groups[:, 0] > 0).double().mean() - 0.75) < 5 * deviation


@pytest.mark.parametrize("training", [True, False])
def test_a_compiled_batch_norm_updates_its_averages_once(training):
    torch._dynamo.reset()
    x, v = drawn(6, 4, 3, 3), drawn(6, 4, 3, 3, seed=1)
    norms = [nn.BatchNorm2d(4).to(F64).train(training) for _ in range(2)]
    expected = pmf.jvp(norms[0], (x,), (v,))
    got = torch.compile(lambda x: pmf.jvp(norms[1], (x,), (v,)), fullgraph=True, backend="aot_eager")(x)
    for a, b in zip([*got, *norms[1].buffers()], [*expected, *norms[0].buffers()], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert norms[1].num_batches_tracked == int(training)


@pytest.mark.parametrize(
    ("function", "given", "message"),
    [
        (F.rrelu, (0.1, 0.3, True), "rrelu has no rule that compiles"),
        (F.alpha_dropout, (0.1, True), "alpha_dropout has no rule that compiles"),
        (torch.native_dropout, (0.5, True), "native_dropout has no rule that compiles"),
        (torch.ops.aten.native_dropout, (0.5, True), "has no rule that compiles"),
        (lambda x: Scaled.apply(x), (), "Scaled, an autograd.Function, has no rule that compiles"),
        (lambda x: torch.segment_reduce(x, "sum", lengths=torch.tensor([3])), (), "segment_reduce"),
    ],
)
@pytest.mark.parametrize("inside", ["whole call", "block"])
def test_a_function_that_compilers_cannot_follow_is_named(function, given, message, inside):
    torch._dynamo.reset()
    options = dict(fullgraph=True, backend="aot_eager")
    block = torch.compile(lambda x: function(x, *given), **options)
    call = block if inside == "block" else lambda x: function(x, *given)
    call = functools.partial(pmf.jvp, call, (X,), (X.cos(),))
    with pytest.raises(Exception) as raised:
        call() if inside == "block" else torch.compile(call, **options)()
    # Compilers quote the code that they trace, the lines above with the messages too.
    assert re.search(rf"(pmf\.jvp: |use forward AD with ).*{message}", f"{raised.value} {raised.value.__cause__}")


def test_an_apply_that_was_looked_up_inside_a_call_compiles_after_it():
    torch._dynamo.reset()
    kept = []
    pmf.jvp(lambda x: kept.append(Scaled.apply) or x * 2, (X,), (X,))
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(Scaled.apply(x.sin()).sum(), x)
    block = torch.compile(lambda x: kept[0](x.sin()), fullgraph=True, backend="aot_eager")
    assert torch.equal(torch.autograd.grad(block(x).sum(), x)[0], expected[0])
    torch._dynamo.reset()
    out, dot = pmf.jvp(lambda y: y * block(x), (X,), (1,))  # inside another call, on what stands still
    assert torch.equal(dot, Scaled.apply(x.sin())) and out.requires_grad


def test_what_a_compiled_block_gave_stands_still_after_the_call():
    torch._dynamo.reset()
    block = torch.compile(torch.sin, fullgraph=True, backend="aot_eager")
    x, v, kept = drawn(3, 4), drawn(3, 4, seed=1), []

    def network(x):
        kept.append(block(x))
        return sum(kept) if len(kept) > 1 else kept[0] * 1

    pmf.jvp(network, (x,), (v,))
    torch.testing.assert_close(pmf.jvp(network, (x,), (v,)), (2 * x.sin(), v * x.cos()))
    assert type(kept[0] * 2) is torch.Tensor


def written_in_part(x, still):
    still[1:].copy_(x[1:] * 2)
    return still * x


def written_behind_a_view(x, still):
    every_second, sum_before = still.flatten()[::2], still + 1
    still.mul_(x)
    return every_second.sum() * x + sum_before


STILL_BLOCKS = {
    "read": lambda x, still: x * still.cos() + still.sum(),
    "stacked": lambda x, still: torch.cat((x, still)).sum(0) + still[0],
    "written in part": written_in_part,
    "written behind a view": written_behind_a_view,
}


@pytest.mark.parametrize("name", STILL_BLOCKS)
def test_a_compiled_block_takes_tensors_of_the_call_that_do_not_move_yet(name):
    """They are made like one that moves, and may be written to in the block and after it."""

    def network(block, x):
        still = x.new_ones(3, 4)
        view = still[:2]
        first = block(x.sin(), still)
        still.add_(x)
        return first * 2 + block(x.cos(), still) + view.sum()

    torch._dynamo.reset()
    x, v, eager = drawn(3, 4), drawn(3, 4, seed=1), STILL_BLOCKS[name]
    block = torch.compile(eager, fullgraph=True, backend="aot_eager")
    got, expected = (pmf.jvp(functools.partial(network, one), (x,), (v,)) for one in (block, eager))
    torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)


class UNet(nn.Module):
    """A small UNet of PyTorch's own layers, with what such networks use: z [B, 3, H, W], t and r [B]."""

    def __init__(self, width=8):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.time = nn.Conv2d(3, width, 3, padding=1), nn.Linear(4, width)
        self.block = nn.Sequential(nn.GroupNorm(2, width), nn.SiLU(inplace=True), nn.Conv2d(width, width, 3, padding=1))
        self.down, self.up = nn.Conv2d(width, width, 3, 2, 1), nn.Upsample(scale_factor=2.0)
        self.attention = nn.MultiheadAttention(width, 2, batch_first=True)
        self.last = nn.Conv2d(2 * width, 3, 1)
        self.double()

    def forward(self, z, t, r):
        frequencies = torch.arange(1, 3, device=z.device) * t[:, None]
        c = self.time(torch.cat((frequencies.sin(), frequencies.cos()), 1) * (t - r)[:, None])
        fine = self.first(z) + F.silu(c)[..., None, None]
        coarse = self.down(fine + self.block(fine * 1))
        tokens = coarse.flatten(2).transpose(1, 2)
        tokens = tokens + self.attention(tokens, tokens, tokens, need_weights=False)[0]
        coarse = tokens.mT.unflatten(2, coarse.shape[2:])
        return self.last(torch.cat((fine, self.up(coarse)), dim=1))


def test_a_compiled_network_without_rules_saves_the_bytes_of_its_compiled_forward():
    torch._dynamo.reset()
    network = UNet()
    z, v, t = drawn(2, 3, 8, 8), drawn(2, 3, 8, 8, seed=1), torch.rand(2, dtype=F64)
    forward = torch.compile(network, **PARTITIONED)
    call = torch.compile(lambda *given: pmf.jvp(network, given, (v, 1, 0)), **PARTITIONED)
    results = []
    for one in (call, lambda *given: pmf.jvp(network, given, (v, 1, 0))):
        network.zero_grad()
        u, du = one(z, t, t / 2)
        (u + 0.3 * du).square().mean().backward()
        results.append([u, du, *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    plain = saved_bytes(lambda: forward(z, t, t / 2), network.parameters())
    assert saved_bytes(lambda: call(z, t, t / 2), network.parameters()) <= plain
