"""`qk_norm_rope` and `norm_rope` in Triton as other networks use them: grouped heads, both pairs, every norm."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import Dual, ops
from pmf.errors import InputError
from tests.kernels.checks import check, check_compiles, check_forward_mode, generator, randn, strided

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = ((F32, F32), (BF16, F32), (BF16, BF16))
HALF_LAYER = dict(norm="layer", pairs="half")
TABLES = (5, 6)
"""cos and sin, which take no gradient, among the inputs of `positional`."""


def positional(qkv, q_weight, k_weight, q_bias, k_bias, cos, sin, **options):
    """`qk_norm_rope` with its biases in front, so that `checks` differentiate them."""
    return ops.qk_norm_rope(qkv, q_weight, k_weight, cos, sin, q_bias=q_bias, k_bias=k_bias, **options)


def positional_one(x, weight, bias, cos, sin, **options):
    """`norm_rope` likewise."""
    return ops.norm_rope(x, weight, cos, sin, bias=bias, **options)


@pytest.fixture(autouse=True)
def named(monkeypatch):
    """`checks` finds ops by name."""
    monkeypatch.setattr(ops, "packed_heads", positional, raising=False)
    monkeypatch.setattr(ops, "heads_alone", positional_one, raising=False)


def inputs(
    *, batch=2, length=7, heads=3, kv_heads=None, head_dim=40, rows=1, dtypes=(F32, F32), norm="rms",
    across_heads=False, pairs="adjacent", weights=True, biases=False, tables="shared", prefix_length=0,
):  # fmt: skip
    """Primals and tangents of `positional`, and its options. kv_heads 0: those of `positional_one`."""
    gen = generator(batch, length, heads, kv_heads, head_dim, rows)
    low, param = dtypes
    packed = (heads,) if kv_heads == 0 else (3, heads) if kv_heads is None else (heads + 2 * kv_heads,)
    parts = (heads,) if kv_heads == 0 else (heads, kv_heads or heads)

    def parameters(wanted, mean):
        wide = [n * head_dim if across_heads else head_dim for n in parts]
        return [randn(n, gen=gen, dtype=param, mean=mean) if wanted and norm else None for n in wide]

    x = randn(batch, length, *packed, head_dim, gen=gen, dtype=low)
    dot = randn(rows, length, *packed, head_dim, gen=gen, dtype=low) if rows else None
    shape = (batch,) if tables == "per sample" else ()
    angles = randn(*shape, length - prefix_length, head_dim // 2, gen=gen)
    cos, sin = (angles.cos(), angles.sin()) if tables else (None, None)
    primals = (x, *parameters(weights, 1.0), *parameters(biases, 0.0), cos, sin)
    options = dict(norm=norm, across_heads=across_heads, pairs=pairs, prefix_length=prefix_length)
    options |= {"num_kv_heads": kv_heads} if kv_heads else {}
    return primals, (dot, *(None,) * (len(primals) - 1)), options


def checked(**what):
    """Check one op on `inputs`."""
    primals, tangents, options = inputs(**what)
    op, tables = ("heads_alone", (3, 4)) if what.get("kv_heads") == 0 else ("packed_heads", TABLES)
    check(op, primals, tangents, fixed=tables, **options)


FORMS = {
    "norm": ("rms", "layer", None),
    "across_heads": (False, True),
    "pairs": ("adjacent", "half"),
    "tables": ("shared", "per sample", None),
    "weights": (True, False),
    "biases": (False, True),
    "kv_heads": (None, 0, 1, 2),
    "heads": (2, 3, 12),
    "head_dim": (8, 40, 64, 72, 80, 128),
    "length": (1, 7),
    "dtypes": DTYPES,
    "rows": (0, 1, 2),
    "prefix_length": (0, 1),
}


def pairwise(choices):
    """Combinations in which every pair of values of two options occurs, chosen greedily."""
    names, values = list(choices), list(choices.values())
    spread = [
        {((i, a), (j, b)) for a in range(len(values[i])) for b in range(len(values[j]))}
        for i, j in itertools.combinations(range(len(names)), 2)
    ]
    left = set().union(*spread)
    while left:
        (i, a), (j, b) = min(left)
        chosen = {i: a, j: b}
        for k in range(len(names)):
            if k not in chosen:
                gains = [
                    sum((min((k, v), item), max((k, v), item)) in left for item in chosen.items())
                    for v in range(len(values[k]))
                ]
                chosen[k] = gains.index(max(gains))
        left -= set(itertools.combinations(sorted(chosen.items()), 2))
        yield {names[k]: values[k][v] for k, v in sorted(chosen.items())}


def label(what):
    return "-".join(str(v).replace("torch.", "") for v in what.values())


@pytest.mark.parametrize("what", pairwise(FORMS), ids=label)
def test_forms(what):
    """Every pair of options together; what has nothing to do is an error."""
    if what["norm"] is None and what["tables"] is None:
        primals, _, options = inputs(**what)
        op = positional_one if what["kv_heads"] == 0 else positional
        with pytest.raises(InputError, match="there is nothing to do"):
            op(*primals, **options, impl="triton")
        return
    checked(**what)


@pytest.mark.parametrize("dtypes", DTYPES, ids=("float32", "bfloat16", "bfloat16 parameters"))
@pytest.mark.parametrize(
    "what",
    [
        dict(**HALF_LAYER, biases=True, head_dim=64, heads=2),
        dict(norm="layer", biases=True, head_dim=80, heads=2),
        dict(kv_heads=4, heads=12, head_dim=64),
        dict(tables="per sample", head_dim=80, heads=1),
        dict(kv_heads=0, **HALF_LAYER, head_dim=72, heads=3),
    ],
    ids=("half layer", "layer", "grouped", "per sample", "alone"),
)
def test_long(what, dtypes):
    """pMF's own length, with a prefix."""
    checked(**what, length=276, prefix_length=20, dtypes=dtypes)


