"""`pmf.jvp` of FlexAttention, which has no forward mode and on CPUs no backward."""

import functools
import math

import pytest
import torch
from torch.nn.attention.flex_attention import AuxRequest, BlockMask, create_block_mask, flex_attention

import pmf
from tests.pmf.jvp_checks import F64, drawn
from tests.pmf.test_jvp_no_forward_mode import differences

pytestmark = pytest.mark.filterwarnings("ignore:.*flex_attention called without torch.compile")

DOCUMENTS = torch.randint(0, 3, (2, 40), generator=torch.Generator().manual_seed(0))
BIAS, SLOPES = drawn(4, 80, seed=8), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=F64)
MODS = {
    "none": None,
    "bias by chained indices": lambda s, b, h, i, j: s + BIAS[h][i - j + 39],
    "softcap": lambda s, b, h, i, j: 3 * torch.tanh(s / 3),
    "slopes": lambda s, b, h, i, j: s - SLOPES[h] * (i - j).abs(),
    "squares, some hidden": lambda s, b, h, i, j: torch.where(i >= j, s * s, -float("inf")),
}
MASKS = {
    "none": lambda: None,
    "causal": lambda: create_block_mask(lambda b, h, i, j: i >= j, None, None, 32, 40, "cpu", BLOCK_SIZE=16),
    "documents": lambda: create_block_mask(
        lambda b, h, i, j: DOCUMENTS[b, i] == DOCUMENTS[b, j], 2, None, 32, 40, "cpu", BLOCK_SIZE=(8, 16)
    ),
}
SHAPES = (2, 4, 32, 16), (2, 2, 40, 16), (2, 2, 40, 8)


def attention(mod=None, mask=None, **options):
    return lambda *inputs: flex_attention(*inputs, score_mod=mod, block_mask=mask, enable_gqa=True, **options)


def inputs(*shapes):
    return [[drawn(*shape, seed=first + i) for i, shape in enumerate(shapes)] for first in (0, 5)]


