"""`pmf.jvp` of other packages' norms, gates and rotations: stand-ins with their arguments, and the installed Liger."""

import inspect
import math

import pytest
import torch

import pmf
from pmf import InputError
from tests.kernels.checks import DEVICE
from tests.pmf.attention_packages import stand_in
from tests.pmf.jvp_checks import PARTITIONED, drawn
from tests.pmf.test_jvp_no_forward_mode import check

APEX, LIGER = "apex.normalization.fused_layer_norm", "liger_kernel.ops."
FLASH_NORM, MAMBA_NORM = "flash_attn.ops.triton.layer_norm", "mamba_ssm.ops.triton.layer_norm"
W, B = drawn(8, seed=20), drawn(8, seed=21)
X, ROW = (2, 3, 8), (2, 8)


def normalised(x, eps, centred=True):
    centre = x.mean(-1, keepdim=True) if centred else 0
    return (x - centre) / ((x - centre).square().mean(-1, keepdim=True) + eps).sqrt()


def gelu(x):
    return x / 2 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def function(name, module, names, compute):
    """A function of positional arguments that applies a stand-in; `compute` takes them too."""
    names = names.split()
    made = stand_in(name, module, names, lambda given: compute(*[given[name] for name in names]))
    return lambda *args: made.apply(*args)


def layer_norm(x, weight, bias, shape, eps, saving):
    return normalised(x, eps) * weight + bias


def residual_norm(x, weight, bias, residual, eps, prenorm, wide, rms):
    x = x if residual is None else x + residual
    out = normalised(x, eps, not rms) * weight + (0 if bias is None else bias)
    return (out, x) if prenorm else out


def modulated(x, weight, scale, shift, eps, offset, casting, in_place):
    rows = normalised(x, eps, centred=False) * (offset + (1 if weight is None else weight))
    return rows * (1 + scale[:, None]) + (0 if shift is None else shift[:, None])


def group_norm(x, weight, bias, channels, groups, eps):
    parts = normalised(x.reshape(len(x), groups, -1), eps).reshape(x.shape)
    return parts * weight[:, None] + bias[:, None]


def sum_and_norm(x, r, weight, eps, offset, casting, in_place):
    return normalised(x + r, eps, centred=False) * (weight + offset), x + r


apex_layer_norm = function(
    "FusedLayerNormAffineFunction", APEX, "input weight bias normalized_shape eps memory_efficient", layer_norm
)
apex_mixed_layer_norm = function(
    "FusedLayerNormAffineMixedDtypesFunction", APEX, "input weight bias normalized_shape eps memory_efficient",
    layer_norm,
)  # fmt: skip
apex_plain_layer_norm = function(
    "FusedLayerNormFunction", APEX, "input normalized_shape eps", lambda x, shape, eps: normalised(x, eps)
)
apex_rms_norm = function(
    "FusedRMSNormAffineFunction", APEX, "input weight normalized_shape eps memory_efficient",
    lambda x, weight, shape, eps, saving: normalised(x, eps, centred=False) * weight,
)  # fmt: skip
apex_plain_rms_norm = function(
    "FusedRMSNormFunction", APEX, "input normalized_shape eps", lambda x, shape, eps: normalised(x, eps, False)
)
mamba_norm = function(
    "LayerNormFn", MAMBA_NORM, "x weight bias residual eps prenorm residual_in_fp32 is_rms_norm", residual_norm
)
flash_norm = function(
    "LayerNormFn", FLASH_NORM,
    "x weight bias residual x1 weight1 bias1 eps dropout_p rowscale prenorm residual_in_fp32 zero_centered_weight "
    "is_rms_norm return_dropout_mask out_dtype out residual_out",
    lambda x, w, b, r, x1, w1, b1, eps, p, row, prenorm, wide, zero, rms, *others: residual_norm(
        x, w + zero, b, r, eps, prenorm, wide, rms
    ),
)  # fmt: skip
liger_rms_norm = function(
    "LigerRMSNormFunction", LIGER + "rms_norm", "X W eps offset casting_mode in_place row_mode",
    lambda x, w, eps, offset, *others: normalised(x, eps, centred=False) * (1 if w is None else w + offset),
)  # fmt: skip
liger_layer_norm = function(
    "LigerLayerNormFunction", LIGER + "layer_norm", "X W B eps", lambda x, w, b, eps: normalised(x, eps) * w + b
)
liger_modulated = function(
    "LigerModulatedRMSNormFunction", LIGER + "modulated_rms_norm",
    "X W scale shift eps offset casting_mode in_place", modulated,
)  # fmt: skip
liger_sum_and_norm = function(
    "LigerFusedAddRMSNormFunction", LIGER + "fused_add_rms_norm", "X R W eps offset casting_mode in_place", sum_and_norm
)
liger_group_norm = function(
    "LigerGroupNormFunction", LIGER + "group_norm",
    "X affine_scaling_weight affine_shifting_bias num_channels num_groups eps", group_norm,
)  # fmt: skip
liger_silu = function(
    "LigerSiLUMulFunction", LIGER + "swiglu", "a b gate_multiplier down_multiplier",
    lambda a, b, gate, down: (a * gate) * (a * gate).sigmoid() * b * down,
)  # fmt: skip
liger_gelu = function("LigerGELUMulFunction", LIGER + "geglu", "a b", lambda a, b: gelu(a) * b)
liger_relu = function("LigerReLUSquaredFunction", LIGER + "relu_squared", "X", lambda x: x.clamp(min=0) ** 2)
liger_dyt = function(
    "LigerDyTFunction", LIGER + "dyt", "x alpha gamma beta",
    lambda x, alpha, gamma, beta: torch.tanh(x * alpha) * gamma + (0 if beta is None else beta),
)  # fmt: skip
liger_softmax = function(
    "LigerSoftmaxFunction", LIGER + "softmax", "input_", lambda x: x.exp() / x.exp().sum(-1)[..., None]
)


