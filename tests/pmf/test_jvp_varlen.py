"""`pmf.jvp` of `torch.nn.attention.varlen`: on a CPU its operator has no kernel, and the formula stands in."""

import inspect
import itertools

import pytest
import torch
from torch.nn.attention import varlen

import pmf
from pmf import InputError
from tests.pmf.attention_packages import sample_attention
from tests.pmf.jvp_checks import PARTITIONED, drawn
from tests.pmf.test_jvp_packages import OTHER_STARTS, STARTS

GROUPED = {"enable_gqa": True} if "enable_gqa" in inspect.signature(varlen.varlen_attn).parameters else {}
HEADS = 2 if GROUPED else 4
OPTIONS = [{}, {"window_size": (-1, 0)}, {"window_size": (2, 1)}, {"window_size": (2, 0)}, {"scale": 0.3}]


@varlen._varlen_attn.register_kernel("cpu")
def _(query, key, value, starts_q, starts_k, max_q, max_k, is_causal=False, scale=None, window_size=None, *others):
    window = (-1, -1) if window_size is None else window_size
    ends = zip(itertools.pairwise(starts_q.tolist()), itertools.pairwise(starts_k.tolist()), strict=True)
    samples = [
        sample_attention(query[a:b], key[c:d], value[c:d], scale, is_causal, window, False) for (a, b), (c, d) in ends
    ]
    return torch.cat(samples), query.new_zeros(query.shape[:2]).mT.float(), torch.zeros(2, dtype=torch.uint64)


def attend(q, k, v, **options):
    keys, longest = (STARTS, 7) if len(k) == 12 else (OTHER_STARTS, 5)
    return varlen.varlen_attn(q, k, v, STARTS, keys, 7, longest, **GROUPED, **options)


def inputs(tokens, seed=0):
    return [drawn(n, heads, 8, seed=seed + i) for i, (n, heads) in enumerate([(12, 4), *[(tokens, HEADS)] * 2])]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("tokens", [12, 9])
def test_varlen(tokens, options):
    """Alike and unlike lengths. Without gradients: the operator's backward is PyTorch's kernel, which CPUs lack."""
    primals, tangents = inputs(tokens), inputs(tokens, seed=5)
    out, dot = pmf.jvp(lambda *x: attend(*x, **options), tuple(primals), tuple(tangents))
    assert torch.equal(out, attend(*primals, **options))
    step = 1e-6
    up, down = (
        attend(*[x + sign * step * v for x, v in zip(primals, tangents, strict=True)], **options) for sign in (1, -1)
    )
    torch.testing.assert_close(dot, (up - down) / (2 * step), rtol=1e-6, atol=1e-8)


def test_the_log_sum_exp_stands_still():
    primals = inputs(12)
    _, dot = pmf.jvp(
        lambda q: attend(q, *primals[1:], return_aux=varlen.AuxRequest(lse=True)), (primals[0],), (primals[0],)
    )
    assert dot[0].abs().max() > 0 and not dot[1].any()


@pytest.mark.parametrize("where", ["whole call", "block"])
def test_varlen_compiles(where):
    primals, tangents = tuple(inputs(9)), tuple(inputs(9, seed=5))

    def network(*x):
        return attend(x[0].sin(), *x[1:], window_size=(2, 1)).cos()

    torch._dynamo.reset()
    expected = pmf.jvp(network, primals, tangents)
    if where == "block":
        got = pmf.jvp(torch.compile(network, **PARTITIONED), primals, tangents)
    else:
        got = torch.compile(lambda *x: pmf.jvp(network, x, tangents), **PARTITIONED)(*primals)
    for a, b in zip(got, expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.skipif(not GROUPED, reason="the argument came after enable_gqa")
def test_what_the_formula_lacks_is_named():
    q, k, v = inputs(12)
    used = torch.ones(4, dtype=torch.int32)
    with pytest.raises(InputError, match="torch_attn::_varlen_attn got a moving value and seqused_k"):
        pmf.jvp(lambda q: attend(q, k, v, seqused_k=used), (q,), (q,))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("window", [(-1, -1), (-1, 0), (8, 8)])
def test_varlen_on_a_gpu(window):
    """Value, tangent and gradients as of PyTorch's attention of each sample."""
    starts = torch.tensor([0, 100, 170, 300], dtype=torch.int32, device="cuda")

    def theirs(q, k, v):
        return varlen.varlen_attn(q, k, v, starts, starts, 130, 130, window_size=window)

    def ours(q, k, v):
        ends = itertools.pairwise(starts.tolist())
        return torch.cat([of_sample(*[x[a:b] for x in (q, k, v)]) for a, b in ends])

    def of_sample(q, k, v):
        place = torch.arange(len(q), device="cuda")
        beside = place - place[:, None]
        seen = {(-1, -1): None, (-1, 0): beside <= 0, (8, 8): beside.abs() <= 8}[window]
        heads = (x.transpose(0, 1)[None] for x in (q, k, v))
        return torch.nn.functional.scaled_dot_product_attention(*heads, attn_mask=seen)[0].transpose(0, 1)

    tangents = tuple(drawn(300, 4, 64, seed=5 + i).cuda().bfloat16() for i in range(3))
    results = []
    for attention in (theirs, ours):
        leaves = tuple(drawn(300, 4, 64, seed=i).cuda().bfloat16().requires_grad_() for i in range(3))
        out, dot = pmf.jvp(attention, leaves, tangents)
        results.append([out, dot, *torch.autograd.grad(out.float().sin().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).float().norm() < 0.02 * b.float().norm()
