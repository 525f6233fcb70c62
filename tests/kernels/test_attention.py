"""`attention` with the Triton tangent kernel against the float64 reference."""

import dataclasses
import itertools
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

from pmf import Dual, dispatch, ops
from pmf.errors import InputError
from pmf.kernels import attention, registration
from tests.kernels.checks import (
    DEVICE,
    check,
    check_compiles,
    check_forward_mode,
    dual_op,
    evaluate,
    generator,
    randn,
    strided,
    tf32x3,
    within_budget,
)
from tests.networks import relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LENGTHS = (1, 20, 276, 300)
HEAD_DIMS = (16, 40, 64, 80, 128)


def inputs(batch, length_q, length_k, head_dim, rows, dtype, heads=2, seed=0):
    """Heads and their tangents; v and its tangent are views of packed q, k, v."""
    gen = generator(seed, batch, length_q, length_k, head_dim, rows)
    lengths = (length_q, length_k, length_k)

    def part(samples, i):
        shape = (samples, lengths[i], 3, heads, head_dim) if i == 2 else (samples, lengths[i], heads, head_dim)
        x = randn(*shape, gen=gen, dtype=dtype)
        return x[:, :, 2] if i == 2 else x

    primals = tuple(part(batch, i) for i in range(3))
    return primals, tuple(part(rows, i) if rows is not None else None for i in range(3))


def check_within(primals, tangents):
    """Check that value and tangent are within the budget; in low precision the gradients too.

    The library that computes the value computes the gradients (`test_gradients_are_the_library_s`). In
    float32 its rounding is outside our control: on CPUs PyTorch's error is up to 2.5 times the reference's.
    """
    if primals[0].dtype != F32:
        return check("attention", primals, tangents)
    return check_tangent(primals, tangents)


def check_tangent(primals, tangents):
    """Check that value and tangent are within the budget.

    In float32 the value takes two products of a library; the tangent also reads the log-sum-exp, a third.
    """
    steps = (tf32x3(2), tf32x3(3)) if primals[0].dtype == F32 else (1, 1)
    runs = [evaluate("attention", primals, tangents, None, impl=impl) for impl in ("triton", "reference")]
    runs.append(evaluate("attention", primals, tangents, None, impl="reference", dtype=torch.float64))
    for i in range(2):
        within_budget(f"attention: {('value', 'tangent')[i]}", *(run[i][0] for run in runs), steps=steps[i])


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("head_dim", HEAD_DIMS)
@pytest.mark.parametrize("length", LENGTHS)
def test_shapes(length, head_dim, dtype):
    """Values, tangents and gradients; B_dot in {0, 1, B} and the lengths of keys vary with the case."""
    case = LENGTHS.index(length) + HEAD_DIMS.index(head_dim)
    others = {1: 20, 20: 70, 276: 276, 300: 33}
    primals, tangents = inputs(2, length, others[length], head_dim, case % 3, dtype)
    check_within(primals, tangents)


@pytest.mark.parametrize("tile", attention.HOPPER_TILES, ids=str)
def test_other_tiles(tile, monkeypatch):
    """A tile forced for a benchmark gives the same tangent, and applies only inside its context and thread."""
    if registration.chip(torch.device(DEVICE)).capability not in (0, 90):
        pytest.skip("other chips need not have room for them")
    taken = []
    launch = registration.launch

    def recorded(*arguments, **options):
        taken.append(tuple(options[name] for name in ("M", "N", "num_warps", "num_stages")))
        launch(*arguments, **options)

    monkeypatch.setattr(registration, "launch", recorded)
    primals, tangents = inputs(1, 276, 276, 80, 1, BF16)
    pairs = [Dual(*pair) for pair in zip(primals, tangents, strict=True)]
    usual = ops.attention(*pairs, impl="triton").dot
    with pytest.raises(LookupError, match="left early"), attention.tangent_with(tile):
        check_tangent(primals, tangents)
        with ThreadPoolExecutor(1) as pool:  # another thread, outside the context
            pool.submit(ops.attention, *pairs, impl="triton").result()
        raise LookupError("left early")
    assert torch.equal(ops.attention(*pairs, impl="triton").dot, usual)
    usual_tile = dataclasses.astuple(attention.tangent_tile(80, 276, BF16, registration.chip(torch.device(DEVICE))))
    assert taken == [usual_tile, dataclasses.astuple(tile), usual_tile, usual_tile]


