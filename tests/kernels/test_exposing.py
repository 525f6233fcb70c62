"""What tests make visible: values that a kernel forgets to write, and offsets that overflow."""

import pytest
import torch

pytest.importorskip("triton")

import triton
import triton.language as tl

from tests.kernels.checks import DEVICE


@pytest.fixture(scope="module")
def allocated_by_a_fixture():
    return torch.empty(3)


def test_allocations_are_poisoned(allocated_by_a_fixture):
    assert allocated_by_a_fixture.isnan().all()
    assert torch.empty(3).isnan().all()


@triton.jit
def offsets(out, rows, stride, kind: tl.constexpr):
    row = tl.arange(0, 4) + rows - 4
    if kind == "mul":
        found = row * stride
    elif kind == "add":
        found = row + stride
    else:
        found = -row - stride
    tl.store(out + tl.arange(0, 4), found)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels do not check")
@pytest.mark.parametrize(("kind", "most"), [("mul", (2**31 - 1) // 7), ("add", 2**31 - 8), ("sub", 2**31 - 7)])
def test_offsets_that_overflow_are_refused(kind, most):
    out = torch.empty(4, dtype=torch.int32, device=DEVICE)
    offsets[(1,)](out, 8, most, kind)
    last = 7 * most if kind == "mul" else 7 + most if kind == "add" else -7 - most
    assert out[3] == last
    with pytest.raises(Exception, match=f"{kind} of int32 overflows"):
        offsets[(1,)](out, 8, most + 1, kind)
