"""Muon and Adam equal optax.contrib.muon, as the authors call it, from the first step on.

Gradients vary by orders of magnitude from step to step, and are sometimes zero.
"""

import pytest
import torch
from torch import nn

from pmf.optim import OptimizerConfig, build_optimizers
from tests.networks import relative_error

pytestmark = pytest.mark.extras

STEPS, RATE = 200, 1e-3
SCALES = (1.0, 1e-6, 1e3, 0.0, 1e-3, 1e-9, 30.0)
MATRICES = {
    "tall": (48, 12),
    "wide": (12, 48),
    "square": (24, 24),
    "row": (1, 32),
    "column": (32, 1),
    "one": (1, 1),
    "still": (16, 8),
}


@pytest.fixture(scope="module")
def optax():
    return pytest.importorskip("optax", reason="JAX and optax are not installed")


class Parameters(nn.Module):
    """Matrices for Muon; vectors, a table and a convolution for Adam; two tensors whose gradient is always zero."""

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        for name, (rows, columns) in MATRICES.items():
            self.add_module(name, nn.Linear(columns, rows, bias=name == "tall", dtype=dtype))
        self.convolution = nn.Conv2d(3, 8, 4, dtype=dtype)
        self.table = nn.Embedding(11, 16, dtype=dtype)
        self.still_vector = nn.Parameter(torch.ones(7, dtype=dtype))


def gradients(model, step, generator):
    """Random gradients, at a different scale for each step and parameter."""
    for i, (name, p) in enumerate(model.named_parameters()):
        scale = 0.0 if "still" in name else SCALES[(step + i) % len(SCALES)]
        yield name, scale * torch.randn(p.shape, generator=generator, dtype=p.dtype)


def in_flax(name, value):
    """The value in flax's layout: a Linear's weight [in, out], the class table [1, N, C]."""
    value = value.detach().numpy()
    if name == "table.weight":
        return value[None]
    return value.T if value.ndim == 2 else value


def from_flax(name, value, like):
    value = torch.from_numpy(value.__array__().copy())
    return value[0] if name == "table.weight" else value.T if like.ndim == 2 else value


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.float64, 1e-12)], ids=str)
def test_two_hundred_steps_are_those_of_optax(optax, dtype, bound):
    """Compares every parameter after every step; a step moves it by about a thousandth."""
    import jax

    torch.manual_seed(0)
    model = Parameters(dtype)
    parameters = dict(model.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizers = build_optimizers(model, OptimizerConfig(learning_rate=RATE))
    generator = torch.Generator().manual_seed(1)
    with jax.enable_x64(dtype == torch.float64):
        theirs = optax.contrib.muon(optax.constant_schedule(RATE), adam_b2=0.95)
        params = {name: jax.numpy.array(in_flax(name, p)) for name, p in start.items()}
        state, update = theirs.init(params), jax.jit(theirs.update)
        for step in range(STEPS):
            grads = dict(gradients(model, step, generator))
            for name, p in parameters.items():
                p.grad = grads[name]
            for part in optimizers.values():
                part.step()
            updates, state = update({name: in_flax(name, g) for name, g in grads.items()}, state, params)
            params = optax.apply_updates(params, updates)
            for name, p in parameters.items():
                expected = from_flax(name, params[name], p)
                assert expected.dtype == p.dtype == dtype
                assert relative_error(p.detach(), expected) < bound, (step, name)
    for name, p in parameters.items():
        assert torch.equal(p, start[name]) if "still" in name else (p - start[name]).norm() > 10 * RATE, name
