"""`pmf.jvp` of networks whose functions torch.jit has scripted or traced: they run as the Python they were made of."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import pmf
from tests.pmf.jvp_checks import F64, W, drawn


def softclamp(x: Tensor, limit: float = 2.0) -> Tensor:
    return (x / limit).tanh() * limit


def gated(x: Tensor, parts: list[Tensor], repeats: int) -> Tensor:
    for _ in range(repeats):
        x = softclamp(x) * parts[0] + parts[1]
    return x.sigmoid() * x


def wave(x: Tensor) -> Tensor:
    return x.sin() * x


PLAIN = SimpleNamespace(softclamp=softclamp, gated=gated, wave=wave)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # public networks still use torch.jit
    SCRIPTED = SimpleNamespace(
        softclamp=torch.jit.script(softclamp),
        gated=torch.jit.script(gated),
        wave=torch.jit.trace(wave, (torch.ones(5, 6, dtype=F64),)),
    )
NETWORKS = {
    "scripted": lambda f, x: f.softclamp(x @ W),
    "by name": lambda f, x: f.softclamp(limit=3.0, x=x @ W),
    "nested, in a list": lambda f, x: f.gated(torch.ones_like(x), [x, x @ W], 3),
    "traced": lambda f, x: f.wave(x @ W),
    "checkpointed": lambda f, x: checkpoint(f.softclamp, x @ W, use_reentrant=False),
    "in a checkpoint": lambda f, x: checkpoint(lambda x: f.gated(x @ W, [x, x], 2), x, use_reentrant=False) * x,
}


@pytest.fixture(autouse=True)
def optimized():
    """Run the functions until TorchScript has optimized them for backward: then it keeps other values than Python."""
    for _ in range(4):
        x = torch.ones(5, 6, dtype=F64, requires_grad=True)
        sum(NETWORKS[name](SCRIPTED, x).sum() for name in ("scripted", "nested, in a list", "traced")).backward()


def results(call):
    """Value, tangent and gradient of `call(x, v)`."""
    x = drawn(5, 6).requires_grad_()
    out, dot = call(x, drawn(5, 6, seed=1))
    assert not dot.requires_grad
    return out, dot, *torch.autograd.grad(out.sum(), x)


@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_functions_move(name):
    own = vars(torch.jit.ScriptFunction)["__call__"]
    expected = torch.func.jvp(lambda x: NETWORKS[name](PLAIN, x), (drawn(5, 6),), (drawn(5, 6, seed=1),))

    def call(x, v):
        return pmf.jvp(lambda x: NETWORKS[name](SCRIPTED, x), (x,), (v,))

    found = results(call)
    for got, right in zip(found[:2], expected, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    plain = results(lambda x, v: (NETWORKS[name](PLAIN, x), v))
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    for got, right in zip(results(torch.compile(call, fullgraph=True, backend="aot_eager")), found, strict=True):
        torch.testing.assert_close(got, right, rtol=1e-12, atol=1e-12)
    assert vars(torch.jit.ScriptFunction)["__call__"] is own


def test_what_does_not_move_stays_scripted():
    """A call without moving values runs in TorchScript, whose name for the operation is then in the graph."""
    weight = drawn(5, 6).requires_grad_()
    alone = SCRIPTED.softclamp(weight).grad_fn.name()
    inside = []
    pmf.jvp(lambda x: inside.append(SCRIPTED.softclamp(weight).grad_fn.name()) or x * 1, (weight,), (weight,))
    assert inside == [alone] and alone != softclamp(weight).grad_fn.name()
