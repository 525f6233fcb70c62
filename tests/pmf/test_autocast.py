"""The autocast state that ops read, eager and compiled, and on devices without autocast."""

import pytest
import torch

from pmf.autocast import autocast_dtype, no_autocast

BF16 = torch.bfloat16


def product(x, w):
    """A product in autocast's dtype, as in ops, and one that autocast must not change."""
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
    with torch.autocast("cpu", dtype=BF16):  # does not apply to other devices
        assert [y.dtype for y in run(*inputs)] == [BF16 if device == "cpu" else torch.float32, torch.float32]
