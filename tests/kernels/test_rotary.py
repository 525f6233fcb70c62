"""`qk_norm_rope` in Triton against the float64 reference."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from pmf import Dual, ops
from pmf.errors import InputError
from tests.kernels.checks import check, check_compiles, check_forward_mode, close, generator, randn

TABLES = (3, 4)
"""cos and sin, which take no gradient."""
F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def inputs(batch, length, heads, head_dim, rows, dtypes, prefix, table=F32):
    """Primals with random angles (the kernel takes any), and the tangent of qkv; `table`: dtype of cos and sin."""
    gen = generator(batch, length, heads, head_dim, rows)
    low, param = dtypes
    qkv = randn(batch, length, 3, heads, head_dim, gen=gen, dtype=low)
    weights = (randn(head_dim, gen=gen, dtype=param, mean=1.0) for _ in range(2))
    angles = randn(length - prefix, head_dim // 2, gen=gen)
    dot = randn(rows, length, 3, heads, head_dim, gen=gen, dtype=low) if rows else None
    return (qkv, *weights, angles.cos().to(table), angles.sin().to(table)), (dot, None, None, None, None)


@pytest.mark.parametrize("share", ("partial", "full"))
@pytest.mark.parametrize("dtypes", ((F32, F32), (BF16, F32)), ids=("float32", "bfloat16"))
@pytest.mark.parametrize(("length", "head_dim"), list(itertools.product((1, 17, 276), (16, 48, 64, 80, 128))))
def test_shapes(length, head_dim, dtypes, share):
    """Every length and head dimension in both dtypes, with tangents of some and of all samples; prefixes vary."""
    heads = 3 if length < 276 else 2
    prefix = 20 if length == 276 else length * (head_dim % 3) // 2
    primals, tangents = inputs(2, length, heads, head_dim, 1 if share == "partial" else 2, dtypes, prefix)
    check("qk_norm_rope", primals, tangents, prefix_length=prefix, fixed=TABLES)


@pytest.mark.parametrize(("table", "low"), ((BF16, BF16), (BF16, F32), (F16, F16), (F16, F32)))
def test_tables_of_low_precision(table, low):
    """A network cast as a whole has tables in its own dtype."""
    primals, tangents = inputs(2, 17, 3, 48, 1, (low, low), 3, table)
    check("qk_norm_rope", primals, tangents, prefix_length=3, fixed=TABLES)


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length=st.integers(1, 40),
    heads=st.integers(1, 20),
    eighths=st.integers(1, 16),
    share=st.floats(0, 1),
    shift=st.floats(0, 1),
    dtypes=st.sampled_from(((F32, F32), (BF16, F32), (F16, F16), (BF16, BF16))),
)
def test_any_shape(batch, length, heads, eighths, share, shift, dtypes):
    prefix = round(shift * length)
    primals, tangents = inputs(batch, length, heads, 8 * eighths, round(share * batch), dtypes, prefix)
    check("qk_norm_rope", primals, tangents, prefix_length=prefix, fixed=TABLES)


def test_more_heads_than_a_tile():
    primals, tangents = inputs(1, 3, 70, 64, 1, (F32, F32), 1)
    check("qk_norm_rope", primals, tangents, prefix_length=1, fixed=TABLES)


def test_views():
    """Every other token, a slice of wider heads, and samples in another order in memory."""
    (qkv, *rest), (dot, *_) = inputs(3, 10, 2, 16, 2, (F32, F32), 4)
    for view in (
        lambda x: x.repeat_interleave(2, 1)[:, ::2],
        lambda x: torch.cat([x, x], -1)[..., :16],
        lambda x: x.transpose(0, 1).contiguous().transpose(0, 1),
        lambda x: x.mT.contiguous().mT,
    ):
        tangents = (view(dot), None, None, None, None)
        check("qk_norm_rope", (view(qkv), *rest), tangents, prefix_length=4, fixed=TABLES)


def test_v_is_a_view():
    """v and its tangent share the memory of qkv and its tangent."""
    primals, tangents = inputs(2, 5, 2, 16, 1, (F32, F32), 0)
    _, _, (v, v_dot) = ops.qk_norm_rope(Dual(primals[0], tangents[0]), *primals[1:], impl="triton")
    assert v.untyped_storage().data_ptr() == primals[0].untyped_storage().data_ptr()
    assert v_dot.untyped_storage().data_ptr() == tangents[0].untyped_storage().data_ptr()


def test_gradients_of_any_layout():
    """Attention may return gradients laid out as [B, H, S, D] in memory."""
    primals, _ = inputs(2, 7, 3, 16, 0, (F32, F32), 2)
    qkv = primals[0].requires_grad_()
    outputs = ops.qk_norm_rope(*primals, prefix_length=2, impl="triton")
    gradients = [randn(*o.shape, gen=generator(i)) for i, o in enumerate(outputs)]
    turned = [g.transpose(1, 2).contiguous().transpose(1, 2) for g in gradients]
    (expected,) = torch.autograd.grad(outputs, qkv, gradients, retain_graph=True)
    (found,) = torch.autograd.grad(outputs, qkv, turned)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("missing", (0, 1, 2))
def test_missing_gradients(missing):
    """The gradient of q, k or v is zero if the loss does not read it."""
    primals, _ = inputs(2, 7, 3, 16, 0, (F32, F32), 2)
    leaves = [p.detach().requires_grad_() for p in primals[:3]]
    outputs = ops.qk_norm_rope(*leaves, *primals[3:], prefix_length=2, impl="triton")
    gradients = [randn(*o.shape, gen=generator(i)) * (i != missing) for i, o in enumerate(outputs)]
    expected = torch.autograd.grad(outputs, leaves, gradients, retain_graph=True)
    del gradients[missing]
    read = [o for i, o in enumerate(outputs) if i != missing]
    close(torch.autograd.grad(read, leaves, gradients), expected)


def test_no_zeros_for_tangents():
    """Backward allocates no zeros for the missing gradients of the tangents."""

    class Zeros(TorchDispatchMode):
        count = 0

        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            self.count += "zero" in str(function)
            return function(*args, **(kwargs or {}))

    primals, tangents = inputs(2, 5, 2, 16, 2, (F32, F32), 0)
    leaves = [p.detach().requires_grad_() for p in primals[:3]]
    duals = ops.qk_norm_rope(Dual(leaves[0], tangents[0]), *leaves[1:], *primals[3:], impl="triton")
    outputs = [dual.value for dual in duals]
    gradients = [torch.ones_like(o) for o in outputs]
    with Zeros() as zeros:
        torch.autograd.grad(outputs, leaves, gradients)
    assert zeros.count == 0


def test_compilers_checkpointing_and_forward_mode():
    primals, tangents = inputs(3, 5, 2, 16, 2, (BF16, F32), 2)
    check_compiles("qk_norm_rope", primals, tangents, prefix_length=2, fixed=TABLES)
    check_forward_mode("qk_norm_rope", primals, (0,), prefix_length=2)


@pytest.mark.parametrize("head_dim", (84, 136))
def test_bad_head_dim(head_dim):
    primals, _ = inputs(1, 2, 1, head_dim, 0, (F32, F32), 0)
    with pytest.raises(InputError, match=f"^qk_norm_rope: head_dim must be a multiple of 8 up to 128, got {head_dim}$"):
        ops.qk_norm_rope(*primals, impl="triton")


def test_bad_tables():
    qkv, q_weight, k_weight, cos, sin = inputs(1, 4, 1, 16, 0, (F32, F32), 0)[0]
    with pytest.raises(InputError, match=r"^qk_norm_rope: cos must have shape \[3, 8\] or \[1, 3, 8\], got \[4, 8\]"):
        ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, prefix_length=1, impl="triton")


def test_tables_take_no_gradient():
    qkv, q_weight, k_weight, cos, sin = inputs(1, 4, 1, 16, 0, (F32, F32), 0)[0]
    with pytest.raises(InputError, match=r"^qk_norm_rope: cos and sin take no gradient"):
        ops.qk_norm_rope(qkv, q_weight, k_weight, cos.requires_grad_(), sin, impl="triton")
