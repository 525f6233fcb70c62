"""`pmf.jvp` of networks with functions under torch.jit.script: they run as the Python they were made of."""

import functools
import warnings
from types import SimpleNamespace
from typing import NamedTuple

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


def filled(x: Tensor, number: float, other: float = 2) -> Tensor:
    return x.sin() * torch.full([6], number) + torch.full([6], other)


def appended(parts: list[Tensor]) -> Tensor:
    parts.append(parts[0] * 2)
    return parts[-1].sin()


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


def paired(pair: Pair) -> Tensor:
    return pair.first.sin() * pair.second


PLAIN = SimpleNamespace(
    softclamp=softclamp,
    gated=gated,
    filled=lambda x, number: filled(x, float(number), 2.0),
    paired=paired,
    checkpoint=lambda function, x: function(x),
)
with warnings.catch_warnings():
    warnings.simplefilter("ignore", DeprecationWarning)  # public networks still use torch.jit
    SCRIPTED = SimpleNamespace(
        softclamp=torch.jit.script(softclamp),
        gated=torch.jit.script(gated),
        filled=torch.jit.script(filled),
        appended=torch.jit.script(appended),
        paired=torch.jit.script(paired),
        checkpoint=functools.partial(checkpoint, use_reentrant=False),
    )
NETWORKS = {
    "scripted": lambda f, x: f.softclamp(x @ W),
    "by name": lambda f, x: f.softclamp(limit=3.0, x=x @ W),
    "nested, in a list": lambda f, x: f.gated(torch.ones_like(x), [x, x @ W], 3),
    "an integer for a float": lambda f, x: f.filled(x @ W, 3) / f.filled(x, number=-3),
    "a named tuple": lambda f, x: f.paired(Pair(x, x @ W)),
    "checkpointed": lambda f, x: f.checkpoint(f.softclamp, x @ W),
    "in a checkpoint": lambda f, x: f.checkpoint(lambda x: f.gated(x @ W, [x, x], 2), x) * x,
}


@pytest.fixture(autouse=True)
def optimized():
    """Run the functions until TorchScript has optimized them for backward: then it keeps other values than Python."""
    torch._dynamo.reset()
    for _ in range(4):
        x = torch.ones(5, 6, dtype=F64, requires_grad=True)
        sum(
            NETWORKS[name](SCRIPTED, x).sum() for name in ("scripted", "nested, in a list", "an integer for a float")
        ).backward()


def results(call):
    """Value, tangent and gradient of `call(x, v)`."""
    x = drawn(5, 6).requires_grad_()
    out, dot = call(x, drawn(5, 6, seed=1))
    assert not dot.requires_grad
    return out, dot, *torch.autograd.grad(out.sum(), x)


def jvp_of(name):
    """`pmf.jvp` of a network of scripted functions."""
    return lambda x, v: pmf.jvp(lambda x: NETWORKS[name](SCRIPTED, x), (x,), (v,))


@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_functions_move(name):
    own = vars(torch.jit.ScriptFunction)["__call__"]
    found = results(jvp_of(name))
    assert vars(torch.jit.ScriptFunction)["__call__"] is own
    plain = results(lambda x, v: (NETWORKS[name](PLAIN, x), v))
    assert torch.equal(found[0], plain[0]) and torch.equal(found[2], plain[2])
    expected = torch.func.jvp(lambda x: NETWORKS[name](PLAIN, x), (drawn(5, 6),), (drawn(5, 6, seed=1),))
    torch.testing.assert_close(found[:2], expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found[0], NETWORKS[name](SCRIPTED, drawn(5, 6)), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", NETWORKS)
def test_scripted_functions_move_in_compiled_code(name):
    if name == "checkpointed" and torch.__version__ < (2, 13):
        pytest.skip("before torch 2.13 Dynamo takes no scripted function as the argument of a checkpoint")
    found = results(torch.compile(jvp_of(name), fullgraph=True, backend="aot_eager"))
    torch.testing.assert_close(found, results(jvp_of(name)), rtol=1e-12, atol=1e-12)


def test_lists_are_copied_as_torchscript_copies_them():
    def network(x):
        parts = [x @ W]
        return SCRIPTED.appended(parts) * len(parts) + parts[-1]

    x = drawn(5, 6)
    out, _ = pmf.jvp(network, (x,), (x,))
    torch.testing.assert_close(out, network(x), rtol=1e-12, atol=1e-12)


def test_what_does_not_move_stays_scripted():
    """A call without moving values runs in TorchScript, whose name for the operation is then in the graph."""
    weight = drawn(5, 6).requires_grad_()
    alone = SCRIPTED.softclamp(weight).grad_fn.name()
    inside = []
    pmf.jvp(lambda x: inside.append(SCRIPTED.softclamp(weight).grad_fn.name()) or x * 1, (weight,), (weight,))
    assert inside == [alone] and alone != softclamp(weight).grad_fn.name()
