"""`norm_modulate` and `residual_norm_modulate` in Triton against the float64 reference."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from pmf import dispatch, ops
from pmf.errors import InputError
from tests.kernels.checks import (
    DEVICE,
    check,
    check_compiles,
    check_forward_mode,
    generator,
    randn,
    strided,
)

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
LAYOUTS = ("absent", "channel", "sample", "token")
MODULATIONS = list(itertools.product(("absent", "channel"), LAYOUTS, LAYOUTS))
DTYPES = ((F32, F32, F32), (F32, BF16, F32), (BF16, BF16, F32), (F16, F16, F16), (BF16, BF16, BF16))
"""Dtypes of x, branch and parameters; the second row is a float32 stream under bfloat16 autocast."""
MODES = ("none", "partial", "full")
SHAPES = list(itertools.product((1, 17, 276), (64, 96, 768, 1280)))


def parameter(layout: str, x, gen, dtype, name: str):
    """A weight, gate, scale, shift or bias of x in one layout; per sample or token it is a slice of wider rows."""
    batch, *between, width = x.shape
    if layout == "absent":
        return None
    mean = 1.0 if name == "weight" else 0.0
    if layout == "channel":
        return randn(width, gen=gen, dtype=dtype, mean=mean)
    rows = {"sample": (), "one": (1,) * len(between), "token": between}[layout]
    return randn(batch, *rows, 3 * width, gen=gen, dtype=dtype, mean=mean)[..., width : 2 * width]


def inputs(residual, batch, length, width, layouts, mode, dtypes, seed):
    """Primals and tangents; layouts: gate, weight, scale, shift, bias; dtypes: x, branch, parameters.

    `length` may be a tuple: the sizes between batch and width.
    """
    gen = generator(seed, residual, batch, length, width, layouts, mode)
    stream, low, param = dtypes
    shape = (batch, *(length if isinstance(length, tuple) else (length,)), width)
    primals = [randn(*shape, gen=gen, dtype=stream, mean=0.3)]
    if residual:
        primals.append(randn(*shape, gen=gen, dtype=low))
    names = ("gate", "weight", "scale", "shift", "bias")[: len(layouts)]
    for name, layout in zip(names if residual else names[1:], layouts if residual else layouts[1:], strict=True):
        primals.append(parameter(layout, primals[0], gen, param, name))
    rows = {"none": 0, "partial": max(batch - 1, 1), "full": batch}[mode]
    weight = 3 if residual else 1
    tangents = [
        randn(rows, *p.shape[1:], gen=gen, dtype=p.dtype)
        if rows and p is not None and p.ndim > 1 and i != weight
        else None
        for i, p in enumerate(primals)
    ]
    return tuple(primals), tuple(tangents)


def op_of(residual: bool) -> str:
    return "residual_norm_modulate" if residual else "norm_modulate"


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "dtypes", ((F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16)), ids=("f32", "mixed", "bf16")
)
@pytest.mark.parametrize(("length", "width"), SHAPES)
def test_shapes(length, width, dtypes, mode, residual):
    """Every length and width in every dtype, with tangents of no, some and all samples; layouts vary with the case."""
    case = SHAPES.index((length, width)) + MODES.index(mode)
    layout, other = LAYOUTS[case % 3], LAYOUTS[(case + case // 3) % 3]
    layouts = ("channel" if layout == "absent" else layout, "channel", layout, other)
    primals, tangents = inputs(residual, 2 if length == 276 else 3, length, width, layouts, mode, dtypes, 0)
    autocast = BF16 if dtypes[:2] == (F32, BF16) else None
    check(op_of(residual), primals, tangents, kind=("rms", "layer")[case // 2 % 2], autocast=autocast)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("layout", MODULATIONS, ids="-".join)
def test_layouts(layout, kind, residual):
    """Weight, scale and shift absent, per channel, per sample and per token, in every combination."""
    gate = layout[1] if layout[2] == "sample" else layout[2]
    primals, tangents = inputs(residual, 3, 5, 24, (gate, *layout), "partial", (F32, F32, F32), kind)
    check(op_of(residual), primals, tangents, kind=kind)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize("weight", ("absent", "channel"))
@pytest.mark.parametrize(
    ("scale", "shift"), [("absent", "absent"), ("sample", "absent"), ("channel", "token"), ("token", "sample")]
)
def test_bias(scale, shift, weight, kind, residual):
    """A bias, as LayerNorm has one, beside modulations in every layout."""
    layouts = ("absent", weight, scale, shift, "channel")
    primals, tangents = inputs(residual, 3, 5, 24, layouts, "partial", (F32, F32, F32), kind)
    check(op_of(residual), primals, tangents, kind=kind)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("between", [(), (4, 3), (5,)], ids=("2d", "4d", "3d"))
@pytest.mark.parametrize("layout", ("one", "sample", "token", "channel"))
def test_two_to_four_dimensions(layout, between, residual):
    """x [B, C], [B, S, C] and [B, H, W, C], with modulations [B, 1, C] too."""
    layouts = (layout, "channel", layout, layout, "channel")
    primals, tangents = inputs(residual, 3, between, 24, layouts, "partial", (F32, BF16, F32), 0)
    check(op_of(residual), primals, tangents, kind="layer")


@pytest.mark.parametrize("dtypes", DTYPES)
@pytest.mark.parametrize(("length", "width"), [(1, 40), (33, 768), (276, 64)])
def test_tokens_in_every_dtype(length, width, dtypes):
    layouts = ("token", "channel", "token", "token")
    primals, tangents = inputs(True, 2, length, width, layouts, "partial", dtypes, 0)
    check("residual_norm_modulate", primals, tangents, kind="layer")


@pytest.mark.parametrize("dtype", (F32, BF16, F16))
def test_eps_none_is_that_of_rms_norm(dtype):
    """Of values so small that eps counts."""
    x = randn(3, 5, 24, gen=generator(0), dtype=dtype) / 2048
    norm = torch.nn.RMSNorm(24, eps=None, device=DEVICE)
    torch.testing.assert_close(ops.norm_modulate(x, eps=None, impl="triton"), norm(x))
    torch.testing.assert_close(ops.norm_modulate(x.double(), eps=None), norm(x.double()))


@pytest.mark.parametrize("layout", ("sample", "token"))
@pytest.mark.parametrize("residual", (False, True))
def test_each_tangent_alone(residual, layout):
    """A tangent of one input only: the others are zero, and absent parts of the result stay None."""
    layouts = (layout, "channel", layout, layout)
    primals, tangents = inputs(residual, 3, 5, 24, layouts, "partial", (F32, BF16, F32), 0)
    for i, tangent in enumerate(tangents):
        if tangent is not None:
            alone = tuple(t if i == j else None for j, t in enumerate(tangents))
            check(op_of(residual), primals, alone, kind="layer")


@pytest.mark.parametrize("layout", ("sample", "token"))
@pytest.mark.parametrize("residual", (False, True))
def test_views(residual, layout):
    """Inputs and tangents that are views with gaps."""
    layouts = (layout, "channel", layout, layout)
    primals, tangents = inputs(residual, 3, 17, 40, layouts, "partial", (F32, BF16, F32), 0)
    primals = tuple(strided(p) for p in primals)
    tangents = tuple(None if t is None else strided(t) for t in tangents)
    check(op_of(residual), primals, tangents)
    turned = tuple(p.mT.contiguous().mT if p.ndim == 3 else p for p in primals)
    check(op_of(residual), turned, tangents)


@pytest.mark.parametrize("residual", (False, True))
@pytest.mark.parametrize("layout", ("channel", "sample", "token"))
def test_views_of_every_other_channel(layout, residual):
    layouts = (layout, "channel", layout, layout)
    primals, tangents = inputs(residual, 3, 5, 24, layouts, "partial", (F32, BF16, F32), 0)
    spread = lambda x: None if x is None else torch.stack((x, torch.full_like(x, math.nan)), -1)[..., 0]  # noqa: E731
    check(op_of(residual), tuple(map(spread, primals)), tuple(map(spread, tangents)))


@settings(max_examples=12, deadline=None, derandomize=True)
@given(
    residual=st.booleans(),
    batch=st.integers(1, 3),
    length=st.integers(0, 140),
    width=st.integers(12, 130),
    kind=st.sampled_from(("rms", "layer")),
    gate=st.sampled_from(LAYOUTS),
    layout=st.sampled_from(MODULATIONS),
    mode=st.sampled_from(MODES),
    dtypes=st.sampled_from(DTYPES),
)
def test_any_shape(residual, batch, length, width, kind, gate, layout, mode, dtypes):
    primals, tangents = inputs(residual, batch, length, width, (gate, *layout), mode, dtypes, 1)
    check(op_of(residual), primals, tangents, kind=kind)


@pytest.mark.parametrize("layout", ("sample", "token"))
@pytest.mark.parametrize("residual", (False, True))
def test_compilers_and_checkpointing(residual, layout):
    layouts = (layout, "channel", layout, layout, "channel")
    primals, tangents = inputs(residual, 3, 5, 24, layouts, "partial", (F32, BF16, F32), 0)
    check_compiles(op_of(residual), primals, tangents)


def test_forward_mode():
    layouts = ("sample", "channel", "sample", "sample")
    primals, _ = inputs(True, 2, 5, 24, layouts, "none", (F32, F32, F32), 0)
    check_forward_mode("residual_norm_modulate", primals, (0, 1, 2, 4, 5), kind="layer")
    x, weight, scale, shift = inputs(False, 2, 5, 24, layouts, "none", (F32, F32, F32), 0)[0]
    check_forward_mode("norm_modulate", (x, weight, scale, shift), (0, 2, 3))
    with pytest.raises(RuntimeError, match="norm_modulate: weight takes no tangent"):
        torch.func.jvp(lambda w: ops.norm_modulate(x, w, impl="triton"), (weight,), (weight,))


def test_forward_mode_per_channel():
    """Forward mode, unlike the explicit dual op, may move a modulation per channel."""
    primals, _ = inputs(False, 2, 5, 24, ("channel",) * 4, "none", (F32, F32, F32), 0)
    x, weight, scale, shift = primals
    _, dot = torch.func.jvp(lambda s: ops.norm_modulate(x, weight, s, shift, impl="triton"), (scale,), (shift,))
    _, expected = torch.func.jvp(lambda s: ops.norm_modulate(x, weight, s, shift, impl="reference"), (scale,), (shift,))
    torch.testing.assert_close(dot, expected)


def test_one_over_the_root_is_rounded_to_nearest():
    """Bit for bit on every device: squares of few bits sum exactly, and root and division round as IEEE requires."""
    x = (1 + torch.arange(300.0)[None, :, None].expand(1, 300, 64)) / 32
    x = x.to(DEVICE)
    ops.norm_modulate(x, impl="triton")  # registers the operator
    stats = torch.ops.pmf.norm_forward(x, *(None,) * 10, False, 1e-6, F32)[4]
    root = (x.cpu()[0, :, 0].square() + 1e-6).double().sqrt().float()
    assert torch.equal(stats[0, :, 0].cpu(), (1 / root.double()).float())


def test_registered_operators():
    """Schemas and fake functions agree with the operators."""
    layouts = ("sample", "channel", "sample", "sample")
    primals, tangents = inputs(True, 3, 5, 24, layouts, "partial", (F32, BF16, F32), 0)
    dots = tuple(t for i, t in enumerate(tangents) if i != 3)
    ops.norm_modulate(primals[0], impl="triton")
    torch.library.opcheck(
        torch.ops.pmf.norm_forward.default,
        (*primals, *dots, True, 1e-6, BF16),
        test_utils=("test_schema", "test_faketensor"),
    )
    x_new, _, _, _, stats = torch.ops.pmf.norm_forward(*primals, *dots, True, 1e-6, BF16)
    torch.library.opcheck(
        torch.ops.pmf.norm_backward.default,
        (x_new, x_new, x_new, *primals[1:], stats, BF16, True, True, [True] * 4, True, True),
        test_utils=("test_schema", "test_faketensor"),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(x=torch.randn(2, 5, 8, dtype=torch.float64)), "dtype must be float32, bfloat16 or float16"),
        (
            dict(x=torch.randn(2, 5, 8).half(), weight=torch.ones(8).bfloat16()),
            "must not mix bfloat16 and float16",
        ),
        (dict(x=torch.randn(2, 5, 8200)), "width must be at most 8192 .* got 8200"),
        (dict(weight=torch.ones(7)), r"weight must have shape \[8\], got \[7\]"),
        (
            dict(shift=torch.ones(3, 8)),
            r"shift must have shape \[8\], \[2, 8\], \[2, 1, 8\] or \[2, 5, 8\], got \[3, 8\]",
        ),
        (dict(bias=torch.ones(2, 8)), r"bias must have shape \[8\], got \[2, 8\]"),
    ],
)
def test_bad_input(change, message):
    arguments = dict(x=torch.randn(2, 5, 8)) | change
    with pytest.raises(InputError, match=f"^norm_modulate: .*{message}"):
        ops.norm_modulate(**arguments, impl="triton")


def test_mismatched_lengths():
    with pytest.raises(InputError, match=r"^residual_norm_modulate: branch must have shape \[2, 5, 8\]"):
        ops.residual_norm_modulate(torch.ones(2, 5, 8), torch.ones(2, 4, 8), torch.ones(8), impl="triton")


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_cpu_outside_the_interpreter(monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET")
    dispatch.forget_choices()
    with pytest.raises(InputError, match=r'^norm_modulate: impl="triton" needs cuda tensors, got cpu'):
        ops.norm_modulate(torch.ones(2, 5, 8), impl="triton")