def test_tiles_on_hopper():
    """At D 64 short sequences do not get tiles that stay mostly empty; 32 keys up to D 96."""
    hopper = registration.Chip(90, 132)
    queries = [attention.tangent_tile(64, length, BF16, hopper).queries for length in (20, 128, 276, 1044, 4096)]
    assert queries == [64, 128, 64, 128, 128]
    assert [attention.tangent_tile(d, 276, BF16, hopper).keys for d in (80, 96, 128)] == [32, 32, 64]


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("head_dim", (16, 80))
def test_one_key(head_dim, dtype):
    """P is one, so the tangent is that of v. (The gradients of q and k vanish, up to the libraries' rounding.)"""
    primals, tangents = inputs(2, 20, 1, head_dim, 1, dtype)
    check_tangent(primals, tangents)
    _, (o_dot,) = dual_op("attention", primals, (*tangents[:2], None), impl="triton")
    assert o_dot.abs().max() <= 4 * torch.finfo(dtype).eps


def test_gradients_are_the_library_s():
    """Bit for bit on CPUs; up to rounding on GPUs, where the backward sums in no fixed order."""
    primals, tangents = inputs(2, 20, 33, 40, 1, F32)
    _, _, found, (do,) = evaluate("attention", primals, tangents, None, impl="triton")
    leaves = [p.detach().requires_grad_() for p in primals]
    with sdpa_kernel(SDPBackend.EFFICIENT_ATTENTION if DEVICE == "cuda" else SDPBackend.FLASH_ATTENTION):
        o = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in leaves))
    for a, b in zip(found, torch.autograd.grad(o, leaves, do.transpose(1, 2)), strict=True):
        assert torch.equal(a, b) if DEVICE == "cpu" else relative_error(a, b) < 1e-6


@pytest.mark.parametrize("moving", list(itertools.product((True, False), repeat=3))[1:-1], ids=str)
def test_missing_tangents(moving):
    primals, tangents = inputs(3, 20, 70, 40, 2, BF16)
    check("attention", primals, tuple(t if m else None for t, m in zip(tangents, moving, strict=True)))


def test_no_tangent():
    primals, _ = inputs(2, 20, 20, 16, None, F32)
    assert dual_op("attention", primals, (None,) * 3, impl="triton")[1] == (None,)


def test_views():
    """Any strides: other orders of dimensions, gaps, odd steps, unaligned offsets."""
    primals, tangents = inputs(3, 17, 33, 24, 2, F32)
    check_within(tuple(strided(p) for p in primals), tuple(strided(t) for t in tangents))

    def turned(x):
        return x.transpose(1, 2).contiguous().transpose(1, 2)

    check_within(tuple(turned(p) for p in primals), tuple(turned(t) for t in tangents))
    check_within(tuple(p[:, 3:, 1:] for p in primals), tuple(t[:, 3:, 1:] for t in tangents))


@settings(max_examples=15, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3),
    length_q=st.integers(0, 140),
    length_k=st.integers(2, 140),
    heads=st.integers(1, 3),
    head_dim=st.integers(1, 16).map(lambda n: 8 * n),
    share=st.floats(0, 1),
    dtype=st.sampled_from((F32, BF16, F16)),
)
def test_any_shape(batch, length_q, length_k, heads, head_dim, share, dtype):
    check_within(*inputs(batch, length_q, length_k, head_dim, round(share * batch), dtype, heads, 1))


def tangent_error(primals, tangents, **options):
    """Root mean square errors of the bf16 tangents of the kernel and of the reference."""
    truth = evaluate("attention", primals, tangents, None, impl="reference", dtype=torch.float64, **options)[1][0]
    runs = (
        evaluate("attention", primals, tangents, None, impl=impl, **options)[1][0] for impl in ("triton", "reference")
    )
    return [(run.double() - truth).square().mean().sqrt().item() for run in runs]


