import math

import pytest
import torch

import pmf
from pmf.train.optim import EMA, OptimizerConfig, build_optimizers, learning_rate, split_parameters
from tests.networks import TINY


def test_linear_weights_go_to_muon_and_the_rest_to_adam():
    model = pmf.create_model(TINY)
    muon, adam = ({id(p) for p in group} for group in split_parameters(model))
    names = {n: p for n, p in model.named_parameters()}
    assert len(muon) + len(adam) == len(names) and not muon & adam
    for name, p in names.items():
        linear = name.endswith("weight") and any(
            part in name for part in ("_proj.", ".w1.", ".w2.", ".w3.", ".fc1.", ".fc2.", ".linear.")
        )
        assert (id(p) in muon) == linear, name


def newton_schulz(update, steps):
    """Five steps of the quintic iteration, from its definition."""
    a, b, c = 3.4445, -4.775, 2.0315
    x = update / update.norm()
    wide = x if x.shape[0] <= x.shape[1] else x.T
    for _ in range(steps):
        g = wide @ wide.T
        wide = a * wide + (b * g + c * g @ g) @ wide
    return wide if x.shape[0] <= x.shape[1] else wide.T


@pytest.mark.parametrize("shape", [(24, 8), (8, 24)])
def test_muons_first_step_is_the_published_one(shape):
    torch.manual_seed(0)
    linear = torch.nn.Linear(shape[1], shape[0])
    before, gradient = linear.weight.detach().clone(), torch.randn(shape)
    linear.weight.grad = gradient.clone()
    build_optimizers(linear, OptimizerConfig(learning_rate=0.1))["muon"].step()
    nesterov = (1 + 0.95) * (1 - 0.95) * gradient  # momentum buffer, then the look-ahead
    expected = -0.1 * math.sqrt(max(1, shape[0] / shape[1])) * newton_schulz(nesterov, 5)
    # torch.optim.Muon iterates in bfloat16.
    assert ((linear.weight - before) - expected).norm() < 0.02 * expected.norm()


def test_learning_rate_is_constant_unless_decay_is_asked_for():
    assert learning_rate(OptimizerConfig(), 99, 100) == 1e-3
    decayed = OptimizerConfig(learning_rate=1.0, decay_share=0.1)
    assert [learning_rate(decayed, step, 100) for step in (0, 90, 95, 99)] == pytest.approx([1.0, 1.0, 0.5, 0.1])


def test_ema_follows_the_published_ramp():
    model = torch.nn.Linear(1, 1, bias=False)
    ema = EMA(model, half_life_kimg=1.0)
    value = ema.average["weight"].item()
    images, batch = 0, 100
    for step in range(300):
        with torch.no_grad():
            model.weight.fill_(float(step))
        ema.update(model, batch, images)
        half_life = min(1000.0, 0.05 * images)
        beta = 0.5 ** (batch / max(half_life, 1e-8))
        value = beta * value + (1 - beta) * step
        images += batch
    assert ema.average["weight"].item() == pytest.approx(value, rel=1e-5)
