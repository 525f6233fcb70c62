import logging
import math
import re

import numpy as np
import pytest
import torch

from pmf import Dual, InputError, dispatch, ops

x = torch.randn(2, 5, 8)
qkv = torch.randn(2, 5, 3, 2, 8)
heads, angles = qkv[:, :, 0], torch.randn(5, 4)
one, meta = torch.ones(8), torch.empty(2, 5, 8, device="meta")
images, grouped = torch.randn(2, 1, 8, 8), qkv.flatten(2, 3)
NUMBERS = [
    *((f"patchify: patch_size must be an integer of at least 1, got {v!r}", lambda v=v: ops.patchify(images, v))
      for v in (0, -2, "2", 2.0, None, True)),
    ("patchify: images must have sides that are multiples of the patch size 3, got 8 x 8",
     lambda: ops.patchify(images, 3)),
    ("patchify: images must be a tensor [B, c, H, W], got [1, 8, 8]", lambda: ops.patchify(images[0], 2)),
    ("patchify: images must be a tensor [B, c, H, W], got list", lambda: ops.patchify([images], 2)),
    ("unpatchify: tokens must be a tensor [B, N, p * p * c], got [8]", lambda: ops.unpatchify(x[0, 0], 2, 1)),
    *((f"unpatchify: tokens must be as many as a square grid has, got {n}",
       lambda n=n: ops.unpatchify(torch.randn(2, n, 4), 2, 1)) for n in (15, 0)),
    ("unpatchify: tokens must have 4 values for patch_size 2 and channels 1, got 5",
     lambda: ops.unpatchify(torch.randn(2, 16, 5), 2, 1)),
    ("unpatchify: channels must be an integer of at least 1, got '1'",
     lambda: ops.unpatchify(torch.randn(2, 16, 4), 2, "1")),
    *((f"rope_tables: grid_size must be an integer of at least 1, got {v!r}", lambda v=v: ops.rope_tables(v, 8))
      for v in ("4", -1, 4.0)),
    *((f"rope_tables: head_dim must be a multiple of 4 (pairs for rows and columns), got {v}",
       lambda v=v: ops.rope_tables(4, v)) for v in (6, 2)),
    ("rope_tables: theta must be positive, got 0", lambda: ops.rope_tables(4, 8, theta=0)),
    *((f"attention: scale must be a finite number, got {v!r}", lambda v=v: ops.attention(heads, heads, heads, scale=v))
      for v in ("1", math.nan, math.inf, torch.ones(1))),
    *((f"attention: {name} must be True or False, got {v!r}",
       lambda name=name, v=v: ops.attention(heads, heads, heads, **{name: v}))
      for name, v in (("causal", "no"), ("causal", None), ("enable_gqa", 1))),
    ("attention: q must have at least one channel in each head, got 0",
     lambda: ops.attention(*[heads[..., :0]] * 3)),
    *((f"norm_modulate: eps must be a finite number of at least 0, got {v!r}", lambda v=v: ops.norm_modulate(x, eps=v))
      for v in ("1", -1.0, math.nan, [1])),
    ("residual_norm_modulate: recompute_sum must be True or False, got 'no'",
     lambda: ops.residual_norm_modulate(x, x, recompute_sum="no")),
    ("norm_rope: eps must be a finite number of at least 0, got '1'", lambda: ops.norm_rope(heads, eps="1")),
    ("norm_rope: across_heads must be True or False, got 1", lambda: ops.norm_rope(heads, across_heads=1)),
    *((f"qk_norm_rope: num_kv_heads must be an integer of at least 1, got {v!r}",
       lambda v=v: ops.qk_norm_rope(grouped, num_kv_heads=v)) for v in ("2", 2.0, 0)),
    *((f"qk_norm_rope: prefix_length must be an integer of at least 0, got {v!r}",
       lambda v=v: ops.qk_norm_rope(qkv, prefix_length=v)) for v in (None, -1)),
    *((f"scalar_features: features must be an integer of at least 2, got {v!r}",
       lambda v=v: ops.scalar_features(one, v)) for v in ("8", 0)),
    ("scalar_features: features must be even and positive, got 7", lambda: ops.scalar_features(one, 7)),
    ("scalar_features: max_period must be positive, got -1", lambda: ops.scalar_features(one, 8, max_period=-1)),
    ("scalar_features: shift must not be features / 2, got 1", lambda: ops.scalar_features(one, 2, shift=1)),
]  # fmt: skip


