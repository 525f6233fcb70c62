"""checkpointing="light": the same numbers with fewer bytes, under whatever runs a layer."""

import copy
import dataclasses
import functools
import pickle
import threading

import pytest
import torch
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import pmf
from pmf import layers
from pmf.counting import live_bytes, operations, saved_bytes
from pmf.layers import keep_less
from tests.kernels.checks import DEVICE
from tests.networks import TINY, random_model, relative_error
from tests.pmf.test_compile import fresh_compiler  # noqa: F401
from tests.pmf.test_cuda_graphs import CONFIG, agree, batch, captured
from tests.pmf.test_cuda_graphs import plain as plain_step
from tests.pmf.test_loss import LOSS, step_inputs

BF16, F32, F64 = torch.bfloat16, torch.float32, torch.float64
IMPLS = pytest.mark.parametrize("impl", ["reference", "triton"])
CONFIGS = {c: dataclasses.replace(TINY, conditioning=c) for c in ("in_context", "adaln")}


def networks(config=TINY, dtype=F64, **options):
    """The same network with "none" and with "light"."""
    return [random_model(config, dtype=dtype, checkpointing=c, **options).to(DEVICE) for c in ("none", "light")]


def step(model, dtype=F64, low=False, rows=6):
    """The loss of one step, and its fields."""
    x, y, draws = step_inputs(rows, dtype=dtype)
    draws = pmf.Draws(**{f.name: getattr(draws, f.name).to(DEVICE) for f in dataclasses.fields(draws)})
    with torch.autocast(DEVICE, BF16, enabled=low):
        return pmf.pmf_loss(model, x.to(DEVICE), y.to(DEVICE), draws, LOSS, return_fields=True)


def outcome(model, **how):
    """The loss, u_dot and every gradient."""
    out = step(model, **how)
    gradients = torch.autograd.grad(out.loss, list(model.parameters()), allow_unused=True)
    return [out.loss.detach(), out.fields["du_dt"], *(g for g in gradients if g is not None)]


def equal(found, expected):
    return len(found) == len(expected) and all(map(torch.equal, found, expected))


def close(found, expected, error):
    largest = max(e.norm() for e in expected)
    assert len(found) == len(expected)
    assert all((a - b).norm() <= error * largest for a, b in zip(found, expected, strict=True))


@pytest.mark.parametrize("conditioning", CONFIGS)
@pytest.mark.parametrize(("dtype", "low"), [(F64, False), (F32, True)], ids=("float64", "autocast"))
def test_the_reference_computes_the_same_bits(conditioning, dtype, low):
    plain, light = networks(CONFIGS[conditioning], dtype, impl="reference")
    assert equal(outcome(light, dtype=dtype, low=low), outcome(plain, dtype=dtype, low=low))


@pytest.mark.parametrize("conditioning", CONFIGS)
@pytest.mark.parametrize(("low", "error"), [(False, 1e-6), (True, 1e-2)], ids=("float32", "autocast"))
def test_kernels_compute_the_same_numbers(conditioning, low, error):
    plain, light = networks(CONFIGS[conditioning], F32, impl="triton")
    found, expected = outcome(light, dtype=F32, low=low), outcome(plain, dtype=F32, low=low)
    assert equal(found[:2], expected[:2])
    close(found[2:], expected[2:], error)


@IMPLS
@pytest.mark.parametrize("conditioning", CONFIGS)
def test_no_product_is_repeated(conditioning, impl):
    plain, light = (
        operations(lambda m=m: step(m, F32).loss.backward()) for m in networks(CONFIGS[conditioning], F32, impl=impl)
    )
    assert light == plain
