"""`pmf.jvp`: value, tangent and gradients of any function at the bytes of its forward pass; else an error."""

import dataclasses
import functools
import math
import operator
import random

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pmf
from pmf import InputError, layers
from tests.networks import TINY, model_inputs, random_model

F64 = torch.float64


def drawn(*shape, seed=0):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def saved_bytes(run):
    """The bytes of all storages that autograd saves, and the result."""
    seen = {}

    def pack(x):
        storage = x.untyped_storage()
        seen[storage.data_ptr()] = storage.nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        result = run()
    return sum(seen.values()), result


def compare(function, primals, tangents, parameters=()):
    """Value equal bit by bit, tangent and gradients as those of torch.func.jvp, which only then is detached."""
    inputs = [x.clone().requires_grad_() for x in primals]
    expected = [x.clone().requires_grad_() for x in primals]
    torch.manual_seed(1)
    out, dot = pmf.jvp(function, tuple(inputs), tuple(tangents))
    torch.manual_seed(1)
    plain = function(*expected)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = torch.func.jvp(function, tuple(primals), tuple(tangents))
    assert type(out) is torch.Tensor and type(dot) is torch.Tensor and not dot.requires_grad
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    torch.testing.assert_close(dot, wanted.detach(), rtol=1e-10, atol=1e-10)
    if plain.requires_grad:
        weights = drawn(*plain.shape, seed=9) if plain.is_floating_point() else torch.ones_like(plain)
        got, right = (
            torch.autograd.grad((weights * y).sum().real, [*xs, *parameters], allow_unused=True)
            for y, xs in ((out, inputs), (plain, expected))
        )
        for a, b in zip(got, right, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0)


W = drawn(6, 6, seed=3) / 2
MASK = torch.ones(4, 4, dtype=torch.bool).tril()
INDEX = torch.tensor([2, 0, 1, 3, 3, 1])


def in_place(change):
    """A function of a new tensor that `change` writes to; a view of it sees the change."""

    def run(x):
        y = x * 1.5
        view = y[..., :3]
        change(y)
        return torch.cat([y, view], -1)

    return run


def filled(x):
    y = torch.empty_like(x)
    y[..., 0::2] = x[..., 1::2].sin()
    y[..., 1::2] = 2
    return y


def rotary_complex(x):
    turned = torch.view_as_complex(x.unflatten(-1, (3, 2)).contiguous()) * torch.polar(W[:4, :3].exp(), W[:4, 3:])
    return torch.view_as_real(turned).flatten(-2)


def rotary_real(x):
    a, b = x.chunk(2, -1)
    return x * W[0].cos() + torch.cat((-b, a), -1) * W[0].sin()


def heads(x):
    return x.unflatten(-1, (2, 3)).transpose(1, 2)


def attention(**options):
    return lambda x: F.scaled_dot_product_attention(heads(x), heads(x @ W), heads(x.sin()), **options)