@pytest.mark.parametrize(("message", "call"), NUMBERS, ids=range(len(NUMBERS)))
def test_numbers_and_flags_are_checked(message, call):
    with pytest.raises(InputError, match=f"^{re.escape(message)}$"):
        call()


@pytest.mark.parametrize("impl", ["reference", "triton"])
def test_numbers_of_numpy_are_taken(impl):
    two = np.int64(2)
    assert torch.equal(ops.norm_modulate(x, eps=np.float32(0.5), impl=impl), ops.norm_modulate(x, eps=0.5, impl=impl))
    given = ops.attention(heads, heads, heads, scale=np.float32(0.5), impl=impl)
    assert torch.equal(given, ops.attention(heads, heads, heads, scale=0.5, impl=impl))
    given = ops.qk_norm_rope(grouped, num_kv_heads=two, impl=impl)
    assert all(map(torch.equal, given, ops.qk_norm_rope(grouped, num_kv_heads=2, impl=impl)))
    given = ops.attention(heads, heads, heads, causal=np.bool_(True), impl=impl)
    assert torch.equal(given, ops.attention(heads, heads, heads, causal=True, impl=impl))
    assert torch.equal(ops.unpatchify(ops.patchify(images, two), two, np.int64(1)), images)


@pytest.mark.parametrize("dynamic", [None, True])
def test_numbers_may_be_symbols_of_a_compiler(dynamic):
    def run(x, eps, groups, prefix):
        y = ops.norm_modulate(x.flatten(2), eps=eps)
        return y, *ops.qk_norm_rope(x, num_kv_heads=groups, prefix_length=prefix, eps=eps)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="eager", dynamic=dynamic)
    for given in ((grouped, 1e-6, 1, 0), (grouped, 1e-3, 2, 1), (grouped, 0.5, 2, 3)):
        assert all(map(torch.allclose, compiled(*given), run(*given)))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: ops.norm_modulate(x[0, 0]),
            r"norm_modulate: x must have shape \[any, any\], \[any, any, any\] or \[any, any, any, any\], got \[8\]",
        ),
        (
            lambda: ops.norm_modulate(x, torch.ones(7)),
            r"norm_modulate: weight must have shape \[8\], got \[7\]",
        ),
        (
            lambda: ops.norm_modulate(x, scale=torch.ones(3, 8)),
            r"scale must have shape \[8\], \[2, 8\], \[2, 1, 8\] or \[2, 5, 8\], got \[3, 8\]",
        ),
        (lambda: ops.norm_modulate(x, kind="batch"), 'kind must be "rms" or "layer", got \'batch\''),
        (lambda: ops.residual_norm_modulate(x, x[:1], torch.ones(8)), r"branch must have shape \[2, 5, 8\]"),
        (
            lambda: ops.norm_modulate(Dual(x, x), (torch.ones(8), torch.ones(8))),
            "norm_modulate: weight takes no tangent, got a pair; expected a tensor",
        ),
        (
            lambda: ops.norm_modulate(Dual(x, x), None, (None, torch.ones(2, 8))),
            "norm_modulate: scale is absent, so its tangent must be None",
        ),
        (
            lambda: ops.norm_modulate((x, x, x)),
            r"norm_modulate: x must be a tensor or a pair \(value, tangent\), got 3 values",
        ),
        (
            lambda: ops.norm_modulate(x, scale=(torch.ones(8), torch.ones(8))),
            r"norm_modulate: scale per channel takes no tangent; expand it to \[B, C\]",
        ),
        (
            lambda: ops.swiglu((x, torch.randn(3, 5, 8))),
            "x's tangent must have at most 2 samples, got 3",
        ),
        (lambda: ops.swiglu(x[..., :7]), "swiglu: x must have an even last dimension, got 7"),
        (
            lambda: ops.qk_norm_rope(qkv, torch.ones(8), torch.ones(8), angles, angles, prefix_length=1),
            r"qk_norm_rope: cos must have shape \[4, 4\] or \[2, 4, 4\], got \[5, 4\]: \[N, D / 2\] or \[B, N, D / 2\]",
        ),
        (
            lambda: ops.qk_norm_rope(qkv, torch.ones(8), torch.ones(8), angles, angles, prefix_length=6),
            r"prefix_length must lie in \[0, 5\], got 6",
        ),
        (
            lambda: ops.norm_rope(heads, None, angles.repeat(1, 2), angles),
            r"cos must have shape \[5, 4\] or \[2, 5, 4\], got \[5, 8\].* repeated to D, pass cos\[\.\.\., ::2\]",
        ),
        (
            lambda: ops.norm_rope(heads, None, angles, angles.repeat(1, 2), pairs="half"),
            r"sin must have shape .*, got \[5, 8\].* repeated to D, pass cos\[\.\.\., : D // 2\]",
        ),
        (
            lambda: ops.norm_rope(heads.transpose(1, 2), None, angles, angles),
            r"cos must have shape \[2, 4\] .*; is x \[B, H, S, D\]\? It must be \[B, S, H, D\]: transpose\(1, 2\)",
        ),
        (lambda: ops.norm_rope(heads, None, angles), "norm_rope: sin must be given with the other table, got None"),
        (lambda: ops.norm_rope(heads, None, angles, angles.expand(2, 5, 4)), r"sin must have shape \[5, 4\], got"),
        (lambda: ops.norm_rope(heads[0]), r"norm_rope: x must have shape \[any, any, any, any\], got \[5, 2, 8\]"),
        (lambda: ops.norm_rope(heads[..., :7], None, angles, angles), "norm_rope: head_dim must be even, got 7"),
        (lambda: ops.norm_rope(heads, norm=None), "norm_rope: there is nothing to do: norm, cos and sin are None"),
        (lambda: ops.norm_rope(heads, norm="batch"), 'norm_rope: norm must be "rms", "layer" or None, got \'batch\''),
        (lambda: ops.norm_rope(heads, pairs="even"), 'norm_rope: pairs must be "adjacent" or "half", got \'even\''),
        (
            lambda: ops.norm_rope(heads, one, angles, angles, norm=None),
            r"norm_rope: weight must be None with norm=None, got \[8\]",
        ),
        (
            lambda: ops.norm_rope(heads, bias=torch.ones(16)),
            r"norm_rope: bias must have shape \[8\], got \[16\], across_heads=False: \[D\]",
        ),
        (
            lambda: ops.qk_norm_rope(qkv, one, across_heads=True),
            r"q_weight must have shape \[16\], got \[8\], across_heads=True: \[H D\]",
        ),
        (
            lambda: ops.qk_norm_rope(heads),
            r"qkv must have shape \[any, any, 3, any, any\], got .*: \[B, S, 3, H, D\]; with num_kv_heads = G",
        ),
        (
            lambda: ops.qk_norm_rope(qkv, num_kv_heads=2),
            r"qkv must have shape \[any, any, any, any\], got .*num_kv_heads",
        ),
        (
            lambda: ops.qk_norm_rope(qkv.flatten(2, 3), num_kv_heads=3),
            r"num_kv_heads must lie in \[1, 2\] for 6 heads H \+ 2 G, G <= H, got 3",
        ),
        (
            lambda: ops.attention(qkv[:, :, 0], qkv[:, :, 1, :1], qkv[:, :, 2]),
            r"attention: k must have shape \[2, any, 2, 8\], got \[2, 5, 1, 8\]",
        ),
        (
            lambda: ops.attention(qkv[:, :, 0], qkv[:, :, 1].half(), qkv[:, :, 2]),
            r"attention: q, k, v and their tangents must have one dtype, got .*float32, .*float16, .*float32",
        ),
        (
            lambda: ops.attention(qkv[:, :, 0], Dual(qkv[:, :, 1], qkv[:, :, 1].double()), qkv[:, :, 2]),
            r"attention: q, k, v and their tangents must have one dtype, got .*float64",
        ),
        (
            lambda: ops.patch_embed(
                torch.randn(2, 3, 9, 8),
                torch.randn(4, 3, 4, 4),
                torch.randn(4),
                torch.randn(8, 4, 1, 1),
                torch.randn(8),
                torch.randn(4, 8),
            ),
            "images must have sides that are multiples of the patch size 4, got 9 x 8",
        ),
        (
            lambda: ops.patch_embed(torch.randn(2, 3, 8, 8), None, one, one, one, x),
            "patch_embed: weight1 must be a floating tensor, got None",
        ),
        (
            lambda: ops.patch_embed(torch.randn(2, 3, 8, 8), torch.randn(4, 3, 4, 4), torch.randn(4), one, one, x),
            r"patch_embed: weight2 must have shape \[any, 4, 1, 1\], got \[8\]",
        ),
        (lambda: ops.scalar_features(None), "scalar_features: s must be a floating tensor, got None"),
        (lambda: ops.scalar_features(x), r"scalar_features: s must have shape \[any\], got \[2, 5, 8\]"),
        (lambda: ops.silu(None), "silu: x must be a floating tensor, got None"),
    ],
)
def test_bad_input_is_one_line_that_names_the_argument(call, message):
    with pytest.raises(InputError, match=message) as error:
        call()
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("impl", dispatch.IMPLEMENTATIONS)
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda **o: ops.swiglu(x.long(), **o), "swiglu: x must be a floating tensor, got torch.int64"),
        (lambda **o: ops.swiglu(None, **o), "swiglu: x must be a floating tensor, got None"),
        (
            lambda **o: ops.norm_modulate(x, one.int(), **o),
            "norm_modulate: weight must be a floating tensor, got torch.int32",
        ),
        (
            lambda **o: ops.norm_modulate(x, one.to("meta"), **o),
            "norm_modulate: weight must be on cpu, got meta",
        ),
        (
            lambda **o: ops.residual_norm_modulate(x, None, one, **o),
            "residual_norm_modulate: branch must be a floating tensor, got None",
        ),
        (
            lambda **o: ops.norm_modulate((x, x.int()), one, **o),
            "norm_modulate: x's tangent must be a floating tensor, got torch.int32",
        ),
        (
            lambda **o: ops.norm_modulate((x, one[0]), one, **o),
            r"norm_modulate: x's tangent must have shape \[any, 5, 8\], got \[\]",
        ),
        (
            lambda **o: ops.residual_norm_modulate(Dual(x, x), Dual(x, meta), one, **o),
            "residual_norm_modulate: branch's tangent must be on cpu, got meta",
        ),
    ],
)
def test_tensors_are_floating_and_on_one_device(call, message, impl):
    with pytest.raises(InputError, match=f"^{message}$"):
        call(impl=impl)


