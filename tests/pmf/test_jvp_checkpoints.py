"""`pmf.jvp` of networks with activation checkpoints: in eager mode, in compiled code, and around it."""

import functools
from collections import OrderedDict

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch import nn
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

import pmf
from pmf.counting import saved_bytes
from tests.pmf.jvp_checks import PARTITIONED, W, drawn
from tests.pmf.test_jvp import Net, assert_same, inputs, meanflow


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


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("compiled", ["whole call", "blocks"])
def test_compiled_checkpoints_save_the_bytes_of_the_compiled_forward(kind, compiled):
    torch._dynamo.reset()
    wrap, (z, t, r) = CHECKPOINTS[kind], inputs()
    expected = meanflow(Net(wrap, depth=2))
    if compiled == "blocks":
        network = forward = Net(torch.compile(wrap, **PARTITIONED), depth=2)
        jvp = pmf.jvp
    else:
        network = Net(wrap, depth=2)
        forward, jvp = torch.compile(network, **PARTITIONED), torch.compile(pmf.jvp, **PARTITIONED)
    assert_same(meanflow(network, jvp), expected)
    plain = saved_bytes(lambda: forward(z, t, r), network.parameters())
    assert saved_bytes(lambda: jvp(network, (z, t, r), (z, 1, 0)), network.parameters()) <= plain


def test_backward_of_a_compiled_checkpoint_computes_no_tangent():
    torch._dynamo.reset()
    products = []

    def backward(graph, inputs):
        products.append(sum("mm" in str(node.target) for node in graph.graph.nodes))
        return make_boxed_func(graph)

    backend = aot_autograd(
        fw_compiler=lambda graph, inputs: make_boxed_func(graph),
        bw_compiler=backward,
        partition_fn=min_cut_rematerialization_partition,
    )

    def network(z, t):
        return checkpoint(lambda z: ((z * t) @ W).sin() @ W, z, use_reentrant=False).sin()

    z, t = drawn(4, 6).requires_grad_(), drawn(4, 1)
    torch.compile(network, backend=backend)(z, t).sum().backward()
    torch.compile(lambda z, t: pmf.jvp(network, (z, t), (z, 1)), backend=backend)(z, t)[0].sum().backward()
    forward, jvp = products
    assert forward == jvp > 2


@pytest.mark.parametrize("eager", [False, True])
def test_a_compiled_checkpoint_drops_the_same_values_again(eager):
    torch._dynamo.reset()
    x, v = drawn(50).requires_grad_(), drawn(50, seed=1)
    drop = torch.compile(lambda x: F.dropout(x).square(), **PARTITIONED)
    run = functools.partial(checkpoint, drop if eager else lambda x: F.dropout(x).square(), use_reentrant=False)
    call = functools.partial(pmf.jvp, run, (x,), (v,))
    out, dot = call() if eager else torch.compile(call, **PARTITIONED)()
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert 0 < out.count_nonzero() < 50
    torch.testing.assert_close(gradient * x, 2 * out)
    torch.testing.assert_close(dot * x, 2 * out * v)


class Compiled(nn.Module):
    """A block whose graph for carriers keeps other values for backward than its graph for tensors."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(W.clone())
        self.compile(**PARTITIONED)

    def forward(self, x, c):
        return x + F.softplus((x * c) @ self.weight) @ W

    def run(self, x, c):
        return self(x, c)


class Holder:
    def __init__(self, block):
        self.blocks = [block]

    def __call__(self, x, c):
        return self.blocks[0](x, c)


class Around(nn.Module):
    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x, c):
        return self.block(x, c)


AROUND = {
    "a module": lambda block: block,
    "its call": lambda block: block.__call__,
    "a method": lambda block: block.run,
    "a module around": Around,
    "a compiled function": lambda block: torch.compile(block.forward, **PARTITIONED),
    "an optimized module": lambda block: torch.compile(block, **PARTITIONED),
    "a function": lambda block: lambda x, c: block(x, c),
    "an object": Holder,
    "a partial": lambda block: functools.partial(lambda block, x, c: block(x, c), block),
}
"""What is checkpointed, in eager mode, of a compiled block."""


@pytest.mark.parametrize("kind", AROUND)
def test_checkpoints_around_compiled_code(kind):
    torch._dynamo.reset()
    z, c = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1).requires_grad_()
    block = Compiled()
    run = AROUND[kind](block)
    results = []
    for function in (block.forward, functools.partial(checkpoint, run, use_reentrant=False)):
        out, dot = pmf.jvp(lambda z, c, f=function: f(z.sin(), c), (z, c), (z, 1))
        results.append([out, dot, *torch.autograd.grad(out.square().sum(), (z, c, block.weight))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_checkpoint_around_compiled_code_is_recomputed_inside_another_call():
    torch._dynamo.reset()
    z, c = drawn(4, 6).requires_grad_(), drawn(4, 6, seed=1)
    block = Compiled()
    run = functools.partial(checkpoint, use_reentrant=False)
    expected = torch.autograd.grad(block(z.sin(), c.exp()).sum(), z)
    out, _ = pmf.jvp(lambda z, c: run(lambda x: block(x["z"], c), OrderedDict(z=z.sin())), (z, c.exp()), (1, 1))
    got = []

    def network(x):
        got.extend(torch.autograd.grad(out.sum(), z))
        return x.sin()

    pmf.jvp(network, (c,), (1,))
    torch.testing.assert_close(got, list(expected), rtol=1e-12, atol=1e-12)
