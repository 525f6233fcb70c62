"""`pmf.jvp` and torch.compile without fullgraph: what breaks a graph runs in Python, and the numbers stay right."""

import subprocess
import sys

import pytest
import torch
from torch import nn

import pmf
from tests.pmf.jvp_checks import drawn

LOUD = []


def mixed(x, t):
    for _ in range(3):
        h = torch.sin(x) + t
        torch._dynamo.graph_break()
        x = x + h * torch.sin(h)
    return x


def printed(x, t):
    for i in range(3):
        x = x * t.cos() + x.sin()
        LOUD.append(f"{i}")
        print(end="")
    return x / (x * x + 1)


def asked(x, t):
    for scale in (1.0, 2.0):
        x = torch.nn.functional.silu(x * scale) @ t[:3, :3]
        if x.sum().item() > -1e9:
            x = x + t.sum()
    return x.softmax(-1)


def branched(x, t):
    if x.sum() > -1e9:
        x = x.exp() * t
    while float(x.abs().max()) > 1.0:
        x = x / 2
    return x, [int(x[0, 0] > 0) * t.tanh()]


def written(x, t):
    y = x.new_zeros(x.shape)
    for i in range(len(x)):
        torch._dynamo.graph_break()
        y[i] = x[i] * t[i].sin()
    return y * y


class Blocks(nn.Module):
    """Layers with a break in each, as of logging or of a backend that is chosen."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(4)).double()

    def forward(self, x, t):
        for layer in self.layers:
            h = layer(x) + t
            torch._dynamo.graph_break()
            x = x + nn.functional.gelu(h) * h
        return x


BROKEN = {"mixed": mixed, "printed": printed, "asked": asked, "branched": branched, "written": written}
X, T, V = drawn(3, 3), drawn(3, 3, seed=1), drawn(3, 3, seed=2)


def outputs(result):
    return [x for x in torch.utils._pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("where", ["network", "step", "jvp"])
@pytest.mark.parametrize("name", [*BROKEN, "blocks", "blocks apart"])
def test_broken_graphs(name, where):
    torch._dynamo.reset()
    network = BROKEN[name] if name in BROKEN else Blocks()
    expected = pmf.jvp(network, (X, T), (V, 1))
    if name == "blocks apart":
        for layer in network.layers:
            layer.compile(backend="eager")
    calls = {
        "network": lambda: pmf.jvp(torch.compile(network, backend="eager"), (X, T), (V, 1)),
        "step": torch.compile(lambda: pmf.jvp(network, (X, T), (V, 1)), backend="eager"),
        "jvp": lambda: torch.compile(pmf.jvp, backend="eager")(network, (X, T), (V, 1)),
    }
    for _ in range(2):
        torch.testing.assert_close(outputs(calls[where]()), outputs(expected), rtol=1e-12, atol=1e-12)
    if isinstance(network, nn.Module):
        weights = list(network.parameters())
        right = torch.autograd.grad(network(X, T).sum(), weights)
        got = torch.autograd.grad(calls[where]()[0].sum(), weights)
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)


FIRST_COMPILED_INSIDE = """
import sys, torch, pmf
x, v, weight = torch.randn(3, 6, 6, dtype=torch.float64)
def network(x):
    assert "torch._dynamo" not in sys.modules
    return torch.compile(lambda x: torch.sin(x @ weight), backend="eager")(x)
got = pmf.jvp(network, (x,), (v,))
torch.testing.assert_close(got, torch.func.jvp(lambda x: torch.sin(x @ weight), (x,), (v,)))
"""


def test_the_first_compilation_of_a_process_inside_a_call():
    subprocess.run([sys.executable, "-c", FIRST_COMPILED_INSIDE], check=True, timeout=120)


def test_jvp_itself_compiles_after_a_broken_graph():
    torch._dynamo.reset()
    pmf.jvp(torch.compile(mixed, backend="eager"), (X, T), (V, 1))
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module.forward

    call = torch.compile(pmf.jvp, fullgraph=True, backend=backend)
    torch.testing.assert_close(call(torch.sin, (X,), (V,)), pmf.jvp(torch.sin, (X,), (V,)))
    assert len(graphs) == 1