CASES = {
    "apex layer": (lambda x: apex_layer_norm(x, W, B, W.shape, 1e-5, True), X),
    "apex layer, everything moves": (lambda x, w, b: apex_layer_norm(x, w, b, w.shape, 1e-5, False), X, (8,), (8,)),
    "apex layer, mixed": (lambda x: apex_mixed_layer_norm(x, W, B, W.shape, 1e-5, False), X),
    "apex layer, plain": (lambda x: apex_plain_layer_norm(x, W.shape, 1e-5), X),
    "apex rms": (lambda x: apex_rms_norm(x, W, W.shape, 1e-5, True), X),
    "apex rms, plain": (lambda x: apex_plain_rms_norm(x, W.shape, 1e-5), X),
    "mamba": (lambda x: mamba_norm(x, W, B, None, 1e-5, False, False, False), X),
    "mamba, the sum too": (lambda x, r: torch.cat(mamba_norm(x, W, None, r, 1e-5, True, True, True)), X, X),
    "flash": (lambda x: flash_norm(x, W, B, *[None] * 4, 1e-5, 0.0, None, *[False] * 5, *[None] * 3), X),
    "flash, centred weight": (
        lambda x, r: flash_norm(
            x, W, None, r, *[None] * 3, 1e-5, 0.0, None, False, True, True, True, False, torch.float64, None, None
        ),
        X, X,
    ),
    "flash, rms with bias": (
        lambda x: flash_norm(x, W, B, *[None] * 4, 1e-5, 0.0, None, False, False, False, True, False, *[None] * 3), X
    ),
    "liger rms": (lambda x: liger_rms_norm(x, W, 1e-5, 0.0, "llama", True, None), X),
    "liger rms, offset": (lambda x: liger_rms_norm(x, W, 1e-5, 1.0, "gemma", True, True), X),
    "liger rms without weight": (lambda x: liger_rms_norm(x, None, 1e-5, 0.0, "none", False, None), X),
    "liger layer": (lambda x: liger_layer_norm(x, W, B, 1e-5), X),
    "liger modulated": (lambda *x: liger_modulated(x[0], W, *x[1:], 1e-5, 1.0, "llama", True), X, ROW, ROW),
    "liger modulated, bare": (lambda *x: liger_modulated(x[0], None, x[1], None, 1e-5, 0.0, "llama", True), X, ROW),
    "liger sum": (lambda x, r: torch.cat(liger_sum_and_norm(x, r, W, 1e-5, 0.5, "llama", False)), X, X),
    "liger group": (lambda x: liger_group_norm(x, W, B, 8, 2, 1e-5), (2, 8, 5)),
    "liger silu": (lambda a, b: liger_silu(a, b, 1.0, 1.0), X, X),
    "liger silu, scaled": (lambda a, b: liger_silu(a, b, 0.5, 3.0), X, X),
    "liger gelu": (liger_gelu, X, X),
    "liger dyt": (liger_dyt, X, (1,), (8,), (8,)),
    "liger dyt without beta": (lambda x: liger_dyt(x, B[:1], W, None), X),
    "liger relu": (liger_relu, X),
    "liger softmax": (liger_softmax, X),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_formula(name):
    case, *shapes = CASES[name]
    check(
        case, [drawn(*s, seed=i) for i, s in enumerate(shapes)], [drawn(*s, seed=9 + i) for i, s in enumerate(shapes)]
    )


@pytest.mark.parametrize("still", [0, 1])
def test_a_part_that_stands_still(still):
    tangents = [None if i == still else drawn(*X, seed=9 + i) for i in range(2)]
    check(lambda x, r: torch.cat(liger_sum_and_norm(x, r, W, 1e-5, 0.0, "llama", False)), [drawn(*X)] * 2, tangents)


def test_half_precision_keeps_its_dtypes():
    """As float32, but for rounding; the mixed form gives the weight's dtype."""

    def check_norm(norm, dtype):
        weight, bias = W.to(dtype), B.to(dtype)
        out, dot = pmf.jvp(lambda x: norm(x, weight, bias, W.shape, 1e-5, False), (x,), (v,))
        assert out.dtype == dot.dtype == dtype
        torch.testing.assert_close(dot.double(), wanted, rtol=0.03, atol=0.03)

    x, v = drawn(*X).bfloat16(), drawn(*X, seed=1).bfloat16()
    wanted = pmf.jvp(lambda x: apex_layer_norm(x, W, B, W.shape, 1e-5, False), (x.double(),), (v.double(),))[1]
    check_norm(apex_layer_norm, torch.bfloat16)
    check_norm(apex_mixed_layer_norm, torch.float32)


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (lambda x: flash_norm(x, W, B, None, x, None, None, 1e-5, 0.0, None, *[False] * 5, *[None] * 3), "x1"),
        (lambda x: flash_norm(x, W, B, *[None] * 4, 1e-5, 0.1, None, *[False] * 5, *[None] * 3), "dropout_p"),
        (
            lambda x: flash_norm(x, W, B, *[None] * 4, 1e-5, 0.0, drawn(2, 3), *[False] * 5, *[None] * 3),
            f"{FLASH_NORM}.LayerNormFn got a moving value and rowscale; expected none of it",
        ),
    ],
)
def test_what_the_formula_lacks_is_named(call, named):
    with pytest.raises(InputError, match=named):
        pmf.jvp(call, (drawn(*X),), (1,))


