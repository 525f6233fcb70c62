"""`pmf.jvp` of attention with dropout: value and tangent lose the same weights."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import pmf
from tests.pmf.jvp_checks import F64, PARTITIONED, compare, drawn

SEEN = torch.rand(5, 7, generator=torch.Generator().manual_seed(0)) > 0.3
SEEN[2] = False  # a query that sees no key
OPTIONS = {
    "plain": {},
    "mask": {"attn_mask": SEEN},
    "mask that is added": {"attn_mask": torch.where(SEEN, drawn(5, 7), -torch.inf)},
    "causal": {"is_causal": True},
    "scale": {"scale": -0.3},
    "grouped heads": {"enable_gqa": True},
    "nothing kept": {"dropout_p": 1.0},
}


def attention_inputs(options):
    """q, k, v [B, H, S, D] with 5 queries, 7 keys and values of 3 numbers, and their tangents."""
    heads = 2 if "enable_gqa" in options else 4
    shapes = (2, 4, 5, 2), (2, heads, 7, 2), (2, heads, 7, 3)
    return [[drawn(*shape, seed=seed + i) for i, shape in enumerate(shapes)] for seed in (0, 3)]


def attention(options):
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, **({"dropout_p": 0.4} | options))


@pytest.mark.parametrize("moving", ["q k v", "q", "v"])
@pytest.mark.parametrize("name", OPTIONS)
def test_attention_with_dropout_equals_torch_func_jvp(name, moving):
    primals, tangents = attention_inputs(OPTIONS[name])
    parts = [i for i, letter in enumerate("qkv") if letter in moving]

    def function(*given):
        return attention(OPTIONS[name])(*[given[parts.index(i)] if i in parts else primals[i] for i in range(3)])

    compare(function, [primals[i] for i in parts], [tangents[i] for i in parts])


@pytest.mark.parametrize("name", OPTIONS)
def test_compiled_attention_with_dropout_equals_the_eager_one(name):
    torch._dynamo.reset()
    primals, tangents = attention_inputs(OPTIONS[name])
    results = []
    for options in ({"disable": True}, {"fullgraph": True, "backend": "aot_eager"}):
        inputs = [x.clone().requires_grad_() for x in primals]
        call = torch.compile(lambda *given: pmf.jvp(attention(OPTIONS[name]), given, tuple(tangents)), **options)
        torch.manual_seed(0)
        out, dot = call(*inputs)
        results.append([out, dot, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", ["aot_eager_decomp_partition", "inductor"])
def test_value_and_tangent_of_compiled_attention_lose_the_same(backend):
    """Attention of the identity shows what dropout has kept; compilers draw other numbers than eager mode."""
    torch._dynamo.reset()
    (q, k, _), (q_dot, k_dot, _) = attention_inputs({})
    identity, v_dot = torch.eye(7, dtype=F64).expand(2, 4, 7, 7).clone().requires_grad_(), drawn(2, 4, 7, 7)
    given, tangents = (q, k, identity), (q_dot, k_dot, v_dot)
    call = torch.compile(lambda *given: pmf.jvp(attention({}), given, tangents), fullgraph=True, backend=backend)
    kept, dot = call(*given)
    scores, scores_dot = torch.func.jvp(lambda q, k: q @ k.mT / 2**0.5, (q, k), (q_dot, k_dot))
    weights = scores.softmax(-1)
    mask = kept / weights
    assert set(mask.round(decimals=9).flatten().tolist()) == {0, round(1 / 0.6, 9)}
    total = (weights * scores_dot).sum(-1, keepdim=True)
    torch.testing.assert_close(dot, kept @ v_dot + kept * (scores_dot - total), rtol=1e-12, atol=1e-12)
    by_values = torch.autograd.grad(kept.sum(), identity)[0]
    torch.testing.assert_close(by_values, kept.sum(-2)[..., None].expand(2, 4, 7, 7), rtol=1e-12, atol=1e-12)


REFUSED = {
    "mask of integers": {"attn_mask": torch.ones(5, 7, dtype=torch.int64)},
    "mask of another dtype": {"attn_mask": torch.zeros(5, 7, dtype=torch.bfloat16)},
    "mask of a larger batch": {"attn_mask": drawn(3, 4, 5, 7)},
    "two masks": {"attn_mask": torch.zeros(5, 7, dtype=F64), "is_causal": True},
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", REFUSED)
def test_masks_that_attention_refuses_are_refused(name, compiled):
    torch._dynamo.reset()
    primals, tangents = attention_inputs({})
    call = torch.compile(
        lambda *given: pmf.jvp(attention(REFUSED[name]), given, tuple(tangents)),
        fullgraph=True,
        backend="aot_eager",
        disable=not compiled,
    )
    with pytest.raises(Exception, match=r"attn_mask|broadcast|must match"):
        call(*primals)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_compiled_scores_of_half_precision_do_not_overflow(dtype):
    """They reach 250,000; PyTorch's attention computes them in float32."""
    torch._dynamo.reset()
    x = (60 * drawn(1, 1, 8, 64)).to(dtype)
    call = torch.compile(
        lambda x: pmf.jvp(attention({"scale": 1.0}), (x, x, x), (x / 1000, None, x)),
        fullgraph=True,
        backend="aot_eager",
    )
    out, dot = call(x)
    assert out.dtype == dot.dtype == dtype and out.isfinite().all() and dot.isfinite().all()
    kept = out != 0  # each query sees itself alone
    torch.testing.assert_close(out[kept], (x / 0.6)[kept], rtol=1e-2, atol=0)


