"""Autocast as the ops see it: eager and compiled, and on devices without it."""

import pytest
import torch

from pmf.autocast import autocast_dtype, no_autocast

BF16 = torch.bfloat16


def product(x, w):
    """A product as ops make them, and one that autocast must not touch."""
    low = x.to(autocast_dtype(x.device.type) or x.dtype)
    with no_autocast(x.device):
        exact = x @ w
    return low @ w.to(low.dtype), exact


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("compiled", [False, True])
def test_dtypes(device, compiled):
    run = torch.compile(product, fullgraph=True, backend="aot_eager") if compiled else product
    inputs = torch.ones(2, 2, device=device), torch.ones(2, 2, device=device)
    assert [y.dtype for y in run(*inputs)] == [torch.float32, torch.float32]
    with torch.autocast("cpu", dtype=BF16):  # says nothing about other devices
        assert [y.dtype for y in run(*inputs)] == [BF16 if device == "cpu" else torch.float32, torch.float32]