UNARY = {  # of x [3, 4, 6]
    "linear": lambda x: F.linear(x, W, W[0]),
    "matmul": lambda x: x @ W,
    "square product": lambda x: x @ x.transpose(1, 2),
    "mul": lambda x: x * x.sum(-1, keepdim=True),
    "quotient": lambda x: x / (2 + x.square()),
    "from number": lambda x: 2 / (2 + x * x) - 1 + (3 - x),
    "pow": lambda x: (x * x + 1) ** 1.5,
    "number to the power": lambda x: 2**x,
    "einsum": lambda x: torch.einsum("bsc,cd,btd->bst", x, W, x),
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu tanh": functools.partial(F.gelu, approximate="tanh"),
    "softmax": lambda x: x.softmax(1),
    "log_softmax": functools.partial(F.log_softmax, dim=-1),
    "sigmoid": lambda x: x.sigmoid() * torch.tanh(x) + torch.relu(x),
    "softplus": lambda x: F.softplus(x) + F.leaky_relu(x) + F.mish(x) + F.hardswish(x) + F.elu(x),
    "roots": lambda x: (x * x + 1).sqrt() + (x * x + 1).rsqrt() + (x.exp() + 1).log() + (x * x + 1).reciprocal(),
    "angles": lambda x: x.sin() + x.cos() + x.abs() + torch.atan2(x, x * x + 1),
    "clamp": lambda x: x.clamp(-0.5, 0.5) + x.clamp(min=0.1),
    "minimum": lambda x: torch.minimum(x, x.flip(-1)) + x.amax(-1, keepdim=True) + x.max(1, keepdim=True).values,
    "sorted": lambda x: x.sort(-1).values.cumsum(1),
    "layer_norm": lambda x: F.layer_norm(x, (6,), W[0], W[1]),
    "layer_norm plain": lambda x: F.layer_norm(x, (4, 6)),
    "rms_norm": lambda x: F.rms_norm(x, (6,), W[0], 1e-6) + F.rms_norm(x, (6,)),
    "group_norm": lambda x: F.group_norm(x, 2, W[0, :4], W[1, :4]) + F.group_norm(x, 4),
    "batch_norm": lambda x: F.batch_norm(x, None, None, W[0, :4], W[1, :4], training=True),
    "batch_norm eval": lambda x: F.batch_norm(x, W[0, :4], W[1, :4].exp(), W[2, :4], None),
    "instance_norm": lambda x: F.instance_norm(x),
    "moving modulation": lambda x: F.layer_norm(x, (6,)) * (1 + x.mean(1, keepdim=True)) + x[:, :1],
    "moving weight": lambda x: F.layer_norm(x, (6,), x[0, 0], x[0, 1]),
    "normalize": lambda x: F.normalize(x, dim=-1) + x / x.norm(dim=-1, keepdim=True),
    "attention": attention(),
    "attention causal": attention(is_causal=True, scale=0.3),
    "attention mask": attention(attn_mask=MASK),
    "attention bias": attention(attn_mask=W[:4, :4]),
    "attention moving bias": lambda x: F.scaled_dot_product_attention(x, x, x, attn_mask=x @ x.mT),
    "attention of groups": lambda x: F.scaled_dot_product_attention(
        x[:, None].expand(3, 4, 4, 6), x[:, None].repeat(1, 2, 1, 1), x[:, None].repeat(1, 2, 1, 1), enable_gqa=True
    ),
    "multi-head": lambda x: F.multi_head_attention_forward(
        x, x, x, 6, 2, torch.cat([W, W.T, W]), W.flatten()[:18], None, None, False, 0.0, W, W[0], need_weights=False
    )[0],
    "rope real": rotary_real,
    "rope complex": rotary_complex,
    "fft": lambda x: torch.fft.irfft(torch.fft.rfft(x, dim=1) * W[:3], dim=1),
    "complex abs": lambda x: torch.complex(x, x.flip(0) + 1).abs(),
    "shapes": lambda x: x.reshape(12, 6).t().unsqueeze(0).expand(2, 6, 12).permute(2, 0, 1).flatten(1).contiguous(),
    "indexing": lambda x: torch.cat([x[:, 1:], x[..., INDEX][:, :1], x[:, None, 2], x[:, [0, 1]]], 1),
    "masks": lambda x: torch.where(x > 0, x, W[:4]) + x.masked_fill(x < 0, 3.0) + x.tril(),
    "stacks": lambda x: torch.stack([x, W.expand(3, 6, 6)[:, :4]], 1).flatten(1, 2) + torch.hstack([x, x]),
    "unbind": lambda x: functools.reduce(operator.mul, x.unbind(1)) + sum(x.split([2, 2], 1)).sum(1),
    "iteration": lambda x: torch.stack([row * (i + 1) for i, row in enumerate(x)]),
    "padding": lambda x: F.pad(x, (1, 2), value=3.0)[..., :6] + F.pad(x, (1, 1), mode="reflect")[..., :6],
    "convolution": lambda x: F.conv1d(x, W[:, :4, None].expand(6, 4, 3), W[0], padding=1),
    "transposed": lambda x: F.conv_transpose1d(x, W[:4, :, None].expand(4, 6, 2), W[0], stride=2),
    "convolution by itself": lambda x: F.conv1d(x[:1], x.transpose(1, 2)[:, :4], padding=1),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2) + F.interpolate(x, size=12, mode="linear"),
    "pooling": lambda x: F.avg_pool1d(x, 2) + F.max_pool1d(x, 2) + F.adaptive_avg_pool1d(x, 3),
    "gather": lambda x: x.gather(-1, (x.argsort(-1) + 1) % 6) + x.scatter(1, INDEX[None, None].expand(3, 1, 6), 2.0),
    "embedding": lambda x: F.embedding(INDEX[:4], x[0]).expand(3, 4, 6) + W[INDEX[:4]],
    "detached": lambda x: x.detach() * x + x.data,
    "read": lambda x: x * x.sum().item() + len(x),
    "rounded": lambda x: x.round() + x * x.sign(),
    "dropout": lambda x: F.dropout(x, 0.4) * x + F.dropout(x, 0.4, training=False),
    "dropout of channels": lambda x: F.dropout1d(x, 0.4) + F.alpha_dropout(x, 0.3, training=True),
    "noise": lambda x: x * torch.randn_like(x) + torch.rand(3, 1, 1, dtype=F64) * x,
    "filled": filled,
    "added in place": in_place(lambda y: y.add_(y * 3, alpha=2)),
    "multiplied in place": in_place(lambda y: y.mul_(W[0]).div_(2).clamp_(max=1)),
    "operators in place": in_place(lambda y: operator.imul(operator.iadd(y, y * 2), 3)),
    "activated in place": in_place(lambda y: F.relu(F.silu(y, inplace=True), inplace=True)),
    "assigned": in_place(lambda y: y.__setitem__((slice(None), 0), y[:, 1] * 2)),
    "zeroed": in_place(lambda y: (y[:, :2].zero_(), y[:, 2].copy_(W[0]), y[:, 3].copy_(y[:, 2] * 2))),
    "double precision": lambda x: x.float().double() + x.to(torch.float32).to(F64),
    "new": lambda x: x.new_zeros(3, 4, 6).index_add_(1, INDEX[:4], x) + torch.zeros_like(x),
    "loss": lambda x: F.mse_loss(x, W[:4].expand(3, 4, 6), reduction="none") + F.smooth_l1_loss(x, x.detach() + 1),
    "cumulative": lambda x: x.cumprod(1) + x.logsumexp(-1, keepdim=True) + x.var(1, keepdim=True) + x.std(),
    "inverse": lambda x: torch.linalg.solve(x @ x.mT + 5 * torch.eye(4, dtype=F64), x),
}


