"""`pmf.jvp` of attention by flash-attn and xformers: stand-ins with their arguments, and the installed flash-attn-4."""

import importlib
import sys
from types import ModuleType

import pytest
import torch

import pmf
from pmf import InputError
from tests.kernels.checks import DEVICE
from tests.kernels.test_masked_attention import decided  # noqa: F401 (a fixture)
from tests.pmf.attention_packages import FORMS, Blocks, LowerTriangularMask, flash_attn, memory_efficient_attention
from tests.pmf.jvp_checks import PARTITIONED, drawn
from tests.pmf.test_jvp_no_forward_mode import check, differences

WINDOWS = [
    {},
    {"causal": True},
    {"window_size": (2, 1)},
    {"window_size": (3, -1), "causal": True},
    {"softmax_scale": 0.3},
]
STARTS = torch.tensor([0, 3, 3, 10, 12], dtype=torch.int32)
OTHER_STARTS = torch.tensor([0, 5, 7, 9, 9], dtype=torch.int32)
ALIKE = {"cu_seqlens_q": STARTS, "cu_seqlens_k": STARTS, "max_seqlen_q": 7, "max_seqlen_k": 7}
UNLIKE = {"cu_seqlens_q": STARTS, "cu_seqlens_k": OTHER_STARTS, "max_seqlen_q": 7, "max_seqlen_k": 5}


def compare(function, *shapes, still=()):
    primals = [drawn(*shape, seed=i) for i, shape in enumerate(shapes)]
    tangents = [None if i in still else drawn(*shape, seed=7 + i) for i, shape in enumerate(shapes)]
    check(function, primals, tangents)


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("keys", [7, 9])
@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attn(version, keys, options):
    call = flash_attn(version)
    compare(lambda q, k, v: call(q=q, k=k, v=v, **options), (2, 7, 4, 8), (2, keys, 2, 8), (2, keys, 2, 8))


@pytest.mark.parametrize("still", [(0, 1), (1, 2), (0, 2)])
def test_flash_attn_of_which_a_part_moves(still):
    call = flash_attn(2)
    compare(lambda q, k, v: call(q=q, k=k, v=v), (2, 7, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), still=still)


@pytest.mark.parametrize("options", WINDOWS)
@pytest.mark.parametrize("lengths", [ALIKE, UNLIKE], ids=["alike", "unlike"])
@pytest.mark.parametrize("version", [2, 3, 4])
def test_flash_attn_of_samples_of_any_length(version, lengths, options):
    call, tokens = flash_attn(version, varlen=True), int(lengths["cu_seqlens_k"][-1])
    compare(lambda q, k, v: call(q=q, k=k, v=v, **lengths, **options), (12, 4, 8), (tokens, 2, 8), (tokens, 2, 8))


def test_a_window_to_the_right_of_more_queries_than_keys():
    """Version 2 drops it from as many keys on as there are."""
    call = flash_attn(2)
    compare(lambda q, k, v: call(q=q, k=k, v=v, window_size=(-1, 4)), (2, 9, 4, 8), (2, 4, 4, 8), (2, 4, 4, 8))
    call = flash_attn(3)
    compare(lambda q, k, v: call(q=q, k=k, v=v, window_size=(-1, 4)), (2, 9, 4, 8), (2, 4, 4, 8), (2, 4, 4, 8))


def test_samples_without_keys():
    call, none = flash_attn(2, varlen=True), torch.zeros(5, dtype=torch.int32)
    q, k = drawn(12, 4, 8), drawn(0, 4, 8)
    lengths = {"cu_seqlens_q": STARTS, "cu_seqlens_k": none, "max_seqlen_q": 7, "max_seqlen_k": 1}
    out, dot = pmf.jvp(lambda q, k: call(q=q, k=k, v=k, **lengths), (q, k), (q, k))
    assert not out.any() and torch.equal(dot, torch.zeros_like(q))


def test_versions_before_windows_align_causal_queries_in_two_ways(monkeypatch):
    monkeypatch.setitem(FORMS[2], "options", "dropout_p softmax_scale causal return_softmax")
    call = flash_attn(2)
    compare(lambda q, k, v: call(q=q, k=k, v=v, causal=True), *[(2, 7, 4, 8)] * 3)
    q, k = drawn(2, 7, 4, 8), drawn(2, 9, 4, 8)
    with pytest.raises(InputError, match=r"got causal and unequal lengths; expected flash-attn 2\.3 or later"):
        pmf.jvp(lambda q: call(q=q, k=k, v=k, causal=True), (q,), (q,))


def test_flash_attn_without_the_greatest_length():
    call, lengths = flash_attn(4, varlen=True), {"cu_seqlens_q": STARTS, "cu_seqlens_k": OTHER_STARTS}
    compare(lambda q, k, v: call(q=q, k=k, v=v, **lengths), (12, 4, 8), (9, 4, 8), (9, 4, 8))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("version", [2, 3])