@pytest.mark.parametrize("kv_heads", (None, 2, 0))
@pytest.mark.parametrize("norm", ("rms", "layer"))
def test_across_wide(norm, kv_heads):
    """40 heads of 128: 8192 padded values in a tile."""
    checked(norm=norm, across_heads=True, heads=40, kv_heads=kv_heads, head_dim=128, length=3, biases=norm == "layer")


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    batch=st.integers(0, 3), length=st.integers(1, 20), groups=st.integers(0, 5), more=st.integers(0, 5),
    eighths=st.integers(1, 16), share=st.floats(0, 1), before=st.floats(0, 1), norm=st.sampled_from(("rms", "layer")),
    across_heads=st.booleans(), pairs=st.sampled_from(("adjacent", "half")), weights=st.booleans(),
    biases=st.booleans(), tables=st.sampled_from(("shared", "per sample", None)),
    dtypes=st.sampled_from((*DTYPES, (F16, F16))),
)  # fmt: skip
def test_any(batch, length, groups, more, eighths, share, before, **what):
    heads, rows, prefix = max(groups + more, 1), round(share * batch), round(before * length)
    sizes = dict(batch=batch, length=length, heads=heads, kv_heads=groups, head_dim=8 * eighths)
    checked(**sizes, rows=rows, prefix_length=prefix, **what)


@pytest.mark.parametrize("what", (dict(kv_heads=1), HALF_LAYER, dict(kv_heads=0), dict(across_heads=True)))
def test_views(what):
    """Heads with gaps between columns, and samples in another order in memory."""
    primals, tangents, options = inputs(**what)
    op, tables = ("heads_alone", (3, 4)) if what.get("kv_heads") == 0 else ("packed_heads", TABLES)
    for view in (strided, lambda x: x.transpose(0, 1).contiguous().transpose(0, 1), lambda x: x.mT.contiguous().mT):
        dots = (view(tangents[0]), *tangents[1:])
        check(op, (view(primals[0]), *primals[1:]), dots, fixed=tables, **options)


@pytest.mark.parametrize(
    "what", (dict(kv_heads=1, biases=True), HALF_LAYER, dict(across_heads=True, kv_heads=2), dict(norm=None))
)
def test_compilers_checkpointing_and_forward_mode(what):
    primals, tangents, options = inputs(batch=3, length=5, rows=2, head_dim=16, **what)
    check_compiles("packed_heads", primals, tangents, fixed=TABLES, **options)
    check_forward_mode("packed_heads", primals, (0,), **options)


@pytest.mark.parametrize("what", ({}, dict(norm="layer", biases=True, pairs="half"), dict(tables=None)))
def test_one_tensor_under_compilers_checkpointing_and_forward_mode(what):
    primals, tangents, options = inputs(batch=3, length=5, rows=2, head_dim=16, kv_heads=0, **what)
    check_compiles("heads_alone", primals, tangents, fixed=(3, 4), **options)
    check_forward_mode("heads_alone", primals, (0,), **options)


@pytest.mark.parametrize("what", (dict(kv_heads=1, biases=True), dict(kv_heads=0, weights=False), dict(norm=None)))
def test_registered_operators(what):
    (qkv, *rest), (dot, *_), options = inputs(head_dim=16, **what)
    tensors = rest if what.get("kv_heads") != 0 else [rest[0], None, rest[1], None, *rest[2:]]
    kv_heads = what.get("kv_heads", 3)
    last = (kv_heads, 0, 1e-6, options["norm"], False, False)
    q, k, *_ = torch.ops.pmf.heads_forward(qkv, dot, *tensors, *last)
    utils, operators = ("test_schema", "test_faketensor"), torch.ops.pmf
    torch.library.opcheck(operators.heads_forward.default, (qkv, dot, *tensors, *last), test_utils=utils)
    d = (q, k, k) if kv_heads else (q, None, None)
    needs = [p is not None for p in tensors[:4]]
    torch.library.opcheck(operators.heads_backward.default, (qkv, *tensors, *d, *last, needs), test_utils=utils)


@pytest.mark.parametrize("trained", range(1, 5))
def test_single_parameters(trained):
    """Gradients of qkv and of one weight or bias; the others need none."""
    primals, tangents, options = inputs(kv_heads=1, biases=True, norm="layer")
    others = tuple(i for i in range(1, 7) if i != trained)
    check("packed_heads", primals, tangents, fixed=others, **options)


def test_v_is_a_view():
    """v of grouped heads and its tangent share the memory of qkv and its tangent."""
    (qkv, *rest), (dot, *_), options = inputs(kv_heads=1)
    _, _, (v, v_dot) = positional(Dual(qkv, dot), *rest, **options, impl="triton")
    assert torch.equal(v, qkv[:, :, 4:]) and torch.equal(v_dot, dot[:, :, 4:])
    assert v.untyped_storage().data_ptr() == qkv.untyped_storage().data_ptr()
    assert v_dot.untyped_storage().data_ptr() == dot.untyped_storage().data_ptr()


def test_too_many_heads_together():
    primals, _, options = inputs(kv_heads=0, heads=65, head_dim=128, across_heads=True, length=1)
    with pytest.raises(InputError, match=r"^norm_rope: across_heads takes up to 64 heads of 128 with impl=.*, got 65$"):
        positional_one(*primals, **options, impl="triton")