def test_tangents_count_among_the_dtypes_of_a_kernel():
    pytest.importorskip("triton")
    with pytest.raises(InputError, match=r"^swiglu: dtypes must not mix bfloat16 and float16, got both$"):
        ops.swiglu((x.half(), x.bfloat16()), impl="triton")
    with pytest.raises(InputError, match=r"^swiglu: dtype must be float32, .* got torch.float64$"):
        ops.swiglu((x, x.double()), impl="triton")


@pytest.mark.parametrize("impl", ["reference", "triton"])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(z=torch.ones(2, 3, 10, 10), x=torch.ones(2, 3, 10, 10)), "multiples of the patch size 4, got 10 x 10"),
        (dict(patch_size=0), "pmf_objective: patch_size must be an integer of at least 1, got 0"),
        (dict(patch_size="2"), "pmf_objective: patch_size must be an integer of at least 1, got '2'"),
        (dict(t_clip=-1.0), "pmf_objective: t_clip must be a finite number of at least 0, got -1.0"),
        (dict(null_index=torch.tensor([0, 9])), "null_index must be below net_n's 2 rows"),
        (dict(null_index=torch.zeros(2, dtype=torch.int64, device="meta")), "null_index must be on cpu, got meta"),
        (dict(null_index=torch.zeros(2)), "null_index must be int64, got torch.float32"),
        (dict(null_index=[0, 1]), r"null_index must be int64, got \[0, 1\]"),
        (dict(net_c=torch.ones(3, 4, 48), net_u_dot=torch.ones(3, 4, 48)), "net_c must have at most 2 rows"),
        (dict(net_n=torch.ones(2, 4, 48, dtype=torch.int32)), "net_n must be a floating tensor, got torch.int32"),
    ],
)
def test_the_objective_refuses_what_it_cannot_read(impl, change, message):
    net, image, scalar = torch.ones(2, 4, 48), torch.ones(2, 3, 8, 8), torch.ones(2)
    good = dict(net_u=net, net_v=net, net_u_dot=net, net_c=net, net_n=net, z=image, x=image)
    good |= dict(t=scalar, h=scalar, guidance=scalar, null_index=torch.tensor([0, 1]))
    with pytest.raises(InputError, match=message):
        ops.pmf_objective(**(dict(patch_size=4) | good | change), impl=impl)
    fields = {name: value for name, value in (dict(patch_size=4, t_clip=0.05) | good | change).items() if name != "h"}
    with pytest.raises(InputError, match=message.replace("pmf_objective:", "pmf_objective_fields:")):
        ops.pmf_objective_fields(**fields)


