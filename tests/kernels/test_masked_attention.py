"""`attention` where queries read some keys: causal, with lengths, in groups that share a head; alone and combined.

Where keys are padded, they and their tangents hold NaN: neither values nor tangents nor gradients may read it.
"""

import functools
import itertools
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf import Dual, dispatch, ops
from pmf.errors import InputError
from pmf.kernels import attention, flash
from pmf.tangents import attention as rule
from pmf.tangents.rules import plain
from tests.kernels.checks import (
    DEVICE,
    check,
    check_compiles,
    check_forward_mode,
    close,
    dual_op,
    evaluate,
    generator,
    randn,
    strided,
    tf32x3,
    within_budget,
)
from tests.kernels.test_attention import tangent_error
from tests.networks import relative_error

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SIZES = (1, 7, 16, 33, 130, 276)
HEAD_DIMS = (8, 40, 64, 80, 128)
HEADS = ((1, 1), (4, 1), (6, 2))
"""Heads of queries and of keys."""
KINDS = [kind for n in (1, 2, 3) for kind in itertools.combinations(("causal", "lengths", "grouped"), n)]


def lengths_of(samples, keys, turn=0):
    """Lengths from 1 to all keys, some of them odd, in an order that depends on `turn`."""
    every = [1, keys, max(keys // 2 | 1, 1) if keys > 1 else 1, max(keys - 1, 1)]
    return torch.tensor([every[(i + turn) % 4] for i in range(samples)], dtype=torch.int64, device=DEVICE)


def padded(x, lengths):
    """x with NaN beyond the lengths of the last samples."""
    if x is None or lengths is None:
        return x
    beyond = torch.arange(x.shape[1], device=x.device) >= lengths[len(lengths) - len(x) :, None]
    return x.masked_fill(beyond[:, :, None, None], torch.nan)


def problem(kind, samples, queries, keys, heads, head_dim, rows, dtype, turn=0):
    """Primals, tangents and options; `rows` samples have tangents, none if it is None."""
    gen = generator(kind, samples, queries, keys, heads, head_dim, rows, turn)
    keys = queries if "causal" in kind else keys
    many, few = heads if "grouped" in kind else heads[:1] * 2
    options = {"causal": True} if "causal" in kind else {}
    lengths = None
    if "lengths" in kind:
        options["key_lengths"] = lengths = lengths_of(samples, keys, turn)
    if "grouped" in kind:
        options["enable_gqa"] = True
    shapes = ((queries, many, head_dim), (keys, few, head_dim), (keys, few, head_dim))
    primals, dots = (
        [None if n is None else randn(n, *shape, gen=gen, dtype=dtype) for shape in shapes] for n in (samples, rows)
    )
    return (*(tuple((x[0], padded(x[1], lengths), padded(x[2], lengths)) for x in (primals, dots))), options)


def check_within(primals, tangents, options):
    """As `test_attention.check_within`: in float32 the gradients are the library's, see the test of them below."""
    if primals[0].dtype != F32:
        return check("attention", primals, tangents, **options)
    runs = [evaluate("attention", primals, tangents, None, impl=impl, **options) for impl in ("triton", "reference")]
    runs.append(evaluate("attention", primals, tangents, None, impl="reference", dtype=torch.float64, **options))
    for i, products in enumerate((2, 3)):
        if runs[0][i][0] is not None:
            name = f"attention: {('value', 'tangent')[i]}"
            within_budget(name, *(run[i][0] for run in runs), steps=tf32x3(products))


@pytest.mark.parametrize("dtype", (F32, BF16), ids=str)
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
@pytest.mark.parametrize("size", SIZES)
def test_sizes(size, kind, dtype):
    """Values, tangents and gradients; head_dim, heads, the number of keys and B_dot in {none, 1, 2, 3} vary."""
    case = SIZES.index(size) + KINDS.index(kind)
    keys, head_dim, heads = SIZES[(case + 1) % 6], HEAD_DIMS[case % 5], HEADS[case % 3]
    check_within(*problem(kind, 3, size, keys, heads, head_dim, (3, 1, 2, None)[case % 4], dtype, case))


ALL = KINDS[-1]


@pytest.mark.parametrize("moving", list(itertools.product((True, False), repeat=3))[1:-1], ids=str)
def test_missing_tangents(moving):
    primals, tangents, options = problem(ALL, 3, 70, 70, (4, 2), 40, 2, BF16)
    check("attention", primals, tuple(t if m else None for t, m in zip(tangents, moving, strict=True)), **options)


@pytest.mark.parametrize("kind", [*KINDS[:3], ALL], ids="-".join)
def test_views(kind):
    """Any strides, of lengths too."""
    primals, tangents, options = problem(kind, 3, 17, 33, (4, 2), 24, 2, F32)
    if "key_lengths" in options:
        options["key_lengths"] = options["key_lengths"].int().repeat_interleave(2)[::2]
    check_within(tuple(strided(p) for p in primals), tuple(strided(t) for t in tangents), options)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    kind=st.sampled_from(KINDS),
    samples=st.integers(0, 3),
    queries=st.integers(0, 140),
    keys=st.integers(1, 140),
    heads=st.tuples(st.integers(1, 3), st.integers(1, 2)).map(lambda n: (n[0] * n[1], n[1])),
    head_dim=st.integers(1, 16).map(lambda n: 8 * n),
    share=st.floats(0, 1),
    dtype=st.sampled_from((F32, BF16, F16)),
)
def test_any_shape(kind, samples, queries, keys, heads, head_dim, share, dtype):
    queries = max(queries, 1) if "causal" in kind else queries
    check_within(*problem(kind, samples, queries, keys, heads, head_dim, round(share * samples), dtype, samples))


@pytest.mark.parametrize("impl", ("triton", "reference"))
def test_padding_is_never_read(impl):
    """The same bits whatever it holds; its gradients are zero (with one key, that of k is zero there too).

    No more than 64 keys: on a GPU, backward would sum over parts of more in any order.
    """
    primals, tangents, options = problem(("lengths",), 4, 20, 60, (2, 2), 16, 3, F32)
    lengths = options["key_lengths"]
    plain = [tuple(x.nan_to_num(0.3) for x in parts) for parts in (primals, tangents)]
    runs = [evaluate("attention", *given, None, impl=impl, **options) for given in ((primals, tangents), plain)]
    for a, b in zip(*(run[:3] for run in runs), strict=True):
        close(a, b)
    for gradient in runs[0][2][1:]:
        for sample, length in zip(gradient, lengths.tolist(), strict=True):
            assert not sample[length:].any()
            assert sample[:length].any() or length == 1


def masks(q, k, causal=False, key_lengths=None, enable_gqa=False):
    """The options of PyTorch's function."""
    seen = torch.ones(len(q), 1, q.shape[1], k.shape[1], dtype=torch.bool, device=q.device)
    if key_lengths is not None:
        seen &= torch.arange(k.shape[1], device=q.device) < key_lengths[:, None, None, None]
    mask = None if key_lengths is None else (seen.tril() if causal else seen)
    return {"attn_mask": mask, "is_causal": causal and mask is None, "enable_gqa": enable_gqa}


@pytest.mark.skipif(DEVICE == "cuda", reason="sums of backward passes on GPUs come in any order")
@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_gradients_are_the_library_s(kind):
    """Values and gradients equal those of PyTorch's function with its own options, bit for bit.

    Gradients of heads that are shared are sums over the queries that share them, in any order.
    """
    primals, _, options = problem(kind, 3, 33, 40, (6, 2), 40, None, F32)
    primals = tuple(x.nan_to_num(0) for x in primals)
    (o,), _, found, (do,) = evaluate("attention", primals, (None,) * 3, None, impl="triton", **options)
    leaves = [p.detach().requires_grad_() for p in primals]
    heads = (x.transpose(1, 2) for x in leaves)
    expected = F.scaled_dot_product_attention(*heads, **masks(*primals[:2], **options)).transpose(1, 2)
    assert torch.equal(o, expected)
    for i, (a, b) in enumerate(zip(found, torch.autograd.grad(expected, leaves, do), strict=True)):
        assert relative_error(a, b) < 1e-6 if "grouped" in kind and i > 0 else torch.equal(a, b)


def test_causal_programs_stop_at_their_last_query():
    """NaN in later keys' tangents does not reach a tile of queries before them."""
    primals, (q_dot, k_dot, v_dot), options = problem(("causal",), 1, 276, 276, (2, 2), 16, 1, BF16)
    k_dot[:, 128:], v_dot[:, 128:] = torch.nan, torch.nan
    _, (dot,) = dual_op("attention", primals, (q_dot, k_dot, v_dot), impl="triton", **options)
    assert dot[:, :128].isfinite().all() and dot[:, 128:].isnan().all()


@pytest.mark.parametrize("dtype", (torch.int32, torch.int64))
def test_lengths_out_of_range_stay_inside_of_the_keys(dtype):
    """On GPUs they are not checked."""
    (q, k, v), (q_dot, k_dot, v_dot), _ = problem(("lengths",), 3, 5, 20, (2, 2), 16, 3, F32)
    q, k, v, q_dot, k_dot, v_dot = (x.nan_to_num(0.3) for x in (q, k, v, q_dot, k_dot, v_dot))
    lse = randn(3, 2, 5, gen=generator(0))

    def tangent(*lengths):
        lengths = torch.tensor(lengths, dtype=dtype, device=DEVICE)
        return attention.attention_tangent.function(q, k, v, q_dot, k_dot, v_dot, q, lse, 0.25, lengths)

    assert torch.equal(tangent(-(2**31), 0, 2**31 - 1), tangent(1, 1, 20))


@pytest.mark.parametrize("kind", (("causal",), ("lengths",), ALL), ids="-".join)
def test_common_mode(kind):
    """As test_attention.test_common_mode: a part common to all keys of k_dot does not change the tangent's error."""
    (q, k, v), (q_dot, k_dot, v_dot), options = problem(kind, 2, 276, 276, (2, 1), 64, 2, BF16, turn=1)
    k_dot = (k_dot.clamp(-3, 3) * 2).round() / 2
    common = 64 * torch.sign(randn(2, 1, k.shape[2], 64, gen=generator(64), dtype=BF16))
    plain, reference = tangent_error((q, k, v), (q_dot, k_dot, v_dot), **options)
    shifted, reference_shifted = tangent_error((q, k, v), (q_dot, k_dot + common, v_dot), **options)
    assert shifted <= 2 * plain
    assert plain <= 2 * reference
    assert reference_shifted > 8 * reference


@pytest.mark.parametrize("kind", [*KINDS[:3], ALL], ids="-".join)
def test_compilers_checkpointing_and_forward_mode(kind):
    primals, tangents, options = problem(kind, 3, 20, 33, (4, 2), 16, 2, BF16)
    check_compiles("attention", primals, tangents, **options)
    primals = tuple(x.nan_to_num(0) for x in primals)
    own = dispatch.attention_backend(torch.device(DEVICE), BF16, 16)[0] != "flash_attn_4"  # it has our operator
    check_forward_mode("attention", primals, (0, 1, 2), own_backward=own, **options)
    check_forward_mode("attention", primals, (1,), own_backward=own, **options)


def test_compiled_with_lengths_as_input():
    """One graph for any lengths, and for open sizes."""
    compiled = torch.compile(
        lambda q, k, v, lengths: ops.attention(q, Dual(k, k), v, key_lengths=lengths, impl="triton"),
        backend="aot_eager",
        fullgraph=True,
        dynamic=True,
    )
    for keys, lengths in ((20, (3, 20)), (33, (1, 33)), (33, (32, 5))):
        (q, k, v), _, _ = problem((), 2, 7, keys, (2, 2), 16, None, F32)
        lengths = torch.tensor(lengths, device=DEVICE)
        close(
            tuple(compiled(q, k, v, lengths)),
            tuple(ops.attention(q, Dual(k, k), v, key_lengths=lengths, impl="triton")),
        )


def test_registered_operator():
    primals, tangents, options = problem(ALL, 2, 20, 20, (4, 2), 16, 2, BF16)
    o, lse = ops.attention(*primals, **options, impl="triton"), randn(2, 4, 20, gen=generator(0))
    for dots in (tangents, (None, tangents[1], None)):
        arguments = (*primals, *dots, o, lse, 0.25, options["key_lengths"], True)
        utils = ("test_schema", "test_faketensor")
        torch.library.opcheck(torch.ops.pmf.attention_tangent.default, arguments, test_utils=utils)


@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("keys", (5, 16, 33))
def test_the_bias_is_small_and_aligned(keys, causal):
    """Rows start at multiples of 16 values; one row per sample, or per query if causal; heads share it."""
    q, k = (torch.empty(3, 33, heads, 8, dtype=BF16, device=DEVICE) for heads in (4, 2))
    lengths = lengths_of(3, keys)
    bias = flash._bias(q, k[:, :keys], lengths, causal)
    width = -(-keys // 16) * 16
    assert bias.shape == (3, 4, 33, keys) and bias.dtype == BF16 and bias.data_ptr() % 16 == 0
    assert bias.stride() == (width * (33 if causal else 1), 0, width if causal else 0, 1)
    assert bias.untyped_storage().nbytes() == 2 * 3 * width * (33 if causal else 1)
    for sample, length in zip(bias, lengths.tolist(), strict=True):
        seen = torch.arange(keys, device=DEVICE) < length
        seen = seen.expand(33, keys).tril() if causal else seen.expand(33, keys)
        assert torch.equal(sample == 0, seen.expand(4, 33, keys)) and (sample[:, ~seen] == -torch.inf).all()


q, few = torch.randn(2, 5, 4, 16), torch.randn(2, 5, 2, 16)
HINT = r"; expected \[B, S, H, D\]; heads first\? transpose\(1, 2\)$"


@pytest.mark.parametrize("impl", ("triton", "reference"))
@pytest.mark.parametrize(
    ("heads", "options", "message"),
    [
        (
            (q, few, few),
            {},
            r"k must have shape \[2, any, 4, 16\], got \[2, 5, 2, 16\] \(a divisor of 4 heads with enable_gqa=True\)"
            + HINT,
        ),
        (
            (q, q[:, :, :3], q[:, :, :3]),
            {"enable_gqa": True},
            r"k must have shape \[2, any, a divisor of 4, 16\], got \[2, 5, 3, 16\]" + HINT,
        ),
        ((q, q[:, :, :0], q[:, :, :0]), {"enable_gqa": True}, r"a divisor of 4, 16\], got \[2, 5, 0, 16\]" + HINT),
        ((q.mT, few.mT, few.mT), {}, "k must have shape .*" + HINT),
        ((q, few[0], few), {}, r"k must have shape .* got \[5, 2, 16\].*" + HINT),
        ((q, few, q), {"enable_gqa": True}, r"v must have shape \[2, 5, 2, 16\], got \[2, 5, 4, 16\]$"),
        ((q, q[:, :3], q[:, :3]), {"causal": True}, "causal needs as many queries as keys, got 5 and 3; .*"),
        ((q, q, q), {"key_lengths": [1, 2]}, "key_lengths must be an int32 or int64 tensor, got list$"),
        (
            (q, q, q),
            {"key_lengths": torch.ones(2)},
            "key_lengths must be an int32 or int64 tensor, got torch.float32$",
        ),
        ((q, q, q), {"key_lengths": torch.ones(3).int()}, r"int64 tensor of shape \[2\] on cpu, got \[3\] on cpu$"),
        (
            (q, q, q),
            {"key_lengths": torch.ones(2, device="meta").int()},
            r"int64 tensor of shape \[2\] on cpu, got \[2\] on meta$",
        ),
        ((q, q, q), {"key_lengths": torch.tensor([0, 5])}, r"key_lengths must lie in \[1, 5\], got 0 to 5$"),
        ((q, q, q), {"key_lengths": torch.tensor([1, 6])}, r"key_lengths must lie in \[1, 5\], got 1 to 6$"),
    ],
)
def test_bad_input(heads, options, message, impl):
    with pytest.raises(InputError, match=f"^attention: .*{message}") as error:
        ops.attention(*heads, **options, impl=impl)
    assert "\n" not in str(error.value)


def test_heads_first_are_caught_if_sizes_differ():
    with pytest.raises(InputError, match=HINT):
        ops.attention(q.transpose(1, 2), q[:, :3].transpose(1, 2), q[:, :3].transpose(1, 2))


@pytest.mark.parametrize("kind", KINDS, ids="-".join)
def test_float64_is_pytorch_s(kind):
    primals, _, options = problem(kind, 3, 7, 9, (6, 2), 8, None, F32)
    primals = tuple(x.nan_to_num(0).double() for x in primals)
    heads = (x.transpose(1, 2) for x in primals)
    expected = F.scaled_dot_product_attention(*heads, **masks(*primals[:2], **options)).transpose(1, 2)
    assert relative_error(ops.attention(*primals, **options, impl="reference"), expected) < 1e-14


# F.scaled_dot_product_attention inside pmf.jvp.


@pytest.fixture
def decided(monkeypatch):
    """On any machine, let the rule choose as for tensors on a GPU; the list of its choices."""
    choose, choices = rule._on_kernels, []

    def as_on_gpus(q, k, v, *options):
        heads = (plain(x) for x in (q, k, v))
        parts = [SimpleNamespace(shape=x.shape, ndim=x.ndim, dtype=x.dtype, is_cuda=True) for x in heads]
        choices.append(choose(*parts, *options))
        return choices[-1]

    monkeypatch.setattr(rule, "_on_kernels", as_on_gpus)
    monkeypatch.setenv("PMF_IMPL", "triton")
    return choices


@pytest.mark.parametrize(
    ("queries", "keys", "heads", "options", "kernel"),
    [
        (33, 20, (4, 4), {}, True),
        (33, 33, (4, 4), {"is_causal": True, "scale": 0.3}, True),
        (33, 20, (4, 2), {"enable_gqa": True}, True),
        (33, 33, (6, 2), {"enable_gqa": True, "is_causal": True}, True),
        (33, 20, (4, 4), {"is_causal": True}, False),
        (33, 33, (4, 1), {}, False),
        (33, 33, (4, 4), {"attn_mask": torch.ones(33, 33, dtype=torch.bool, device=DEVICE).tril(1)}, False),
    ],
)
def test_the_rule_of_pytorch_s_attention(decided, queries, keys, heads, options, kernel):
    """The value is PyTorch's, bit by bit; the tangent is the kernel's where it has one for the options."""

    def heads_first(dtype, seed):
        shapes = ((2, heads[0], queries, 16), (2, heads[1], keys, 16), (2, heads[1], keys, 16))
        return tuple(randn(*shape, gen=generator(seed, i)).to(dtype) for i, shape in enumerate(shapes))

    def run(dtype):
        function = functools.partial(F.scaled_dot_product_attention, **options)
        primals, tangents = heads_first(dtype, 0), heads_first(dtype, 1)
        value, dot = pmf.jvp(function, primals, tangents)
        assert torch.equal(value, function(*primals))
        return dot

    found = run(F32)
    assert decided == [kernel]
    low, true = (rule_by_formula(heads_first, dtype, options) for dtype in (F32, torch.float64))
    within_budget("pmf.jvp", found, low, true, steps=tf32x3(3))


def rule_by_formula(heads_first, dtype, options):
    """The tangent by `torch.func.jvp` of PyTorch's formula."""
    with sdpa_kernel(SDPBackend.MATH):
        function = functools.partial(F.scaled_dot_product_attention, **options)
        return torch.func.jvp(function, heads_first(dtype, 0), heads_first(dtype, 1))[1]
