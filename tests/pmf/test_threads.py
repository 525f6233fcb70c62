"""Passes of several threads on one network, and of several contexts in one thread, do not see each other's state."""

import concurrent.futures
import contextlib
import copy
import functools
import itertools
import pickle
import threading

import pytest
import torch

import pmf
from pmf.packing import PackedModule
from tests.networks import random_model, relative_error
from tests.pmf.test_loss import LOSS, step_inputs

SETTING = dict(omega=2.0, t_min=0.1, t_max=0.9)
STEPS = 30


def float_inputs(seed):
    return step_inputs(6, seed=seed, dtype=torch.float32)


def autocast(enabled):
    return torch.autocast("cpu", torch.bfloat16, enabled=enabled)


def gradients(model, inputs, low):
    """Gradients of one step, which adds to no `.grad`."""
    with autocast(low):
        loss = pmf.pmf_loss(model, *inputs, LOSS).loss
    return [loss.detach(), *torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)]


def loss_alone(model, inputs, low):
    with autocast(low), torch.no_grad():
        return [pmf.pmf_loss(model, *inputs, LOSS).loss]


def samples(model, inputs, low):
    with autocast(low):
        return [pmf.generate(model, inputs[1], steps=2, **SETTING)]


def velocity_of_held_weights(model, inputs, low):
    with autocast(low), torch.no_grad(), model.held_weights():
        return [images(model, inputs)]


def images(model, inputs):
    """u of a plain forward pass."""
    x, y, draws = inputs
    return model(x, draws.t, draws.t - draws.r, draws.omega, draws.t_min, draws.t_max, y)[0]


WORK = [gradients, samples, loss_alone, gradients, velocity_of_held_weights]
"""One thread each."""


def same(found, wanted):
    pairs = zip(found, wanted, strict=True)
    return all(a is b is None or (a is not None and b is not None and torch.equal(a, b)) for a, b in pairs)


@pytest.mark.parametrize("low", [(False,) * 5, (True,) * 5, (False, True, True, True, False), (True,) + (False,) * 4])
@pytest.mark.parametrize("checkpointing", ["none", "light", "block"])
def test_threads_on_one_network_compute_what_each_does_alone(checkpointing, low):
    """`low`: the threads that are under autocast."""
    model = random_model(dtype=torch.float32, checkpointing=checkpointing)
    inputs = [float_inputs(seed) for seed in range(len(WORK))]
    jobs = list(zip(WORK, inputs, low, strict=True))
    alone = [work(model, given, under) for work, given, under in jobs]
    start = threading.Barrier(len(jobs))

    def differing(work, given, under, wanted):
        start.wait()
        return [step for step in range(STEPS) if not same(work(model, given, under), wanted)]

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        runs = [pool.submit(differing, *job, wanted) for job, wanted in zip(jobs, alone, strict=True)]
        assert [run.result() for run in runs] == [[]] * len(jobs)


def on_other_thread(work):
    with concurrent.futures.ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def plain_gradients(model, inputs):
    return torch.autograd.grad(images(model, inputs).sum(), list(model.parameters()), allow_unused=True)


def nothing_held(model):
    return not any(m.held for m in model.modules() if isinstance(m, PackedModule))