def test_flash_attn_of_packed_tensors(version, causal):
    both, keys = flash_attn(version, packed="QKV"), flash_attn(2, packed="KV")
    compare(lambda qkv: both(qkv=qkv, causal=causal), (2, 7, 3, 4, 8))
    compare(lambda q, kv: keys(q=q, kv=kv, causal=causal), (2, 7, 4, 8), (2, 9, 2, 2, 8))


@pytest.mark.parametrize("options", WINDOWS)
def test_flash_attn_of_packed_samples(options):
    both, keys = flash_attn(2, True, "QKV"), flash_attn(2, True, "KV")
    compare(lambda qkv: both(qkv=qkv, cu_seqlens=STARTS, max_seqlen=7, **options), (12, 3, 4, 8))
    compare(lambda q, kv: keys(q=q, kv=kv, **UNLIKE, **options), (12, 4, 8), (9, 2, 2, 8))


def test_tokens_behind_the_last_sample_stand_still():
    call = flash_attn(3, varlen=True)
    compare(lambda x: call(q=x, k=x, v=x, **ALIKE), (15, 4, 8))


@pytest.mark.parametrize(
    ("version", "options", "named"),
    [
        (2, {"dropout_p": 0.1}, "FlashAttnFunc got a moving value and dropout_p"),
        (2, {"alibi_slopes": torch.ones(4)}, "alibi_slopes"),
        (2, {"return_softmax": True}, "return_softmax"),
        (4, {"window_size": (3, -1)}, r"got window_size \(3, -1\); expected None for a side without limit"),
        (4, {"window_size": (None, -2)}, r"got window_size \(None, -2\)"),
        (3, {"softcap": 3.0}, "flash_attn_interface.FlashAttnFunc got a moving value and softcap"),
        (3, {"qv": torch.ones(2, 7, 4, 8)}, "qv"),
        (4, {"learnable_sink": torch.ones(4)}, "learnable_sink"),
        (4, {"mask_mod": torch.sin}, "mask_mod"),
        (4, {"return_lse": True}, "return_lse"),
    ],
)
def test_what_the_formula_lacks_is_named(version, options, named):
    call, x = flash_attn(version), drawn(2, 7, 4, 8)
    with pytest.raises(InputError, match=named):
        pmf.jvp(lambda x: call(q=x, k=x, v=x, **options), (x,), (x,))


@pytest.mark.parametrize("name", ["FlashAttnFunc", "FlashAttentionOfMine"])
def test_functions_of_other_packages_are_refused(name):
    mine = type(
        name, (torch.autograd.Function,), {"forward": staticmethod(lambda ctx, q, k, v: q), "__module__": "mine"}
    )
    with pytest.raises(InputError, match=f"mine.{name} got a moving value; an autograd.Function hides tangents"):
        pmf.jvp(lambda x: mine.apply(x, x, x), (drawn(2, 3, 4, 8),), (1,))


class ApplyRotaryEmb(torch.autograd.Function):
    """Stands in for flash-attn's: linear in x, in place or not."""

    @staticmethod
    def forward(ctx, x, cos, sin, interleaved=False, inplace=False):
        ctx.save_for_backward(cos, sin)
        half = x.shape[-1] // 2
        a, b = x[..., :half], x[..., half:]
        turned = torch.cat([a * cos - b * sin, a * sin + b * cos], -1)
        if inplace:
            ctx.mark_dirty(x)
            return x.copy_(turned)
        return turned

    @staticmethod
    def backward(ctx, grad):
        cos, sin = ctx.saved_tensors
        half = grad.shape[-1] // 2
        a, b = grad[..., :half], grad[..., half:]
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1), None, None, None, None


ApplyRotaryEmb.__module__ = "flash_attn.layers.rotary"


@pytest.mark.parametrize("inplace", [False, True])
def test_flash_attn_s_rotation(inplace):
    angles = drawn(7, 1, 4, seed=5)

    def function(x):
        h = x * 1
        turned = ApplyRotaryEmb.apply(h, angles.cos(), angles.sin(), False, inplace)
        return turned.sin() + h

    compare(function, (2, 7, 4, 8))


def compiled(function, *inputs, tangents, where):
    torch._dynamo.reset()
    if where == "block":
        return pmf.jvp(torch.compile(function, **PARTITIONED), inputs, tangents)
    return torch.compile(lambda *given: pmf.jvp(function, given, tangents), **PARTITIONED)(*inputs)


