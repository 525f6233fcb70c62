"""`pmf.jvp` of what torch.export and make_fx leave of a network: a graph of calls of `torch.ops.aten`."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf import InputError
from tests.pmf.jvp_checks import F64, PARTITIONED, compare, drawn


class Network(nn.Module):
    """Norms, attention, a convolution, views, a buffer that is filled, and products with x itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.norm, self.batch = nn.Linear(8, 24), nn.LayerNorm(8), nn.BatchNorm1d(6)
        self.conv, self.group = nn.Conv2d(1, 2, 3, padding=1), nn.GroupNorm(1, 2)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(self.batch(x))).chunk(3, -1)
        attended = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]
        image = F.gelu(self.group(self.conv((x + attended)[:, None])))[:, :, ::2, 1:5]
        parts = torch.cat([*image.transpose(1, 2).flatten(2).unbind(1), x.sum(-1)], 1)
        filled = torch.zeros_like(x)
        filled[:, 1:3] = x[:, :2].mT.mT
        filled[:, 0].copy_(x[:, 3])
        upsampled = F.interpolate(x[:, None], scale_factor=2.0, mode="bilinear")[:, 0, ::2, ::2]
        return x * parts.mean().expand_as(x) + torch.stack([filled, upsampled]).sum(0) + x.softmax(-1).float().to(F64)


def exported(x):
    return torch.export.export(Network().double().eval(), (x,))


GRAPHS = {
    "exported": lambda x: exported(x).module(),
    "traced": lambda x: make_fx(Network().double().eval(), pre_dispatch=True)(x),
}


def tangent_of_the_network(x, v):
    with sdpa_kernel(SDPBackend.MATH):
        return torch.func.jvp(Network().double().eval(), (x,), (v,))[1].detach()


@pytest.mark.parametrize("kind", GRAPHS)
def test_value_tangent_and_gradients(kind):
    x, v = drawn(3, 6, 8), drawn(3, 6, 8, seed=1)
    inputs, graph = [x.clone().requires_grad_() for _ in range(2)], GRAPHS[kind](x)
    out, dot = pmf.jvp(graph, (inputs[0],), (v,))
    plain = graph(inputs[1])
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    torch.testing.assert_close(dot, tangent_of_the_network(x, v), rtol=1e-10, atol=1e-10)
    got, right = (torch.autograd.grad((y * v).sum(), x)[0] for y, x in zip((out, plain), inputs, strict=True))
    torch.testing.assert_close(got, right, rtol=0, atol=0)


def test_what_export_has_decomposed_for_inference():
    x, v = drawn(3, 6, 8), drawn(3, 6, 8, seed=1)
    graph = exported(x).run_decompositions().module()
    with torch.no_grad():  # its `aten.copy` has no backward in PyTorch
        out, dot = pmf.jvp(graph, (x,), (v,))
        torch.testing.assert_close(out, graph(x), rtol=0, atol=0)
    torch.testing.assert_close(dot, tangent_of_the_network(x, v), rtol=1e-10, atol=1e-10)


def test_what_export_has_stored_for_batches_of_any_size(tmp_path):
    program = torch.export.export(
        Network().double().eval(), (drawn(3, 6, 8),), dynamic_shapes=({0: torch.export.Dim("n")},)
    )
    torch.export.save(program, tmp_path / "network.pt2")
    graph = torch.export.load(tmp_path / "network.pt2").module()
    x, v = drawn(5, 6, 8), drawn(5, 6, 8, seed=1)
    torch.testing.assert_close(pmf.jvp(graph, (x,), (v,))[1], tangent_of_the_network(x, v), rtol=1e-10, atol=1e-10)


