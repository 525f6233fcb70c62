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
    two_passes = floor / share + costs.guidance / costs.main
    print(f"{name}: lean / naive {share:.3f}, lean / flow matching {floor:.3f}, two passes {two_passes:.3f}")
    assert 0.6 < share <= bound
    assert 1.3 < floor < 1.55


def test_a_lean_step_of_b16_at_batch_8():
    draws = draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    config = pmf.MODELS["pMF-B/16"]
    lean, naive = (operations(meta_step(config, draws, loss)) for loss in (lean_loss, naive_loss))
    assert naive == pytest.approx(4.57e12, rel=0.01)
    assert lean <= 0.74 * naive


def bytes_of_steps(model, x, y, draws):
    """Each step's bytes saved for backward, and its live bytes at the peak of forward and backward."""
    steps = dict(
        lean=lambda: pmf.pmf_loss(model, x, y, draws, LOSS).loss,
        flow_matching=lambda: lean_loss(model, x, y, draws.flow_matching(), LOSS),
        two_pass=lambda: two_pass_loss(model, x, y, draws, LOSS),
        joint=lambda: joint_jvp_loss(model, x, y, draws, LOSS),
    )
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)  # gradients exist before a step, as optimizers do
    saved = {name: saved_bytes(step, model.parameters()) for name, step in steps.items()}
    return saved, {name: live_bytes(lambda step=step: step().backward()).peak for name, step in steps.items()}


@pytest.mark.parametrize("conditioning", ["in_context", "adaln"])
def test_a_lean_step_saves_the_bytes_of_flow_matching(conditioning):
    x, y, draws = step_inputs(8)
    saved, _ = bytes_of_steps(random_model(dataclasses.replace(TINY, conditioning=conditioning)), x, y, draws)
    assert saved["lean"] <= 1.01 * saved["flow_matching"]
    assert saved["two_pass"] <= 1.01 * saved["flow_matching"]
    assert saved["lean"] < 0.5 * saved["joint"]


def test_bytes_of_b16_at_batch_8():
    config = pmf.MODELS["pMF-B/16"]
    model = pmf.create_model(config, device="meta", impl="reference")
    draws = draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    x = torch.empty(8, *config.image_shape, device="meta")
    draws = dataclasses.replace(draws, noise=torch.empty_like(x))
    for counted in bytes_of_steps(model, x, torch.zeros(8, dtype=torch.int64, device="meta"), draws):
        print({name: f"{value / 1e9:.2f} GB" for name, value in counted.items()})
        assert counted["lean"] <= 1.01 * counted["flow_matching"]
        assert counted["lean"] <= 1.01 * counted["two_pass"]
        assert counted["lean"] <= 0.35 * counted["joint"]


def test_two_passes_compute_one_forward_pass_more_than_a_joint_jvp():
    draws = draws_of(None, pmf.LOSSES["pMF-B/16"], 8, 0)
    steps = (lean_loss, draws.flow_matching()), (joint_jvp_loss, draws), (two_pass_loss, draws)
    flow, joint, two = (operations(meta_step(pmf.MODELS["pMF-B/16"], d, loss)) for loss, d in steps)
    print(f"of flow matching: joint {joint / flow:.2f}, two passes {two / flow:.2f}")
    assert two - joint == pytest.approx(flow / 3, rel=0.02)


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