@pytest.mark.parametrize("name", UNARY)
def test_value_tangent_and_gradient_of_a_function(name):
    compare(UNARY[name], [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)])


SHAPE_KEPT = [name for name in UNARY if name not in ("fft", "double precision", "dropout of channels")]


@pytest.mark.parametrize("seed", range(40))
def test_random_compositions_agree_or_raise(seed):
    """Chains of functions that fold their output back to [3, 4, 6]."""
    chosen = random.Random(seed).sample(SHAPE_KEPT, 4)

    def fold(y):
        y = y.real if y.is_complex() else y
        flat = y.reshape(-1)
        return (flat.repeat(math.ceil(72 / flat.numel()))[:72].view(3, 4, 6) / 3).tanh()

    def chain(x):
        for name in chosen:
            x = x * 0.5 + fold(UNARY[name](x))
        return x

    compare(chain, [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)])


class Block(nn.Module):
    """A transformer block with adaLN modulation from a time."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
        y = self.norm(x) * (1 + scale) + shift
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    """`wrap(block, x, c)` calls each block."""

    def __init__(self, wrap=lambda block, x, c: block(x, c)):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.wrap = nn.Linear(2, 8), wrap
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.double()

    def forward(self, z, t, r):
        c = self.time(torch.stack([t, r], -1))
        for block in self.blocks:
            z = self.wrap(block, z, c)
        return z


def inputs():
    return drawn(4, 5, 8), drawn(4, seed=1).sigmoid(), drawn(4, seed=2).sigmoid()


def meanflow(net, jvp=pmf.jvp):
    z, t, r = inputs()
    v = drawn(4, 5, 8, seed=5)
    u, du = jvp(net, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    (u + (t - r)[:, None, None] * du.detach() - v).square().mean().backward()
    return u.detach(), du.detach(), [p.grad for p in net.parameters()]


def assert_same(got, expected, tolerance=1e-12):
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_network_saves_the_bytes_of_its_forward_pass():
    z, t, r = inputs()
    plain, u = saved_bytes(lambda: Net()(z, t, r))
    ours, (same, _) = saved_bytes(lambda: pmf.jvp(Net(), (z, t, r), (z, 1, 0)))
    assert ours == plain
    assert torch.equal(u, same)


def test_a_network_has_the_tangent_and_the_gradients_of_torch_func_jvp():
    with sdpa_kernel(SDPBackend.MATH):
        expected = meanflow(Net(), torch.func.jvp)
    assert_same(meanflow(Net()), expected, 1e-10)


def save_products(context, function, *args, **kwargs):
    products = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default, torch.ops.aten.bmm.default)
    return CheckpointPolicy.MUST_SAVE if function in products else CheckpointPolicy.PREFER_RECOMPUTE


CHECKPOINTS = {
    "arguments": lambda block, x, c: checkpoint(block, x, c, use_reentrant=False),
    "keywords": lambda block, x, c: checkpoint(block, x, c=c, use_reentrant=False),
    "closure": lambda block, x, c: checkpoint(lambda x: block(x, c), x, use_reentrant=False),
    "selective": lambda block, x, c: checkpoint(
        block,
        x,
        c,
        use_reentrant=False,
        context_fn=functools.partial(create_selective_checkpoint_contexts, save_products),
    ),
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_keep_and_recompute_values_alone(kind):
    assert_same(meanflow(Net(CHECKPOINTS[kind])), meanflow(Net()))


def test_backward_of_a_checkpoint_computes_no_tangent():
    z, t, r = inputs()
    calls = []

    def watched(block, x, c):
        def run(x, c):
            calls.append(type(x))
            return block(x, c)

        return checkpoint(run, x, c, use_reentrant=False)

    u, _ = pmf.jvp(Net(watched), (z, t, r), (z, 1, 0))
    first = len(calls)
    u.sum().backward()
    assert first == 3 and len(calls) == 6
    assert all(kind is not torch.Tensor for kind in calls[:3]) and all(kind is torch.Tensor for kind in calls[3:])


def test_tangents_are_freed_with_the_call():
    kept = []
    pmf.jvp(lambda x: kept.append(x.sin()) or x * 2, (drawn(3),), (drawn(3),))
    assert kept[0].tangent is None
    compare(lambda x: x * kept[0], [drawn(3)], [drawn(3, seed=1)])


def test_structures_aux_numbers_and_still_inputs():
    def function(given, t, label):
        a, (b,) = given["a"], given["b"]
        assert label == "cat"
        return {"sum": a * t + b, "still": b * 2, "none": None}, (a * 3, "aux")

    a, b, t = drawn(3), drawn(3, seed=1), drawn(3, seed=2)
    out, dot, aux = pmf.jvp(function, ({"a": a, "b": [b]}, t, "cat"), ({"a": a, "b": None}, 1, None), has_aux=True)
    torch.testing.assert_close(dot["sum"], a * t + a)
    assert dot["still"].abs().max() == 0 and dot["none"] is None and out["none"] is None
    assert type(aux[0]) is torch.Tensor and aux[1] == "aux"


def test_partial_tangents_equal_those_of_all_rows():
    net, (z, t, r) = Net(), inputs()
    v = drawn(4, 5, 8, seed=5)
    u, du = pmf.jvp(net, (z, t, r), (v, 1, 0))
    some, partial = pmf.jvp(net, (z, t, r), (v[-3:], 1, 0), rows=3)
    torch.testing.assert_close(some, u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(partial, du[-3:], rtol=1e-12, atol=1e-12)


def test_autocast_and_inference_mode():
    net, (z, t, r) = Net().float(), [x.float() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(z, t, r)
        u, du = pmf.jvp(net, (z, t, r), (z, 1, 0))
    assert torch.equal(u, plain) and du.dtype == u.dtype
    (u + du).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    exact = pmf.jvp(Net(), inputs(), (inputs()[0], 1, 0))[1]
    assert (du - exact).norm() / exact.norm() < 0.05
    with torch.inference_mode():
        inferred = pmf.jvp(Net(), inputs(), (inputs()[0], 1, 0))[1]
        clamped = pmf.jvp(lambda x: x.clamp(max=0.1).cumprod(0), (drawn(3),), (drawn(3, seed=1),))[1]
    torch.testing.assert_close(inferred, exact)
    torch.testing.assert_close(
        clamped, pmf.jvp(lambda x: x.clamp(max=0.1).cumprod(0), (drawn(3),), (drawn(3, seed=1),))[1]
    )


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return 2 * x * y * gradient, x * x * gradient


@pmf.jvp.rule(Squared)
def squared(out, x, y):
    return 2 * x.value * x.dot * y


@torch.library.custom_op("pmf_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


applied_early = super(torch.autograd.Function, Scaled).apply
passed_early = super(torch.autograd.Function, Passed).apply


@torch.jit.script
def scripted(x):
    return x * 2


LOSSES = {
    "autograd.Function": (lambda x: Scaled.apply(x), "Scaled got a moving value; an autograd.Function hides"),
    "identity Function": (lambda x: Passed.apply(x), "Passed got a moving value"),
    "apply looked up early": (applied_early, "autograd.Function"),
    "reentrant checkpoint": (
        lambda x: checkpoint(torch.sin, x, use_reentrant=True),
        "reentrant checkpointing hides tangents; expected use_reentrant=False",
    ),
    "custom operator": (triple, "pmf_tests.*no rule; expected one registered by pmf.jvp.rule"),
    "vmap": (torch.vmap(torch.sin), "vmap"),
    "vmap of a closure": (lambda x: torch.vmap(lambda i: x * i)(torch.arange(3.0, dtype=F64)), "vmap"),
    "TorchScript": (scripted, "TorchScript|torch functions"),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), "numpy got a moving value"),
    "numpy array": (lambda x: torch.as_tensor(__import__("numpy").asarray(x)), "__array__ got a moving value"),
    "data pointer": (lambda x: x.data_ptr(), "data_ptr got a moving value"),
    "pickle": (lambda x: __import__("copy").deepcopy(x), "deepcopy|reduce_ex"),
    "output tensor": (lambda x: torch.sin(x, out=torch.empty_like(x)), "out="),
    "still target": (lambda x: torch.zeros(3, dtype=F64).add_(x), "add_ writes a moving value into a tensor"),
    "still target of an index": (lambda x: torch.zeros(3, dtype=F64).__setitem__(0, x[0]), "writes a moving value"),
    "data set": (lambda x: setattr(x * 1, "data", x), "data"),
    "dropout in place": (lambda x: F.dropout(x * 1, 0.5, inplace=True), "inplace=False"),
    "attention dropout": (
        lambda x: F.scaled_dot_product_attention(*[x[None, :, None]] * 3, dropout_p=0.5),
        "dropout_p",
    ),
    "gradient inside": (lambda x: torch.autograd.grad((x * 2).sum(), x), "backward|grad"),
    "written by a list": (lambda x: torch._foreach_mul_([x * 1], 2), "writes to its arguments"),
    "nested call": (lambda x: pmf.jvp(torch.sin, (x,), (x,))[1], "nested|another call"),
    "scatter of DataParallel": (
        lambda x: torch.nn.parallel._functions.Scatter.apply([0], None, 0, x),
        "Scatter got a moving value",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_an_error_that_names_the_function(name):
    function, message = LOSSES[name]
    x = drawn(3).requires_grad_()
    with pytest.raises(Exception, match=message) as raised:
        pmf.jvp(function, (x,), (drawn(3),))
    assert isinstance(raised.value, InputError) or name == "TorchScript"
    compare(torch.sin, [drawn(3)], [drawn(3, seed=1)])  # and the next call works


def test_an_identity_function_looked_up_early_loses_no_gradient():
    x = drawn(3).requires_grad_()
    try:
        out, dot = pmf.jvp(passed_early, (x,), (drawn(3),))
    except InputError:
        return
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0] == -1, "the Function's backward was bypassed"
    assert dot.abs().max() > 0


def test_registered_functions_move():
    x, v = drawn(6).requires_grad_(), drawn(6, seed=1)
    out, dot = pmf.jvp(lambda x: Squared.apply(x, W[0]), (x,), (v,))
    torch.testing.assert_close(dot, 2 * x.detach() * v * W[0])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 2 * x.detach() * W[0])

    @pmf.jvp.rule(triple)
    def tripled(out, x):
        return 3 * x.dot

    try:
        torch.testing.assert_close(pmf.jvp(triple, (drawn(3),), (drawn(3, seed=1),))[1], 3 * drawn(3, seed=1))
    finally:
        from pmf.private import operators_of
        from pmf.tangents.rules import HANDLERS

        for one in operators_of(triple):
            HANDLERS.pop(one)


@pytest.mark.parametrize(
    ("primals", "tangents", "options", "message"),
    [
        ([1], (1,), {}, "primals must be a tuple"),
        ((drawn(3),), (drawn(3), 1), {}, "structure"),
        ((drawn(3),), (drawn(4),), {}, r"shape of its primal, \[3\], got torch.float64 \[4\]"),
        ((torch.arange(3),), (1,), {}, "floating tensor, got torch.int64"),
        ((drawn(3),), ("x",), {}, "shape of its primal"),
        ((drawn(3),), (drawn(4),), {"rows": 4}, r"rows must lie in \[1, 3\], got 4"),
        ((drawn(3),), (drawn(3),), {"has_aux": True}, "must return \\(output, aux\\)"),
    ],
)
def test_bad_arguments_are_named(primals, tangents, options, message):
    with pytest.raises(InputError, match=message):
        pmf.jvp(torch.sin, primals, tangents, **options)


def moved(model, values, jvp=pmf.jvp):
    """`jvp` of a PMFDiT along z, t and h."""
    others = [values[name] for name in ("omega", "t_min", "t_max", "y")]
    v, ones = drawn(*values["z"].shape, seed=5), torch.ones_like(values["t"])
    return jvp(lambda z, t, h: model(z, t, h, *others), (values["z"], values["t"], values["h"]), (v, ones, ones))


@pytest.mark.parametrize("conditioning", ["in_context", "adaln"])
def test_our_network_moves_on_both_heads(conditioning):
    config = dataclasses.replace(TINY, conditioning=conditioning)
    model, values = random_model(config), model_inputs(config, 3)
    (u, v), (du, dv) = moved(model, values)
    (_, _), (du_expected, dv_expected) = moved(model, values, torch.func.jvp)
    assert torch.equal(u, model(**values)[0]) and torch.equal(v, model(**values)[1])
    torch.testing.assert_close(du, du_expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dv, dv_expected.detach(), rtol=1e-10, atol=1e-10)


def test_fused_layers_mix_with_unported_code():
    norm = layers.NormModulate(6).double()

    def mixed(x):
        y = norm(x, x.mean(1), scale_of(x))
        return pmf.ops.swiglu(y @ W) * x[..., :3] + norm(F.silu(x))[..., :3]

    def scale_of(x):
        return (x.sum(1) @ W).sin()

    compare(mixed, [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)], [norm.weight])
    with pytest.raises(InputError, match="weight takes no tangent"):
        pmf.jvp(lambda x: pmf.ops.norm_modulate(x, x[0, 0]), (drawn(3, 4, 6),), (drawn(3, 4, 6),))