def test_functions_of_these_names_elsewhere_are_refused():
    for name, module in (("LigerSoftmaxFunction", "mine"), ("LigerJSDFunction", LIGER + "jsd")):
        unknown = function(name, module, "x y", lambda x, y: x * y)
        with pytest.raises(InputError, match=rf"{module}\.{name} got a moving value; an autograd\.Function hides"):
            pmf.jvp(lambda x, apply=unknown: apply(x, x), (drawn(*X),), (1,))


class LigerRopeFunction(torch.autograd.Function):
    """Stands in for Liger's: it turns q and k where they lie, and does not say so."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        ctx.save_for_backward(cos, sin)
        for x in (q, k):
            a, b = x.chunk(2, -1)
            x.copy_(torch.cat([a * cos - b * sin, b * cos + a * sin], -1))
        return q.view_as(q), k.view_as(k)

    @staticmethod
    def backward(ctx, *grads):
        cos, sin = ctx.saved_tensors
        parts = [grad.chunk(2, -1) for grad in grads]
        return *[torch.cat([a * cos + b * sin, b * cos - a * sin], -1) for a, b in parts], None, None


LigerRopeFunction.__module__ = LIGER + "rope"


@pytest.mark.parametrize("still", [None, 0, 1])
def test_liger_s_rotation(still):
    angles = drawn(7, 4, seed=5)

    def turned(q, k):
        return torch.cat(LigerRopeFunction.apply(q.sin(), k.sin(), angles.cos(), angles.sin()), 1)

    tangents = [None if i == still else drawn(2, 4, 7, 8, seed=9 + i) for i in range(2)]
    check(turned, [drawn(2, 4, 7, 8, seed=i) for i in range(2)], tangents)


class FusedRMSNormAffineFunction(torch.autograd.Function):
    """Stands in for apex', in a form that compilers can trace."""

    @staticmethod
    def forward(ctx, input, weight, normalized_shape, eps, memory_efficient=False):
        rstd = (input.square().mean(-1, keepdim=True) + eps).rsqrt()
        ctx.save_for_backward(input, weight, rstd)
        return input * rstd * weight

    @staticmethod
    def backward(ctx, grad):
        x, weight, rstd = ctx.saved_tensors
        n, scaled = x * rstd, grad * weight
        dx = rstd * (scaled - n * (scaled * n).mean(-1, keepdim=True))
        return dx, (grad * n).sum((0, 1)), None, None, None