@pytest.mark.parametrize("where", ["whole call", "block"])
def test_flash_attn_s_rotation_compiles(where):
    cos, sin = drawn(7, 1, 4, seed=5).cos(), drawn(7, 1, 4, seed=5).sin()

    def function(x):
        return ApplyRotaryEmb.apply(x.sin(), cos, sin, False, False).cos()

    x, v = drawn(2, 7, 4, 8).requires_grad_(), (drawn(2, 7, 4, 8, seed=1),)
    for a, b in zip(compiled(function, x, tangents=v, where=where), pmf.jvp(function, (x,), v), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


class IndexFirstAxis(torch.autograd.Function):
    """Stands in for flash-attn's, which its padding applies by a name bound when it is imported."""

    @staticmethod
    def forward(ctx, x, indices):
        ctx.save_for_backward(indices)
        ctx.samples = len(x)
        return x[indices]

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        return grad.new_zeros(ctx.samples, *grad.shape[1:]).index_copy(0, indices, grad), None


class IndexPutFirstAxis(torch.autograd.Function):
    @staticmethod
    def forward(ctx, values, indices, samples):
        ctx.save_for_backward(indices)
        return values.new_zeros(samples, *values.shape[1:]).index_copy(0, indices, values)

    @staticmethod
    def backward(ctx, grad):
        (indices,) = ctx.saved_tensors
        return grad[indices], None, None


@pytest.fixture
def bert_padding(monkeypatch):
    module = ModuleType("flash_attn.bert_padding")
    for function in (IndexFirstAxis, IndexPutFirstAxis):
        monkeypatch.setattr(function, "__module__", module.__name__)
        setattr(module, function.__name__, function)
    module.index_first_axis, module.index_put_first_axis = IndexFirstAxis.apply, IndexPutFirstAxis.apply
    monkeypatch.setitem(sys.modules, module.__name__, module)
    return module


@pytest.mark.parametrize("where", ["eager", "whole call", "block"])
def test_flash_attn_s_padding(bert_padding, where):
    present = torch.tensor([0, 1, 4, 5, 6])

    def function(x):
        return bert_padding.index_put_first_axis(bert_padding.index_first_axis(x, present).sin(), present, 7)

    compare(function, (7, 4))
    x, v = drawn(7, 4).requires_grad_(), (drawn(7, 4, seed=1),)
    if where != "eager":
        for a, b in zip(compiled(function, x, tangents=v, where=where), pmf.jvp(function, (x,), v), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    assert torch.equal(function(x)[present], x[present].sin())  # the module works outside calls as before


@pytest.mark.parametrize("bias", [None, "tensor", "causal", "blocks"])
def test_xformers(bias):
    seen = torch.rand(7, 7, generator=torch.Generator().manual_seed(0)) > 0.3
    masks = {
        "tensor": drawn(2, 4, 7, 7, seed=5),
        "causal": LowerTriangularMask(),
        "blocks": Blocks(seen | torch.eye(7).bool()),
    }
    compare(lambda q, k, v: memory_efficient_attention(q, k, v, masks.get(bias), scale=0.4), *[(2, 7, 4, 8)] * 3)


def test_xformers_with_a_moving_bias_or_grouped_heads():
    compare(memory_efficient_attention, (2, 7, 4, 8), (2, 9, 4, 8), (2, 9, 4, 8), (2, 4, 7, 9))
    compare(memory_efficient_attention, *[(2, 7, 2, 4, 8)] * 3, (2, 2, 4, 7, 7))
    with pytest.raises(InputError, match="xformers' attention got a moving value and p; expected no dropout"):
        pmf.jvp(lambda x: memory_efficient_attention(x, x, x, p=0.1), (drawn(2, 7, 4, 8),), (1,))


@pytest.mark.parametrize(
    ("lengths", "options", "kernel"),
    [
        ({}, {}, True),
        ({}, {"causal": True}, True),
        ({}, {"window_size": (2, 1)}, False),
        (ALIKE, {"causal": True}, True),
        (UNLIKE, {}, True),
        (UNLIKE, {"causal": True}, False),
    ],
)
def test_on_a_gpu_the_tangent_is_the_kernel_s(decided, lengths, options, kernel):  # noqa: F811 (that fixture)
    call = flash_attn(2, varlen=bool(lengths))
    tokens = int(lengths["cu_seqlens_k"][-1]) if lengths else 0
    shapes = [(12, 4, 8), (tokens, 2, 8), (tokens, 2, 8)] if lengths else [(2, 7, 4, 8), (2, 7, 2, 8), (2, 7, 2, 8)]
    primals, tangents = ([drawn(*shape, seed=first + i) for i, shape in enumerate(shapes)] for first in (0, 5))

    def function(q, k, v):
        return call(q=q, k=k, v=v, **lengths, **options)

    out, dot = pmf.jvp(function, *(tuple(x.float() for x in part) for part in (primals, tangents)))
    assert decided == [kernel] and out.dtype == dot.dtype == torch.float32
    torch.testing.assert_close(dot.double(), differences(function, primals, tangents), rtol=1e-5, atol=1e-5)


class Attention(torch.autograd.Function):
    """softmax(q k^T) v as a package's function that compilers can trace."""

    @staticmethod
    def forward(ctx, q, k, v, softmax_scale, causal):
        weights = (torch.einsum("bshd,bthd->bhst", q, k) * softmax_scale).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        ctx.scale = softmax_scale
        return torch.einsum("bhst,bthd->bshd", weights, v)

    @staticmethod
    def backward(ctx, grad):
        q, k, v, weights = ctx.saved_tensors
        dv = torch.einsum("bhst,bshd->bthd", weights, grad)
        d_weights = torch.einsum("bshd,bthd->bhst", grad, v)
        d_scores = weights * (d_weights - (weights * d_weights).sum(-1, keepdim=True)) * ctx.scale
        return (
            torch.einsum("bhst,bthd->bshd", d_scores, k),
            torch.einsum("bhst,bshd->bthd", d_scores, q),
            dv,
            None,
            None,
        )


FlashAttnFunc = type("FlashAttnFunc", (Attention,), {"__module__": "flash_attn.flash_attn_interface"})


@pytest.mark.parametrize("where", ["whole call", "block"])
def test_flash_attn_compiles(where):
    inputs = [drawn(2, 7, 4, 8, seed=i).requires_grad_() for i in range(3)]
    tangents = tuple(drawn(2, 7, 4, 8, seed=3 + i) for i in range(3))

    def network(q, k, v):
        return FlashAttnFunc.apply(q.sin(), k, v, 0.3, False).cos()

    expected = pmf.jvp(network, tuple(inputs), tangents)
    got = compiled(network, *inputs, tangents=tangents, where=where)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
    got, expected = (torch.autograd.grad(out.sum(), inputs) for out in (got[0], expected[0]))
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.extras
@pytest.mark.skipif(DEVICE == "cuda", reason="where there is a GPU, its kernels run")
@pytest.mark.parametrize("varlen", [False, True])
@pytest.mark.parametrize("causal", [False, True])
def test_the_installed_flash_attn_4(monkeypatch, varlen, causal):
    """Its own functions, but for its kernels, for which the formula stands in."""
    pytest.importorskip("flash_attn.cute")
    package = importlib.import_module("flash_attn.cute.interface")
    stand_in = flash_attn(4, varlen)

    def forward(q, k, v, **options):
        named = {name: options[name] for name in ("softmax_scale", "causal", *(ALIKE if varlen else ()))}
        out = stand_in(q=q, k=k, v=v, **named)
        return out, out[..., 0], None, None, None

    monkeypatch.setattr(package, "_flash_attn_fwd", forward)
    function = package.flash_attn_varlen_func if varlen else package.flash_attn_func
    options = {"causal": causal, **(ALIKE if varlen else {})}
    shape = (12, 4, 8) if varlen else (2, 7, 4, 8)
    q, k, v = (drawn(*shape, seed=i) for i in range(3))
    tangents = tuple(drawn(*shape, seed=3 + i) for i in range(3))
    out, dot = pmf.jvp(lambda *x: function(*x, **options)[0], (q, k, v), tangents)
    wanted = pmf.jvp(lambda q, k, v: stand_in(q=q, k=k, v=v, **options), (q, k, v), tangents)
    assert torch.equal(out, wanted[0]) and torch.equal(dot, wanted[1]) and dot.abs().max() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window_size": (8, 8)}], ids=str)
@pytest.mark.parametrize("package", ["flash_attn", "flash_attn_interface", "flash_attn.cute"])
def test_the_installed_packages_on_a_gpu(package, options):
    """Value, tangent and gradients as of PyTorch's attention with the same mask."""
    function = getattr(pytest.importorskip(package), "flash_attn_func", None)
    if function is None:
        pytest.skip(f"{package} has no flash_attn_func: another package has the name")
    shape, place = (2, 300, 4, 64), torch.arange(300, device="cuda")
    beside = place - place[:, None]
    seen = {"causal": beside <= 0, "window_size": beside.abs() <= 8}.get(next(iter(options), ""))

    def theirs(q, k, v):
        out = function(q, k, v, **options)
        return out if isinstance(out, torch.Tensor) else out[0]

    def ours(q, k, v):
        heads = (x.transpose(1, 2) for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen).transpose(1, 2)

    tangents = tuple(drawn(*shape, seed=5 + i).cuda().bfloat16() for i in range(3))
    results = []
    for attention in (theirs, ours):
        leaves = tuple(drawn(*shape, seed=i).cuda().bfloat16().requires_grad_() for i in range(3))
        out, dot = pmf.jvp(attention, leaves, tangents)
        results.append([out, dot, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()