def check(function, primals, tangents, where="eager"):
    torch._dynamo.reset()
    moving = tuple(tangents)
    if where == "compiled":
        call = torch.compile(lambda *x: pmf.jvp(function, x, moving), fullgraph=True, backend="aot_eager")
        out, dot = call(*primals)
    else:
        block = torch.compile(function, fullgraph=True, backend="aot_eager") if where == "block" else function
        out, dot = pmf.jvp(block, tuple(primals), moving)
    torch.testing.assert_close(out, function(*primals), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(dot, differences(function, primals, tangents, 1e-6), rtol=1e-6, atol=1e-8)
    assert dot.abs().max() > 0


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("mod", MODS)
def test_flex_attention(mod, mask):
    check(attention(MODS[mod], MASKS[mask](), scale=0.3), *inputs(*SHAPES))


@pytest.mark.parametrize("where", ["compiled", "block"])
@pytest.mark.parametrize(("mod", "mask"), [("none", "none"), ("none", "causal"), *[(mod, "documents") for mod in MODS]])
def test_flex_attention_compiles(mod, mask, where):
    check(attention(MODS[mod], MASKS[mask](), scale=0.3), *inputs(*SHAPES), where)


@pytest.mark.parametrize("still", [(0, 1), (1, 2), (0, 2)])
@pytest.mark.parametrize("mod", ["none", "softcap"])
def test_a_part_moves(mod, still):
    primals, tangents = inputs(*SHAPES)
    tangents = [None if i in still else v for i, v in enumerate(tangents)]
    check(attention(MODS[mod], MASKS["causal"]()), primals, tangents)


@pytest.mark.parametrize("whole", [False, True])
def test_blocks_that_no_function_gives(whole):
    """Compiled kernels read the keys of the blocks alone: of the third block of queries none."""
    torch._dynamo.reset()
    blocks = torch.tensor([[1, 0, 1], [1, 1, 0], [0, 0, 0], [0, 0, 1]], dtype=torch.bool)
    order = (~blocks).int().argsort(dim=-1, stable=True).int()
    mask = BlockMask.from_kv_blocks(blocks.sum(-1).int()[None, None], order[None, None], BLOCK_SIZE=(16, 16))
    primals, tangents = inputs((2, 4, 64, 16), (2, 4, 48, 16), (2, 4, 48, 16))
    seen = blocks.repeat_interleave(16, 0).repeat_interleave(16, 1)
    dense = functools.partial(torch.nn.functional.scaled_dot_product_attention, attn_mask=seen)
    wanted = pmf.jvp(dense, tuple(primals), tuple(tangents))
    primals, tangents = (tuple(x.float() for x in part) for part in (primals, tangents))
    function = attention(mask=mask)
    if whole:
        got = torch.compile(lambda *x: pmf.jvp(function, x, tangents), fullgraph=True)(*primals)
    else:
        got = pmf.jvp(torch.compile(function, fullgraph=True), primals, tangents)
    for a, b in zip(got, wanted, strict=True):
        torch.testing.assert_close(a, b.float(), rtol=1e-4, atol=1e-5)


def test_keys_of_one_sample_for_all():
    mask = create_block_mask(lambda b, h, i, j: i + b >= j, 2, None, 32, 40, "cpu", BLOCK_SIZE=16)
    check(attention(mask=mask), *inputs((2, 4, 32, 16), (1, 4, 40, 16), (1, 4, 40, 16)))


@pytest.mark.parametrize("mod", ["none", "slopes"])
@pytest.mark.parametrize("where", ["eager", "compiled"])
def test_the_sum_of_the_weights_moves(mod, where):
    request = AuxRequest(lse=True)

    def function(*inputs):
        out, more = attention(MODS[mod], return_aux=request)(*inputs)
        return torch.cat([out, more.lse[..., None].to(F64)], -1)

    check(function, *inputs(*SHAPES), where)


def test_the_operator_with_gradients_and_the_greatest_score():
    """PyTorch's eager form of the operator has what its compiled form lacks on CPUs."""
    mask = MASKS["causal"]().as_tuple()

    def function(*inputs):
        out, lse, greatest = torch.ops.higher_order.flex_attention(*inputs, MODS["softcap"], mask, 0.3, {})
        return torch.cat([out, lse[..., None] * math.log(2), greatest[..., None]], -1)

    primals, tangents = inputs((2, 4, 32, 16), (2, 4, 40, 16), (2, 4, 40, 16))
    with torch.no_grad():
        check(function, primals, tangents)
    leaves = [x.clone().requires_grad_() for x in primals]
    out, dot = pmf.jvp(lambda *x: function(*x)[..., :16], tuple(leaves), tuple(tangents))
    got, wanted = (torch.autograd.grad(x.sin().sum(), leaves) for x in (out, function(*leaves)[..., :16]))
    assert all(map(torch.equal, got, wanted)) and not dot.requires_grad


@pytest.mark.parametrize("autocast", [False, True])
def test_half_precision(autocast):
    primals, tangents = inputs(*SHAPES)
    _, wanted = pmf.jvp(attention(), tuple(primals), tuple(tangents))
    dtype = torch.float32 if autocast else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        given = (tuple(x.to(dtype) for x in part) for part in (primals, tangents))
        out, dot = pmf.jvp(attention(), *given)
    assert out.dtype == dot.dtype == torch.bfloat16
    assert (dot - wanted).norm() < 0.01 * wanted.norm()


def test_a_moving_value_in_a_closure_raises():
    q, k, v = (drawn(2, 4, 32, 16, seed=i) for i in range(3))

    def function(c):
        return flex_attention(q, k, v, score_mod=lambda s, b, h, i, j: s + c[h] * (i - j))

    with pytest.raises(torch._dynamo.exc.TorchDynamoException):
        pmf.jvp(function, (drawn(4),), (drawn(4, seed=1),))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("mod", ["none", "slopes"])
def test_on_a_gpu(mod):
    """Value, tangent and gradients of compiled kernels as of PyTorch's eager form of the operator."""
    mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 256, 256, "cuda")
    slopes = SLOPES.float().cuda()
    change = {"none": lambda s, b, h, i, j: s * 1, "slopes": lambda s, b, h, i, j: s - slopes[h] * (i - j).abs()}[mod]
    fused = torch.compile(flex_attention, fullgraph=True)
    forms = (
        lambda q, k, v: fused(q, k, v, score_mod=change, block_mask=mask),
        lambda q, k, v: torch.ops.higher_order.flex_attention(q, k, v, change, mask.as_tuple(), 0.125, {})[0],
    )
    primals, tangents = inputs(*[(2, 4, 256, 64)] * 3)
    results = []
    for function in forms:
        leaves = tuple(x.float().cuda().requires_grad_() for x in primals)
        out, dot = pmf.jvp(function, leaves, tuple(v.float().cuda() for v in tangents))
        results.append([out, dot, *torch.autograd.grad(out.sin().sum(), leaves)])
    for a, b in zip(*results, strict=True):
        assert (a - b).norm() < 0.005 * b.norm()