FusedRMSNormAffineFunction.__module__ = APEX


@pytest.mark.parametrize("where", ["whole call", "block"])
def test_formulas_compile(where):
    def network(x):
        return FusedRMSNormAffineFunction.apply(x.sin(), W, (8,), 1e-5, True).cos()

    torch._dynamo.reset()
    x, v = drawn(*X).requires_grad_(), drawn(*X, seed=1)
    expected = pmf.jvp(network, (x,), (v,))
    if where == "block":
        got = pmf.jvp(torch.compile(network, **PARTITIONED), (x,), (v,))
    else:
        got = torch.compile(lambda x: pmf.jvp(network, (x,), (v,)), **PARTITIONED)(x)
    grads = [torch.autograd.grad(out.sum(), x)[0] for out in (got[0], expected[0])]
    for a, b in zip((*got, grads[0]), (*expected, grads[1]), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.extras
def test_the_installed_liger_has_the_arguments_that_formulas_know():
    from pmf.tangents.formulas import FORMULAS, RENAMED, WITHOUT_EFFECT

    ops = pytest.importorskip("liger_kernel.ops")
    for name in [name for name in FORMULAS if name.startswith("Liger")]:
        made = getattr(ops, name)
        assert made.__module__.startswith(LIGER)
        known = [*inspect.signature(FORMULAS[name]).parameters, *WITHOUT_EFFECT.split()]
        names = list(inspect.signature(made.forward).parameters)[1:]
        assert {RENAMED.get(x, x) for x in names} <= set(known), name


@pytest.mark.extras
@pytest.mark.skipif(DEVICE == "cuda", reason="its kernels have no float64 that differences could be taken of")
def test_the_installed_liger():
    """Its kernels that Triton's interpreter can run, in float32, beside the stand-ins in float64."""
    ops = pytest.importorskip("liger_kernel.ops")
    angles = torch.cat([drawn(1, 7, 4, seed=5)] * 2, -1)
    cases = (
        (lambda x: ops.LigerSoftmaxFunction.apply(x), liger_softmax, X),
        (lambda x: ops.LigerReLUSquaredFunction.apply(x), liger_relu, X),
        (
            lambda x: ops.LigerRopeFunction.apply(x.sin(), x.cos(), angles.cos().to(x.dtype), angles.sin().to(x.dtype))[
                1
            ],
            lambda x: LigerRopeFunction.apply(x.sin(), x.cos(), angles[..., :4].cos(), angles[..., :4].sin())[1],
            (2, 4, 7, 8),
        ),
    )
    for theirs, ours, shape in cases:
        x, v = drawn(*shape), drawn(*shape, seed=1)
        for a, b in zip(pmf.jvp(theirs, (x.float(),), (v.float(),)), pmf.jvp(ours, (x,), (v,)), strict=True):
            torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-6)
