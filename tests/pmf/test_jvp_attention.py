"""`pmf.jvp` of PyTorch's attention where no kernel has the tangent: in parts of the queries, in float32 or more."""

import functools

import pytest
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf.counting import live_bytes
from pmf.tangents import attention
from tests.pmf.jvp_checks import F64, drawn

SEEN = torch.rand(2, 1, 7, 9, generator=torch.Generator().manual_seed(0)) > 0.3
MASKS = {
    "of each query": SEEN,
    "of all queries": SEEN[:, :, :1],
    "of keys alone": SEEN[0, 0, :1],
    "added": drawn(7, 9, seed=8),
    "with a query without keys": SEEN & (torch.arange(7) != 4)[:, None],
    "causal": None,
}


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1)
    monkeypatch.setattr(attention, "LEAST_QUERIES", 3)


def inputs(dtype=F64, keys=9):
    shapes = (2, 4, 7, 8), (2, 4, keys, 8), (2, 4, keys, 8)
    return [tuple(drawn(*shape, seed=first + i).to(dtype) for i, shape in enumerate(shapes)) for first in (0, 5)]


@pytest.mark.parametrize("mask", MASKS)
def test_parts_of_the_queries_have_the_tangent_of_all(in_parts, mask):
    options = {"is_causal": True} if mask == "causal" else {"attn_mask": MASKS[mask]}
    function = functools.partial(F.scaled_dot_product_attention, **options)
    primals, tangents = inputs(keys=7 if mask == "causal" else 9)
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(function, primals, tangents)[1]
    _, dot = pmf.jvp(function, primals, tangents)
    torch.testing.assert_close(dot, wanted.nan_to_num(0), rtol=1e-12, atol=1e-12)
    assert torch.equal(dot[:, :, 4], torch.zeros_like(dot[:, :, 4])) == (mask == "with a query without keys")


@pytest.mark.parametrize("shape", [(7, 9), (2, 1, 1, 9)])
def test_parts_of_a_moving_mask(in_parts, shape):
    primals, tangents = inputs()
    given, along = (*primals, drawn(*shape, seed=8)), (*tangents, drawn(*shape, seed=9))
    with sdpa_kernel(SDPBackend.MATH):
        wanted = torch.func.jvp(F.scaled_dot_product_attention, given, along)[1]
    torch.testing.assert_close(pmf.jvp(F.scaled_dot_product_attention, given, along)[1], wanted, rtol=1e-12, atol=1e-12)


def test_parts_lose_the_same_weights(monkeypatch):
    primals, tangents = inputs()
    results = []
    for least in (64, 3):
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", 1)
        monkeypatch.setattr(attention, "LEAST_QUERIES", least)
        torch.manual_seed(0)
        results.append(pmf.jvp(lambda *x: F.scaled_dot_product_attention(*x, dropout_p=0.4), primals, tangents)[1])
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def test_no_more_scores_are_alive_than_a_part_has(monkeypatch):
    x, seen = torch.randn(1, 2, 512, 8), torch.ones(512, 512, dtype=torch.bool).tril()

    def peak(scores):
        monkeypatch.setattr(attention, "SCORES_AT_ONCE", scores)
        function = functools.partial(F.scaled_dot_product_attention, attn_mask=seen)
        return live_bytes(lambda: pmf.jvp(function, (x, x, x), (x, x, x))).peak

    all_at_once = 2 * 512 * 512
    assert peak(all_at_once // 8) < 0.25 * peak(all_at_once)


def test_what_is_no_number_has_no_tangent():
    """Only a query that sees no key stands still."""
    (q, k, v), tangents = inputs()
    q[0, 0, 2, 0] = torch.nan
    seen = torch.ones(7, 9, dtype=torch.bool)
    seen[4] = False
    out, dot = pmf.jvp(lambda *x: F.scaled_dot_product_attention(*x, attn_mask=seen), (q, k, v), tangents)
    assert torch.equal(out.isnan(), dot.isnan()) and dot[0, 0, 2].isnan().all() and not dot[0, 0, 4].any()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("size", [1, 60])
def test_scores_of_half_precision_are_float32(dtype, size):
    """At size 60 they pass 65,504, the greatest float16."""
    primals, tangents = inputs(dtype)
    primals = primals[0] * size, primals[1] * size, primals[2]
    function = functools.partial(F.scaled_dot_product_attention, attn_mask=SEEN, scale=1.0 if size > 1 else None)
    out, dot = pmf.jvp(function, primals, tangents)
    wide = pmf.jvp(function, *(tuple(x.to(F64) for x in part) for part in (primals, tangents)))[1]
    assert out.dtype == dot.dtype == dtype
    torch.testing.assert_close(dot.to(F64), wide, rtol=2 * torch.finfo(dtype).eps, atol=2e-3)