def test_an_op_without_a_kernel_runs_on_the_reference(monkeypatch):
    monkeypatch.delitem(pytest.importorskip("pmf.kernels.library").LIMITS, "swiglu")
    reason = 'impl="triton" has no kernel for it'
    assert dispatch.decide("swiglu", "auto", "cuda", (torch.float32,)) == ("reference", reason)
    with pytest.raises(InputError, match=f"^swiglu: {reason}$"):
        dispatch.decide("swiglu", "triton", "cuda")


def test_impl_is_checked_by_name_and_source(monkeypatch):
    with pytest.raises(InputError, match=r"impl: expected one of .*, got 'cuda'"):
        ops.swiglu(x, impl="cuda")
    monkeypatch.setenv("PMF_IMPL", "fast")
    with pytest.raises(InputError, match=r"PMF_IMPL: expected one of .*, got 'fast'"):
        ops.swiglu(x)


def test_the_choice_is_reported_once(caplog):
    dispatch.forget_choices()
    with caplog.at_level(logging.INFO, logger="pmf"):
        ops.swiglu(x, impl="reference")
        ops.swiglu(x, impl="reference")
    assert [r.getMessage() for r in caplog.records] == ["swiglu runs on reference: requested"]


def test_results_are_duals_where_any_input_is_one():
    scale = torch.randn(2, 8)
    y = ops.norm_modulate(x, None, scale)
    assert isinstance(y, torch.Tensor)
    for arguments in ((Dual(x), None, scale), ((x, None), None, scale), (x, None, Dual(scale))):
        dual = ops.norm_modulate(*arguments)
        assert isinstance(dual, Dual) and torch.equal(dual.value, y) and dual.dot is None
    moved = ops.norm_modulate(x, None, (scale, scale[1:]))
    assert torch.equal(moved.value, y) and moved.dot.shape == (1, 5, 8)
    assert all(isinstance(part, Dual) for part in ops.residual_norm_modulate(x, (x, x), one))
