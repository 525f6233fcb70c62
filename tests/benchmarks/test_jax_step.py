"""The benchmarks' JAX step computes the library's loss and every gradient."""

import dataclasses

import pytest
import torch

import pmf
from pmf.benchmarks import step_cases
from pmf.errors import InputError
from tests.networks import TINY, every_row_in_full, golden, random_model, relative_error
from tests.pmf.test_loss import LOSS, oracle, step_inputs

pytestmark = pytest.mark.extras


@pytest.fixture
def jax_step():
    pytest.importorskip("jax", reason="JAX is not installed")
    from pmf.benchmarks import jax_step

    return jax_step


def check(jax_step, model, x, y, draws, config):
    loss, grads = jax_step.JaxStep(model, (x, y, draws), config)()
    wanted, expected = oracle(model, x, y, draws, config)
    assert float(loss) == pytest.approx(wanted.item(), rel=1e-5)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert relative_error(torch.from_numpy(grad.__array__().copy()), expected[name]) < 1e-5, name


def test_loss_and_gradients_on_the_golden_draws(jax_step):
    g = golden()
    check(jax_step, g.model(), g["in/x"], g["in/y"], g.draws, LOSS)


def test_every_setting_of_the_loss_is_read(jax_step):
    config = dataclasses.replace(LOSS, norm_p=0.5, norm_eps=0.1, class_dropout=0.5)
    x, y, draws = step_inputs(6, config, dtype=torch.float32)
    check(jax_step, random_model(dataclasses.replace(TINY, noise_scale=2.0), dtype=torch.float32), x, y, draws, config)


def test_bfloat16_errs_no_more_than_twice_autocast(jax_step):
    """Errors against float64 of all gradients as one vector, plus one rounding step."""
    x, y, draws = step_inputs(6)
    truth = oracle(random_model(), x, y, draws, LOSS)[1]
    floats = {n: v.float() if v.is_floating_point() else v for n, v in vars(draws).items()}
    x, draws, model = x.float(), pmf.Draws(**floats), random_model().float()
    with torch.autocast("cpu", dtype=torch.bfloat16), every_row_in_full():
        loss = pmf.pmf_loss(model, x, y, draws, LOSS).loss
    loss.backward()
    autocast = {name: p.grad for name, p in model.named_parameters()}
    ours = jax_step.JaxStep(model, (x, y, draws), LOSS, "bfloat16")()[1]
    ours = {name: torch.from_numpy(grad.__array__().copy()) for name, grad in ours.items()}

    def error(grads):
        return relative_error(*(torch.cat([g[name].double().flatten() for name in truth]) for g in (grads, truth)))

    assert 1e-4 < error(ours) < 2 * error(autocast) + 2**-8


def test_the_other_conditioning_is_refused(jax_step):
    with pytest.raises(InputError, match="config: the JAX step"):
        jax_step.JaxStep(random_model(dataclasses.replace(TINY, conditioning="adaln")), step_inputs(2), LOSS)


def test_without_jax_the_other_steps_are_measured(monkeypatch):
    monkeypatch.setattr(step_cases.importlib.util, "find_spec", lambda name: None)
    providers = step_cases.step_providers("pMF-digits", 2, torch.device("cpu"))
    assert "JAX" not in providers and "lean" in providers
