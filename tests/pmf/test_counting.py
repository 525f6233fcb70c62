"""Exact counts of a step's operations and saved bytes, without a GPU, against bounds."""

import dataclasses

import pytest
import torch

import pmf
from pmf.benchmarks.step_cases import joint_jvp_loss, lean_loss, two_pass_loss
from pmf.counting import live_bytes, operations, row_operations, saved_bytes
from pmf.reference.loss import pmf_loss as reference_loss
from tests.networks import TINY, meta_step, random_model
from tests.pmf.test_loss import LOSS, step_inputs

DIGITS = pmf.MODELS["pMF-digits"]


def draws_of(config, loss, batch, seed):
    return pmf.sample_draws(batch, (1, 1, 1), loss, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("seed", [0, 1])
def test_row_costs_add_up_to_the_counted_step(seed):
    draws = draws_of(DIGITS, LOSS, 8, seed)
    assert row_operations(DIGITS).lean(draws) == operations(meta_step(DIGITS, draws, lean_loss))


class VHeadGuidance:
    """A network for the oracle whose guidance runs only the v head, as in the authors' script compiled by XLA."""

    def __init__(self, model):
        self.model, self.config = model, model.config

    def __call__(self, z, t, h, *conditions):
        net = self.model.predict_dual(pmf.Dual(z), pmf.Dual(h), *conditions, heads=("v",))["v"].value
        return None, (z - self.model.to_images(net)) / t.clamp(self.config.t_clip, 1)[:, None, None, None]


def naive_loss(model, *arguments):
    """The oracle on every row, with a tangent only through the u head."""
    return reference_loss(VHeadGuidance(model), *arguments, lambda guided, *inputs: guided.model.forward_dual(*inputs))


@pytest.mark.parametrize("seed", [0, 1])
def test_row_costs_add_up_to_the_naive_step(seed):
    draws = draws_of(DIGITS, LOSS, 8, seed)
    assert row_operations(DIGITS).naive(draws) == operations(meta_step(DIGITS, draws, naive_loss))


def test_a_linear_layer_is_counted_by_its_formula():
    linear, x = torch.nn.Linear(5, 7, device="meta"), torch.empty(3, 5, device="meta", requires_grad=True)
    assert operations(lambda: linear(x)) == 2 * 3 * 5 * 7
    assert operations(lambda: linear(x).sum().backward()) == 3 * 2 * 3 * 5 * 7


@pytest.mark.parametrize(("name", "bound"), [("pMF-B/16", 0.74), ("pMF-L/16", 0.72), ("pMF-H/16", 0.72)])
def test_a_lean_step_counts_a_third_less(name, bound):
    costs = row_operations(pmf.MODELS[name])
    draws = [draws_of(None, pmf.LOSSES[name], 256, seed) for seed in range(200)]
    share = sum(map(costs.lean, draws)) / sum(map(costs.naive, draws))
    floor = sum(map(costs.lean, draws)) / sum(map(costs.flow_matching, draws))
    print(f"{name}: lean / naive {share:.3f}, lean / flow matching {floor:.3f}")
    assert 0.6 < share <= bound
    assert 1.3 < floor < 1.55


def test_a_lean_step_of_b16_at_batch_8():
    draws = draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    config = pmf.MODELS["pMF-B/16"]
    lean, naive = (operations(meta_step(config, draws, loss)) for loss in (lean_loss, naive_loss))
    assert naive == pytest.approx(4.57e12, rel=0.01)
    assert lean <= 0.74 * naive


def saved_by(model, x, y, draws):
    """Bytes that each step in `losses_of` saves for backward."""
    steps = losses_of(model, x, y, draws)
    return {name: saved_bytes(step, model.parameters()) for name, step in steps.items()}


def losses_of(model, x, y, draws):
    """The losses of a lean, a flow-matching and a joint-jvp step, and of a jvp without gradient before a forward."""
    return dict(
        lean=lambda: pmf.pmf_loss(model, x, y, draws, LOSS).loss,
        flow_matching=lambda: lean_loss(model, x, y, draws.flow_matching(), LOSS),
        joint=lambda: joint_jvp_loss(model, x, y, draws, LOSS),
        two_pass=lambda: two_pass_loss(model, x, y, draws, LOSS),
    )


@pytest.mark.parametrize("conditioning", ["in_context", "adaln"])
def test_a_lean_step_saves_the_bytes_of_flow_matching(conditioning):
    x, y, draws = step_inputs(8)
    saved = saved_by(random_model(dataclasses.replace(TINY, conditioning=conditioning)), x, y, draws)
    assert saved["lean"] <= 1.01 * saved["flow_matching"]
    assert saved["lean"] < 0.5 * saved["joint"]


def b16_at_batch_8():
    """B/16 on meta tensors, x, y and draws."""
    config = pmf.MODELS["pMF-B/16"]
    model = pmf.create_model(config, device="meta", impl="reference")
    draws = draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    x = torch.empty(8, *config.image_shape, device="meta")
    draws = dataclasses.replace(draws, noise=torch.empty_like(x))
    return model, x, torch.zeros(8, dtype=torch.int64, device="meta"), draws


def test_bytes_saved_by_b16_at_batch_8():
    saved = saved_by(*b16_at_batch_8())
    print({name: f"{value / 1e9:.2f} GB" for name, value in saved.items()})
    assert saved["lean"] <= 1.01 * saved["flow_matching"]
    assert saved["lean"] <= 0.35 * saved["joint"]
    assert saved["lean"] <= 1.01 * saved["two_pass"]


def test_bytes_alive_at_the_peak_of_a_step_of_b16_at_batch_8():
    model, *inputs = b16_at_batch_8()

    def step(loss):
        loss().backward()
        model.zero_grad()

    peak = {name: live_bytes(lambda loss=loss: step(loss)).peak for name, loss in losses_of(model, *inputs).items()}
    print({name: f"{value / 1e9:.2f} GB" for name, value in peak.items()})
    assert peak["lean"] <= 1.02 * peak["flow_matching"] and peak["lean"] <= peak["two_pass"]
    assert peak["lean"] <= 0.35 * peak["joint"]


def test_operations_of_a_jvp_without_gradient_and_a_second_forward_of_b16():
    config, draws = pmf.MODELS["pMF-B/16"], draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    lean, two_pass = (operations(meta_step(config, draws, loss)) for loss in (lean_loss, two_pass_loss))
    floor = operations(meta_step(config, draws.flow_matching(), lean_loss))
    print(f"of flow matching: lean {lean / floor:.2f}, two passes {two_pass / floor:.2f}")
    assert 1.3 < lean / floor < 1.45 and lean <= 0.5 * two_pass


def test_live_bytes_count_each_storage_from_its_first_operator_until_it_is_freed():
    a, w = torch.randn(250), torch.randn(10, 10, requires_grad=True)
    assert live_bytes(lambda: a.view(10, 25).add_(1)) == (0, 0)
    assert live_bytes(lambda: (a + 1).view(10, 25)) == (1000, 1000)
    assert live_bytes(lambda: ((a + 1) * 2).sin()[:3]) == (2000, 1000)
    assert live_bytes(lambda: (w @ w).tanh()) == (800, 400)
    # Backward keeps tanh's result, its gradient, and the gradients of both factors, then their sum.
    assert live_bytes(lambda: (w @ w).tanh().sum().backward()).end == 400


def test_live_bytes_see_the_tangents_that_a_joint_jvp_keeps():
    x, w = torch.randn(50, 50), torch.randn(50, 50, requires_grad=True)

    def network(x):
        for _ in range(8):
            x = (x @ w).tanh()
        return x

    forward = live_bytes(lambda: network(x))
    ours = live_bytes(lambda: pmf.jvp(network, (x,), (x,)))
    joint = live_bytes(lambda: torch.func.jvp(network, (x,), (x,)))
    # At the end: eight values and one tangent, against two values and two tangents of each layer.
    assert (forward.end, ours.end) == (8 * x.nbytes, 9 * x.nbytes)
    assert joint.end > 3 * forward.end and joint.peak > 2 * ours.peak
