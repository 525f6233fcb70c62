"""`swiglu` and `gelu` in Triton against the float64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import ops
from pmf.errors import InputError
from tests.kernels.checks import DEVICE, check, check_compiles, check_forward_mode, generator, randn, strided

OPS = {"swiglu": {}, "gelu": {}, "gelu tanh": {"approximate": "tanh"}}
"""Options by name; the first word is the op."""
EVERY = pytest.mark.parametrize("name", OPS)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def inputs(batch, length, width, rows, dtype):
    gen = generator(batch, length, width, rows)
    x = randn(batch, length, 2 * width, gen=gen, dtype=dtype)
    return (x,), (randn(rows, length, 2 * width, gen=gen, dtype=dtype) if rows else None,)


def check_op(name, primals, tangents):
    check(name.split()[0], primals, tangents, **OPS[name])


@EVERY
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
@pytest.mark.parametrize("width", (171, 2048, 2730))
@pytest.mark.parametrize("length", (1, 17, 276))
def test_shapes(length, width, dtype, name):
    for rows in (0, 1, 2) if length < 276 else (1,):
        check_op(name, *inputs(2, length, width if name == "swiglu" else width // 2, rows, dtype))


@EVERY
def test_views(name):
    (x,), (x_dot,) = inputs(3, 17, 40, 2, torch.float32)
    check_op(name, (strided(x),), (strided(x_dot),))
    check_op(name, (x.mT.contiguous().mT,), (x_dot.mT.contiguous().mT,))
    check_op(name, (x[:, 3:],), (x_dot[:, 3:],))


@EVERY
@pytest.mark.parametrize("shape", [(3, 24), (3, 5, 24), (3, 2, 5, 24)], ids=str)
def test_two_to_four_dimensions(shape, name):
    x, x_dot = randn(*shape, gen=generator(shape)), randn(2, *shape[1:], gen=generator(shape, 1))
    check_op(name, (x,), (x_dot,))
    check_op(name, (x.mT.contiguous().mT,), (x_dot,))


@EVERY
@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 70),
    width=st.integers(1, 90),
    share=st.floats(0, 1),
    dtype=st.sampled_from(DTYPES),
)
def test_any_shape(name, batch, length, width, share, dtype):
    check_op(name, *inputs(batch, length, width, round(share * batch), dtype))


@EVERY
def test_large_inputs(name):
    """Where exp or a cube overflows, the function takes its limit and the gradient is not NaN."""
    x = torch.tensor([-1e12, -1e4, -100.0, -6.0, 0.0, 100.0, 1e4, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1e12])
    check_op(name, (x.reshape(1, 1, -1).to(DEVICE),), (torch.ones(1, 1, 14, device=DEVICE),))


@EVERY
def test_compilers_checkpointing_and_forward_mode(name):
    primals, tangents = inputs(3, 5, 24, 2, torch.bfloat16)
    check_compiles(name.split()[0], primals, tangents, **OPS[name])
    check_forward_mode(name.split()[0], primals, (0,), **OPS[name])


def test_registered_operators():
    (x,), (x_dot,) = inputs(3, 5, 24, 2, torch.bfloat16)
    ops.swiglu(x, impl="triton")
    ops.gelu(x, impl="triton")
    utils = ("test_schema", "test_faketensor")
    torch.library.opcheck(torch.ops.pmf.swiglu_forward.default, (x, x_dot), test_utils=utils)
    torch.library.opcheck(torch.ops.pmf.swiglu_backward.default, (x[..., :24], x, True), test_utils=utils)
    torch.library.opcheck(torch.ops.pmf.gelu_forward.default, (x, x_dot, True), test_utils=utils)
    torch.library.opcheck(torch.ops.pmf.gelu_backward.default, (x, x, False, True), test_utils=utils)


def test_bad_input():
    with pytest.raises(InputError, match=r"^swiglu: x must have an even last dimension, got 7"):
        ops.swiglu(torch.ones(2, 5, 7), impl="triton")
    with pytest.raises(InputError, match=r"^swiglu: dtype must be float32, bfloat16 or float16"):
        ops.swiglu(torch.ones(2, 5, 8, dtype=torch.float64), impl="triton")
    with pytest.raises(InputError, match=r'^gelu: approximate must be "none" or "tanh", got \'erf\'$'):
        ops.gelu(torch.ones(2, 5, 8), approximate="erf")
    with pytest.raises(InputError, match=r"^gelu: x must have shape \[any, any\], .*, got \[8\]$"):
        ops.gelu(torch.ones(8))
