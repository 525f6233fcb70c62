"""`compile_blocks`: few graphs without breaks for batches of any size; the same loss and gradients."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

import pmf
from pmf.counting import saved_bytes
from pmf.loss import squared_errors
from pmf.step_plan import StepPlan, plan_step
from tests.kernels.checks import DEVICE
from tests.networks import TINY, random_model, relative_error
from tests.pmf.jvp_checks import PARTITIONED

F32 = torch.float32


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()


def pair(backend="aot_eager", config=TINY, device="cpu", **options):
    """The same network twice, the second with compiled blocks, and the counter of its graphs."""
    plain, compiled = (random_model(config, dtype=F32, **options).to(device) for _ in range(2))
    counter = CompileCounterWithBackend(backend)
    compiled.compile_blocks(backend=counter)
    return plain, compiled, counter


def step(seed, batch=16, law=None):
    config = pmf.LossConfig(**(law or {}))
    generator = torch.Generator().manual_seed(seed)
    draws = pmf.sample_draws(batch, TINY.image_shape, config, generator)
    x = torch.rand(batch, *TINY.image_shape, generator=generator) * 2 - 1
    return x, torch.randint(TINY.num_classes, (batch,), generator=generator), draws, config


def loss_and_gradients(model, arguments):
    model.zero_grad()
    loss = pmf.pmf_loss(model, *arguments).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters())]


def compare(plain, compiled, *arguments):
    expected, got = (loss_and_gradients(model, arguments) for model in (plain, compiled))
    for a, b in zip(got, expected, strict=True):
        assert relative_error(a, b) < 1e-6


def guidance_batch(draws):
    plan = StepPlan.of(draws)
    return plan.tangent_rows + len(plan.padded_null_rows())


@pytest.mark.parametrize(("checkpointing", "graphs"), [("none", 5), ("block", 6)])
def test_twenty_ragged_steps_take_a_stated_number_of_graphs(checkpointing, graphs):
    plain, compiled, counter = pair(checkpointing=checkpointing)
    sizes = set()
    for seed in range(20):
        arguments = step(seed)
        sizes.add(guidance_batch(arguments[2]))
        if seed < 3:
            compare(plain, compiled, *arguments)
        else:
            loss_and_gradients(compiled, arguments)
        assert counter.frame_count == graphs, seed
    assert len(sizes) >= 4


def test_other_batch_sizes_add_graphs_once():
    _, compiled, counter = pair("eager")
    counts = []
    for batch in (16, 12, 7):
        loss_and_gradients(compiled, step(0, batch))
        counts.append(counter.frame_count)
    assert counts == [5, 8, 8]


def test_single_rows_and_rows_of_one_kind():
    plain, compiled, _ = pair("eager")
    compare(plain, compiled, *step(1, 1, dict(data_proportion=0.0)))
    compare(plain, compiled, *step(1, 1, dict(data_proportion=1.0, class_dropout=1.0)))


def test_sampling_compiles_two_graphs_for_every_batch_size():
    plain, compiled, counter = pair()
    for n in (2, 5, 3):
        setting = dict(omega=2.0, t_min=0.1, t_max=0.9, batch_size=4, steps=2)
        images, expected = (pmf.generate(model, [1] * n, **setting) for model in (compiled, plain))
        assert relative_error(images, expected) < 1e-6
    assert counter.frame_count == 4  # batches of one image have graphs of their own


def test_kernels_compile_without_gradients():
    config = dataclasses.replace(TINY, depth=2, conditioning="adaln")
    plain, compiled, counter = pair(config=config, device=DEVICE, impl="triton", aux_head=False)
    images, expected = (pmf.generate(m, [1, 2], omega=2.0, t_min=0.1, t_max=0.9) for m in (compiled, plain))
    assert torch.equal(images, expected) and counter.frame_count == 2


def test_inductor():
    plain, compiled, counter = pair("inductor", config=dataclasses.replace(TINY, depth=2), aux_head=False)
    sampler = pmf.Sampler(compiled, 3, omega=2.0, t_min=0.1, t_max=0.9)
    expected = pmf.generate(plain, [0, 3, 5, 1], omega=2.0, t_min=0.1, t_max=0.9)
    assert relative_error(sampler([0, 3, 5, 1]), expected) < 1e-5
    assert counter.frame_count == 2


def planned_loss(checkpointing):
    """A network of four blocks and its loss, for which no number is read that compilers do not know."""
    model = random_model(dataclasses.replace(TINY, depth=4), dtype=F32, checkpointing=checkpointing)
    x, y, draws, config = step(0)
    planned = plan_step(model, x, y, draws, config)
    return model, lambda: squared_errors(model, planned, config).rows.mean()


@pytest.mark.parametrize("checkpointing", ["none", "block", "light"])
def test_a_planned_loss_is_one_graph_that_leaves_nothing_held(checkpointing):
    model, loss = planned_loss(checkpointing)
    compiled = torch.compile(loss, **PARTITIONED)
    found, expected = (torch.autograd.grad(run(), list(model.parameters())) for run in (compiled, loss))
    assert all(relative_error(a, b) < 1e-6 for a, b in zip(found, expected, strict=True))
    assert not model.shared_blocks[0].mlp.held
    if checkpointing == "block":
        without, kept = planned_loss("none"), saved_bytes(compiled, model.parameters())
        assert kept < 0.3 * saved_bytes(without[1], without[0].parameters())