def test_an_exported_network_in_training_updates_its_running_statistics():
    x, v, network = drawn(3, 6, 8), drawn(3, 6, 8, seed=1), Network().double().train()
    graph = torch.export.export(network, (x,)).module()
    for a, b in zip(pmf.jvp(graph, (x,), (v,)), pmf.jvp(network, (x,), (v,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    for name, buffer in network.named_buffers():
        torch.testing.assert_close(graph.get_buffer(name), buffer, rtol=0, atol=0)


def test_what_torch_fx_has_traced():
    network = nn.Sequential(nn.Linear(6, 8), nn.SiLU(), nn.LayerNorm(8), nn.Linear(8, 6)).double()
    compare(torch.fx.symbolic_trace(network), [drawn(4, 6)], [drawn(4, 6, seed=1)], list(network.parameters()))


@pytest.mark.parametrize("kind", GRAPHS)
def test_a_graph_compiles(kind):
    torch._dynamo.reset()
    x, v = drawn(3, 6, 8), drawn(3, 6, 8, seed=1)
    network = GRAPHS[kind](x)
    got = torch.compile(lambda x: pmf.jvp(network, (x,), (v,)), **PARTITIONED)(x)
    for a, b in zip(got, pmf.jvp(Network().double().eval(), (x,), (v,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


ATEN = torch.ops.aten


def written_through_a_view(x):
    y = x * 1
    ATEN.mul_.Tensor(ATEN.select(y, 0, 1), 3)
    return y * x


def filled(x):
    y = ATEN.new_zeros(x, [4, 6])
    ATEN.copy_(ATEN.slice(y, 1, 0, 3), x[:, :3])
    ATEN.index_put_(y, [torch.tensor([0, 1])], x[2:])
    return y * x


OPERATORS = {
    "an overload": lambda x: ATEN.mul.Tensor(ATEN.slice.Tensor(x, 1, 0, 3), 2.0),
    "a packet": lambda x: ATEN.permute(ATEN.alias(x), [1, 0]) * ATEN.t(x),
    "views without a name": lambda x: ATEN._unsafe_view(ATEN._reshape_alias(x, [2, 12], [12, 1]), [4, 6]) * x,
    "an index": lambda x: ATEN.index.Tensor(x, [torch.tensor([0, 2, 2, 3])]),
    "a dtype": lambda x: ATEN._to_copy(ATEN.to.dtype(x, torch.float32), dtype=F64) * x,
    "what cuts": lambda x: ATEN.detach.default(x) * x,
    "what writes": lambda x: ATEN.add_.Tensor(ATEN.mul.Tensor(x, x), x),
    "what writes to a view": written_through_a_view,
    "a new tensor that is filled": filled,
    "spectra": lambda x: torch.view_as_real(ATEN._conj(ATEN._fft_r2c(x, [1], 0, True)).resolve_conj()),
}


@pytest.mark.parametrize("name", OPERATORS)
def test_operators(name):
    with torch.no_grad():  # some of them have no backward
        compare(OPERATORS[name], [drawn(4, 6)], [drawn(4, 6, seed=1)])


@pytest.mark.parametrize("name", OPERATORS)
def test_operators_compile(name):
    torch._dynamo.reset()
    x, v = drawn(4, 6), drawn(4, 6, seed=1)
    got = torch.compile(lambda x: pmf.jvp(OPERATORS[name], (x,), (v,)), fullgraph=True, backend="aot_eager")(x)
    for a, b in zip(got, pmf.jvp(OPERATORS[name], (x,), (v,)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


def test_a_copy_takes_the_place_of_what_it_is_written_to():
    x, v = drawn(4, 6), drawn(4, 6, seed=1)
    _, dot = pmf.jvp(lambda x: ATEN.copy(x, x[:, :1]) * ATEN.copy.default(torch.ones(4, 6).double(), x), (x,), (v,))
    torch.testing.assert_close(dot, v[:, :1] * x + x[:, :1] * v)


def test_what_is_refused_is_refused_by_its_operator():
    x = drawn(4, 1)
    with pytest.raises(InputError, match=r"pmf.jvp: aten.squeeze_.dim got a moving value"):
        pmf.jvp(lambda x: ATEN.squeeze_.dim(x * 1, 1), (x,), (x,))
    with pytest.raises(InputError, match=r"torch.func.jvp is wrong there"):
        pmf.jvp(lambda x: ATEN.scatter_reduce.two(x, 0, torch.zeros(4, 1).long(), x, "prod"), (x,), (x,))


def test_an_operator_that_a_compiler_meets_later_leaves_other_graphs_as_they_are():
    aten, counter = torch.ops.aten, CompileCounterWithBackend("eager")
    x, v = drawn(3, 4), drawn(3, 4, seed=1)
    compiled = {
        name: torch.compile(lambda x, f=function: pmf.jvp(f, (x,), (v,)), backend=counter, fullgraph=True)
        for name, function in (("cos", aten.cos.default), ("tan", aten.tan.default), ("sin", torch.sin))
    }
    for names in (("sin", "cos", "tan"), ("sin", "cos", "tan")):
        for name in names:
            torch.testing.assert_close(compiled[name](x)[1], torch.func.jvp(getattr(torch, name), (x,), (v,))[1])
    assert counter.frame_count == 3


def test_a_rule_that_is_registered_later_holds_for_compiled_operators():
    x, v = drawn(3, 4), drawn(3, 4, seed=1)
    step = torch.compile(lambda x: pmf.jvp(torch.ops.aten.sinh.default, (x,), (v,)), backend="eager", fullgraph=True)
    torch.testing.assert_close(step(x)[1], x.cosh() * v)
    pmf.jvp.rule(torch.ops.aten.sinh.default)(lambda out, x: 3 * x.dot)
    torch.testing.assert_close(step(x)[1], 3 * v)