def test_threads_lose_the_same_of_value_and_tangent():
    """Each calls `pmf.jvp` on numbers of its own; all draw from one generator."""
    wrong = []

    def run(seed):
        x = drawn(1, 2, 6, 4, seed=seed)
        for function in (attention({}), lambda q, k, v: F.dropout(v, 0.4)):
            for _ in range(50):
                out, dot = pmf.jvp(function, (x, x, x), (None, None, x))
                if not torch.allclose(out, dot):
                    wrong.append(seed)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(run, range(6)))
    assert not wrong


class SelfAttention(nn.Module):
    """nn.MultiheadAttention with dropout, of one input."""

    def __init__(self, **options):
        super().__init__()
        self.attention, self.options = nn.MultiheadAttention(12, 3, dropout=0.3, batch_first=True), options

    def forward(self, x):
        return self.attention(x, x.cos(), x.sin(), **self.options)[0]


PADDING = torch.tensor([[False] * 5, [False] * 3 + [True] * 2])


class Padded(nn.Module):
    """A layer that is given which tokens are padding."""

    def __init__(self, kind):
        super().__init__()
        self.layer = kind(12, 3, 24, dropout=0.2, batch_first=True)

    def forward(self, x):
        if isinstance(self.layer, nn.TransformerEncoderLayer):
            return self.layer(x, src_key_padding_mask=PADDING)
        return self.layer(x, x.cos(), tgt_key_padding_mask=PADDING)


LAYERS = {
    "layer": lambda: nn.TransformerEncoderLayer(12, 3, 24, dropout=0.2, batch_first=True),
    "layer, norm first": lambda: nn.TransformerEncoderLayer(12, 3, 24, dropout=0.2, batch_first=True, norm_first=True),
    "layer with padding": lambda: Padded(nn.TransformerEncoderLayer),
    "decoder layer with padding": lambda: Padded(nn.TransformerDecoderLayer),
    "attention": lambda: SelfAttention(need_weights=False),
    "attention and its weights": lambda: SelfAttention(need_weights=True),
    "attention with padding": lambda: SelfAttention(
        need_weights=False, key_padding_mask=torch.zeros(2, 5, dtype=F64).masked_fill(PADDING, -torch.inf)
    ),
    "Gumbel softmax": lambda: lambda x: F.gumbel_softmax(x.sin(), tau=0.7),
}


def seeded(function, *given):
    torch.manual_seed(0)
    return function(*given)


@pytest.mark.parametrize("function", [F.dropout, F.dropout2d, F.alpha_dropout, F.feature_alpha_dropout])
def test_nothing_is_left_of_nothing(function):
    x = drawn(0, 4, 5, 5)
    out, dot = pmf.jvp(lambda x: function(x, 0.5, training=True) * x, (x,), (1,))
    assert out.shape == dot.shape == x.shape


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_with_dropout_move_as_their_differences_do(name, compiled):
    torch._dynamo.reset()
    torch.manual_seed(0)
    network = LAYERS[name]()
    network = network.to(F64) if isinstance(network, nn.Module) else network
    x, v = drawn(2, 5, 12), drawn(2, 5, 12, seed=1)
    call = torch.compile(
        lambda x: pmf.jvp(network, (x,), (v,)), fullgraph=True, backend="aot_eager", disable=not compiled
    )
    out, dot = seeded(call, x)
    torch.testing.assert_close(out, seeded(network, x), rtol=1e-12, atol=1e-12)
    step = 1e-6
    difference = seeded(network, x + step * v) - seeded(network, x - step * v)
    torch.testing.assert_close(dot, difference.detach() / (2 * step), rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("compiled", [False, True])
def test_a_checkpoint_around_attention_with_dropout_draws_the_same_again(compiled):
    torch._dynamo.reset()
    primals, tangents = attention_inputs({})
    results = []
    for function in (attention({}), lambda *given: checkpoint(attention({}), *given, use_reentrant=False)):
        inputs = [x.clone().requires_grad_() for x in primals]
        call = torch.compile(
            lambda *given: pmf.jvp(function, given, tuple(tangents)),  # noqa: B023
            **PARTITIONED,
            disable=not compiled,
        )
        out, dot = seeded(call, *inputs)
        results.append([out, dot, *torch.autograd.grad(out.square().sum(), inputs)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
