"""The benchmark's JAX step computes the loss of the library, and every gradient."""

import dataclasses

import pytest
import torch

import pmf
from pmf.benchmarks import jax_step
from pmf.errors import InputError
from tests.networks import TINY, golden, random_model, relative_error
from tests.test_loss import LOSS, gradients, step_inputs

pytestmark = pytest.mark.extras
needs_jax = pytest.mark.skipif(not jax_step.available(), reason="JAX is not installed")


def check(model, x, y, draws, config):
    loss, grads = jax_step.JaxStep(model, x, y, draws, config)()
    out, expected = gradients(model, x, y, draws, config, plan="naive")
    assert float(loss) == pytest.approx(out.loss.item(), rel=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative_error(torch.from_numpy(grad.__array__().copy()), expected[name]) < 1e-5, name


@needs_jax
def test_loss_and_gradients_on_the_golden_draws():
    g = golden()
    check(g.model(), g["in/x"], g["in/y"], g.draws, LOSS)


@needs_jax
def test_every_setting_of_the_loss_is_read():
    config = dataclasses.replace(LOSS, norm_p=0.5, norm_eps=0.1, class_dropout=0.5)
    x, y, draws = step_inputs(6, config, dtype=torch.float32)
    check(random_model(dataclasses.replace(TINY, noise_scale=2.0), dtype=torch.float32), x, y, draws, config)


@needs_jax
def test_bfloat16_is_close():
    """Products in bfloat16 move the loss by rounding alone, and do move it."""
    g = golden()
    losses = [
        float(jax_step.JaxStep(g.model(), g["in/x"], g["in/y"], g.draws, LOSS, compute)()[0])
        for compute in ("float32", "bfloat16")
    ]
    assert 0 < abs(losses[1] - losses[0]) < 2**-7 * losses[0]


@needs_jax
def test_the_other_conditioning_is_refused():
    with pytest.raises(InputError, match="config: the JAX step"):
        jax_step.JaxNetwork(dataclasses.replace(TINY, conditioning="adaln"))


def test_without_jax_the_error_names_it(monkeypatch):
    monkeypatch.setattr(jax_step, "available", lambda: False)
    with pytest.raises(InputError, match="pip install jax"):
        jax_step.JaxNetwork(pmf.MODELS["pMF-digits"])