@pytest.mark.parametrize("sharpness", (1.0, 4.0))
@pytest.mark.parametrize("head_dim", (64, 80))
def test_common_mode(head_dim, sharpness):
    """Neither o_dot nor its error depends on a part common to all keys of k_dot, here 64 times its spread.

    The common part has few bits and the spread is rounded to a grid, so that both cases are exactly the same
    problem.
    """
    (q, k, v), (q_dot, k_dot, v_dot) = inputs(2, 276, 276, head_dim, 2, BF16)
    q = q * sharpness
    k_dot = (k_dot.clamp(-3, 3) * 2).round() / 2
    common = 64 * torch.sign(randn(2, 1, 2, head_dim, gen=generator(head_dim), dtype=BF16))
    # 64 + 3 in steps of a half is exact in bfloat16.
    plain, reference = tangent_error((q, k, v), (q_dot, k_dot, v_dot))
    shifted, reference_shifted = tangent_error((q, k, v), (q_dot, k_dot + common, v_dot))
    assert ((k_dot + common).double() == k_dot.double() + common.double()).all()
    assert shifted <= 2 * plain
    assert plain <= 2 * reference
    # Without the row shift the error is many times larger: the case does test it.
    assert reference_shifted > 8 * reference


def test_compilers_checkpointing_and_forward_mode():
    primals, tangents = inputs(3, 20, 33, 16, 2, BF16)
    check_compiles("attention", primals, tangents)
    own = dispatch.attention_backend(torch.device(DEVICE), BF16, 16)[0] != "flash_attn_4"  # it has our operator
    check_forward_mode("attention", primals, (0, 1, 2), own_backward=own)
    check_forward_mode("attention", primals, (1,), own_backward=own)


def test_tangent_of_a_tangent_raises():
    """An explicit tangent that is a dual tensor raises; its tangent is not dropped silently."""
    primals, tangents = inputs(2, 5, 7, 16, 2, F32)

    def tangent(k_dot):
        q, k, v = primals
        return ops.attention(Dual(q), Dual(k, k_dot), v, impl="triton").dot

    with pytest.raises(RuntimeError, match="jvp"):
        torch.func.jvp(tangent, tangents[1:2], tangents[1:2])


def test_nothing_is_recorded_for_the_tangent():
    primals, tangents = inputs(2, 20, 20, 16, 2, F32)
    saved = []

    def bytes_saved(tangents):
        saved.clear()
        leaves = tuple(p.detach().requires_grad_() for p in primals)
        with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.nbytes) or t, lambda t: t):
            dual_op("attention", leaves, tangents, impl="triton")
        return sum(saved)

    assert bytes_saved(tangents) == bytes_saved((None,) * 3) > 0


def test_autocast():
    """Under autocast float32 heads are rounded to bfloat16, as the factors of products are."""
    primals, tangents = inputs(2, 20, 33, 16, 1, F32)
    check("attention", primals, tangents, autocast=BF16)


def test_registered_operator():
    (q, k, v), (q_dot, k_dot, v_dot) = inputs(2, 20, 33, 16, 2, BF16)
    o = ops.attention(q, k, v, impl="triton")
    lse = randn(2, 2, 20, gen=generator(0))
    for dots in ((q_dot, k_dot, v_dot), (None, k_dot, None)):
        arguments = (q, k, v, *dots, o, lse, 0.25)
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.pmf.attention_tangent.default, arguments, test_utils=utils)


q = torch.randn(2, 5, 2, 16)


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ((q[..., :12], q[..., :12], q[..., :12]), "head_dim must be a multiple of 8 up to 128 .* got 12"),
        ((torch.randn(1, 2, 1, 136),) * 3, "head_dim must be a multiple of 8 up to 128 .* got 136"),
        ((q, q, q.bfloat16()), "must have one dtype, got .*float32.*bfloat16"),
        ((q, q[:, :0], q[:, :0]), "k must have at least one token, got 0"),
        ((q, q[:, :, :1], q), r"k must have shape \[2, any, 2, 16\], got \[2, 5, 1, 16\]"),
        ((q.double(),) * 3, "dtype must be float32, bfloat16 or float16"),
    ],
)
def test_bad_input(heads, message):
    with pytest.raises(InputError, match=f"^attention: .*{message}") as error:
        ops.attention(*heads, impl="triton")
    assert "\n" not in str(error.value)


def test_head_dims_are_split_into_what_products_take():
    from pmf.kernels.attention import split

    assert [split(d) for d in (8, 16, 40, 64, 80, 96, 128)] == [
        (16, 0),
        (16, 0),
        (32, 16),
        (64, 0),
        (64, 16),
        (64, 32),
        (128, 0),
    ]
    for d in range(8, 129, 8):
        first, second = split(d)
        assert d <= first + second <= 2 * max(d, 8) and {first, second} <= {0, 16, 32, 64, 128}
