"""`CapturedStep` against `pmf_loss` and backward. On the CPU its halves run uncaptured, in the same fixed buffers."""

import contextlib

import pytest
import torch
import torch.distributed as dist

import pmf
from pmf.errors import InputError
from tests.networks import TINY, random_model

CONFIG = pmf.LossConfig()
BATCH = 6


def batch(seed, size=BATCH, dtype=torch.float64):
    gen = torch.Generator().manual_seed(seed)
    x = torch.rand(size, *TINY.image_shape, generator=gen, dtype=dtype) * 2 - 1
    y = torch.randint(TINY.num_classes, (size,), generator=gen)
    return x, y, pmf.sample_draws(size, TINY.image_shape, CONFIG, gen)


def perceptual(x_hat, x):
    return {"lpips": (x_hat - x).square().mean((1, 2, 3)), "convnext": (x_hat - x).abs().mean((1, 2, 3))}


def plain(model, inputs, judge=None):
    """Loss, terms and gradients of a plain step."""
    model.zero_grad()
    out = pmf.pmf_loss(model, *inputs, CONFIG, perceptual=judge)
    out.loss.backward()
    return [out.loss.detach(), *out.terms.values(), *(p.grad.clone() for p in model.parameters())]


def captured(step, model, inputs, judge=None):
    """The same of the captured step, with the scale of the gradients undone."""
    model.zero_grad()
    out = step(*inputs, judge)
    assert not out.loss.requires_grad
    return [out.loss, *out.terms.values(), *(p.grad / step.scale for p in model.parameters())]


def agree(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("judge", (None, perceptual))
def test_steps_of_many_sizes_equal_the_plain_step(judge):
    """Twelve draws: several numbers of null rows and two batch sizes, which share buffers."""
    model = random_model()
    step = pmf.CapturedStep(model, CONFIG, scale=0.25)
    for seed in range(12):
        inputs = batch(seed, BATCH - seed % 2)
        expected = plain(model, inputs, judge)
        agree(captured(step, model, inputs, judge), expected)
    assert 1 < len(step._halves) < 12


@pytest.mark.parametrize("autocast", (False, True))
def test_weights_are_those_of_the_call(autocast):
    """A call uses weights as changed since the last one, also under autocast, whose cached casts must not survive."""
    model = random_model(dtype=torch.float32)
    step = pmf.CapturedStep(model, CONFIG)
    inputs = batch(0, dtype=torch.float32)
    context = torch.autocast("cpu", torch.bfloat16) if autocast else contextlib.nullcontext()
    with context:
        for _ in range(2):
            found = captured(step, model, inputs)
            assert all(map(torch.equal, found, plain(model, inputs)))
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(1.1)


def test_gradients_are_added_as_backward_adds_them():
    """Added to missing gradients, to those of the last call, and to a mixture of missing and other ones."""
    model = random_model()
    step = pmf.CapturedStep(model, CONFIG)
    first, second = batch(0), batch(1)
    one, two = plain(model, first)[3:], plain(model, second)[3:]
    model.zero_grad()
    step(*first)
    step(*second)
    agree([p.grad for p in model.parameters()], [a + b for a, b in zip(one, two, strict=True)])
    model.zero_grad()
    parameters = list(model.parameters())
    parameters[0].grad = torch.ones_like(parameters[0])
    step(*first)
    agree([p.grad for p in parameters], [one[0] + 1, *one[1:]])


def test_the_dtype_of_a_step_does_not_stick():
    model = random_model(dtype=torch.float32)
    step = pmf.CapturedStep(model, CONFIG)
    x, y, draws = batch(0, dtype=torch.float32)
    expected = plain(model, (x, y, draws))
    for images in (x.bfloat16(), x.double(), x):
        found = captured(step, model, (images, y, draws))
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_without_distances_the_perceptual_gradient_is_zero():
    model = random_model()
    step = pmf.CapturedStep(model, CONFIG)
    agree(captured(step, model, batch(0), lambda x_hat, x: {}), plain(model, batch(0)))


def test_what_it_cannot_take_is_refused():
    model = random_model()
    step = pmf.CapturedStep(model, CONFIG)
    x, y, draws = batch(0)
    with pytest.raises(InputError, match=r"^x: expected finite images"):
        step(torch.full_like(x, float("nan")), y, draws)
    assert all(p.grad is None for p in model.parameters())
    with torch.no_grad(), pytest.raises(InputError, match=r"expected recorded gradients, got a call under torch.no_gr"):
        step(x, y, draws)
    with pytest.raises(InputError, match=r"^model: expected parameters to train, got none that requires a gradient"):
        pmf.CapturedStep(random_model().requires_grad_(False), CONFIG)
    model.float()
    with pytest.raises(InputError, match=r"^model: its parameters were replaced"):
        step(x, y, draws)
    model.conditioning.double()
    with pytest.raises(InputError, match=r"^model: expected parameters of one dtype"):
        pmf.CapturedStep(model, CONFIG)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_gradients_of_captured_steps_are_reduced_while_nccl_watches(tmp_path):
    """In a group of one rank the sum is the step's own; NCCL's watchdog thread runs during the captures."""
    model = random_model(dtype=torch.float32).cuda()
    dist.init_process_group("nccl", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        step = pmf.CapturedStep(model, CONFIG)
        for seed in range(3):
            x, y, _ = batch(seed, BATCH - seed % 2, torch.float32)
            draws = pmf.sample_draws(len(x), TINY.image_shape, CONFIG, torch.Generator().manual_seed(seed), "cuda")
            model.zero_grad()
            step(x.cuda(), y.cuda(), draws)
            alone = [p.grad.clone() for p in model.parameters()]
            step.all_reduce_gradients()
            assert all(map(torch.equal, (p.grad for p in model.parameters()), alone))
    finally:
        dist.destroy_process_group()