@pytest.mark.parametrize("number", [1, 2])
@pytest.mark.parametrize(("outer", "inner"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize("checkpointing", ["none", "block"])
def test_calls_from_a_hook_of_the_loss_change_nothing(checkpointing, outer, inner, number):
    """In the guidance's pass, which is not recorded, and in the main pass."""
    model, inputs = random_model(dtype=torch.float32, checkpointing=checkpointing), float_inputs(0)
    alone = [work(model, inputs, inner) for work in WORK]
    wanted = gradients(model, inputs, outer)
    passes, found = [], []

    def hook(*_):
        passes.append(None)
        if len(passes) == number:
            before = model.shared_blocks[0].mlp.packed()
            with torch.enable_grad(), autocast(False):
                found.extend(work(model, inputs, inner) for work in WORK)
            assert model.shared_blocks[0].mlp.packed() is before

    handle = model.conditioning.classes.register_forward_hook(hook)
    assert same(gradients(model, inputs, outer), wanted)
    handle.remove()
    assert len(found) == len(WORK) and all(map(same, found, alone)) and nothing_held(model)


@pytest.mark.parametrize("low", [False, True])
def test_a_suspended_generator_keeps_its_weights_to_itself(low):
    model, inputs = random_model(dtype=torch.float32), float_inputs(0)
    wanted, expected = plain_gradients(model, inputs), samples(model, inputs, False)

    @torch.no_grad()
    def previews():
        with torch.autocast("cpu", torch.bfloat16, enabled=low), model.held_weights():
            yield
            yield images(model, inputs)

    with torch.autocast("cpu", torch.bfloat16, enabled=low), torch.no_grad():
        preview = images(model, inputs)
    running = previews()
    next(running)
    with torch.autocast("cpu", enabled=False):
        assert same(plain_gradients(model, inputs), wanted)
        assert same(samples(model, inputs, False), expected)
    assert torch.equal(next(running), preview)
    running.close()
    assert nothing_held(model)


def test_contexts_end_in_any_order_by_errors_and_in_other_threads():
    model = random_model(dtype=torch.float32)
    mlp = model.shared_blocks[0].mlp
    first, second, third = (model.held_weights() for _ in range(3))
    first.__enter__()
    outer = mlp.packed()
    second.__enter__()
    inner = mlp.packed()
    assert inner[0] is not outer[0] and mlp.packed()[0] is inner[0]
    first.__exit__(None, None, None)
    assert mlp.packed()[0] is inner[0]
    third.__enter__()
    on_other_thread(lambda: third.__exit__(None, None, None))
    assert mlp.packed()[0] is inner[0] and on_other_thread(lambda: nothing_held(model))
    with pytest.raises(KeyError), model.held_weights():
        raise KeyError
    assert mlp.packed()[0] is inner[0]
    second.__exit__(None, None, None)
    assert nothing_held(model)


def test_weights_serve_passes_in_their_own_mode():
    model = random_model(dtype=torch.float32)
    mlp, low = model.shared_blocks[0].mlp, torch.autocast("cpu", torch.bfloat16)
    with torch.no_grad():
        joined = model.joined_weights()
    with model.held_weights(joined):
        assert mlp.held and mlp.packed()[0].requires_grad
        with torch.no_grad():
            unrecorded = mlp.packed()
            assert unrecorded[0] is mlp.packed()[0]
            with low:
                assert mlp.packed()[0] is not unrecorded[0]
            with model.held_weights(joined):
                pass
            assert mlp.packed()[0] is unrecorded[0]
        with low, model.held_weights():
            recorded = mlp.packed()
            with torch.no_grad():
                assert mlp.packed()[0] is recorded[0] and recorded[0].dtype == torch.bfloat16
                with torch.autocast("cpu", enabled=False):
                    assert mlp.packed()[0] is unrecorded[0]


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_hold_nothing(copied):
    model, inputs = random_model(dtype=torch.float32), float_inputs(0)
    with model.held_weights():
        other = copied(model)
        assert not nothing_held(model) and nothing_held(other)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    with model.held_weights():
        assert not torch.equal(images(other, inputs), images(model, inputs))


@pytest.mark.parametrize(("low", "compiled"), [(False, False), (True, False), (True, True)])
def test_recomputed_blocks_use_the_weights_of_the_first_pass(low, compiled):
    """Backward inside the context and after it, on other threads, and while other weights are held."""
    model, inputs = random_model(dtype=torch.float32, checkpointing="block"), float_inputs(0)
    if compiled:
        torch._dynamo.reset()
        model.compile_blocks(backend="eager")

    def recorded():
        with autocast(low):
            return pmf.pmf_loss(model, *inputs, LOSS).loss

    def added(backward):
        model.zero_grad()
        backward()
        return [p.grad for p in model.parameters()]

    def held(backward, grad, dtype):
        with contextlib.ExitStack() as others:
            with autocast(dtype), torch.set_grad_enabled(grad):
                others.enter_context(model.held_weights())
            backward()

    wanted = added(lambda: recorded().backward())
    assert all(gradient is not None for gradient in wanted)
    for mode in itertools.product((False, True), repeat=2):
        for run in (lambda work: work(), on_other_thread):
            step = functools.partial(held, recorded().backward, *mode)
            assert same(added(functools.partial(run, step)), wanted)
    assert same(added(lambda: held(lambda: recorded().backward(), True, low)), wanted)


def test_threads_share_compiled_blocks():
    """Up to rounding: Dynamo keeps graphs of fixed and of any size, and tries those first that ran last."""
    torch._dynamo.reset()
    model, inputs = random_model(dtype=torch.float32), [float_inputs(seed) for seed in range(3)]
    model.compile_blocks(backend="eager")
    jobs = list(zip([gradients, samples, loss_alone], inputs, strict=True))
    alone = [work(model, given, False) for work, given in jobs]

    def largest_error(work, given, wanted):
        found = [work(model, given, False) for _ in range(STEPS)]
        return max(relative_error(a, b) for one in found for a, b in zip(one, wanted, strict=True))

    with concurrent.futures.ThreadPoolExecutor(len(jobs)) as pool:
        runs = [pool.submit(largest_error, *job, wanted) for job, wanted in zip(jobs, alone, strict=True)]
        assert max(run.result() for run in runs) < 1e-6


def test_threads_and_hooks_share_a_sampler():
    model = random_model(dtype=torch.float32)
    sampler = pmf.Sampler(model, 2, steps=3, **SETTING)
    requests = [dict(labels=[n % 5] * (3 + n % 2), seeds=range(n, n + 3 + n % 2)) for n in range(8)]
    alone = [sampler(**request) for request in requests]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        for _ in range(5):
            assert all(map(torch.equal, pool.map(lambda request: sampler(**request), requests), alone))
    within = []

    def hook(*_):
        if not within:
            within.append(None)
            within[:] = [sampler(**requests[1])]

    model.conditioning.classes.register_forward_hook(hook)
    assert torch.equal(sampler(**requests[0]), alone[0]) and torch.equal(within[0], alone[1])


def test_a_captured_step_refuses_a_call_during_another():
    model, inputs = random_model(dtype=torch.float32), float_inputs(0)
    step = pmf.CapturedStep(model, LOSS)

    def perceptual(x_hat, x):
        with pytest.raises(pmf.InputError, match=r"^CapturedStep: expected one call at a time, got two$"):
            on_other_thread(lambda: step(*inputs))
        return {"lpips": (x_hat - x).square().mean((1, 2, 3))}

    first = step(*inputs, perceptual).loss
    assert torch.equal(step(*inputs, perceptual).loss, first)


def test_attention_backends_are_requested_by_contexts_that_end_in_any_order():
    from pmf.kernels import flash

    first, second = pmf.ops.use_attention_backend("cudnn"), pmf.ops.use_attention_backend("flash")
    first.__enter__()
    second.__enter__()
    with pmf.ops.use_attention_backend(None):
        assert flash._requested == "flash"
    first.__exit__(None, None, None)
    assert flash._requested == "flash"
    second.__exit__(None, None, None)
    assert flash._requested is None
