"""Ops with the product behind them (`linear`) in Triton against the float64 reference: backward makes y again."""

import itertools

import pytest
import torch

from pmf import Dual, ops
from pmf.counting import operations, saved_bytes
from pmf.errors import InputError
from tests.kernels.checks import DEVICE, check, check_compiles, check_forward_mode, close, generator, randn, strided
from tests.kernels.test_norm import LAYOUTS, inputs

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


def norm_linear(x, weight, scale, shift, matrix, vector, **options):
    """`norm_modulate` and a product; of Duals that stand still only the value counts for weights."""
    return ops.norm_modulate(x, weight, scale, shift, linear=(matrix, vector), **options)


def residual_norm_linear(x, branch, gate, weight, scale, shift, matrix, vector, **options):
    return ops.residual_norm_modulate(x, branch, gate, weight, scale, shift, linear=(matrix, vector), **options)


def swiglu_linear(x, matrix, vector, **options):
    return ops.swiglu(x, linear=(matrix, vector), **options)


def gelu_linear(x, matrix, vector, **options):
    return ops.gelu(x, linear=(matrix, vector), **options)


def with_weights(primals, tangents, width: int, features: int, dtype, bias: bool = True):
    """Primals and tangents with a weight and a bias behind them."""
    gen = generator(width, features, bias)
    weights = randn(features, width, gen=gen, dtype=dtype) / width**0.5, randn(features, gen=gen, dtype=dtype)
    return (*primals, weights[0], weights[1] if bias else None), (*tangents, None, None)


def products_of(primals) -> tuple[int, ...]:
    """The places of the gradients that a product gives, or that follow one: PyTorch orders its sums."""
    return tuple(range(sum(p is not None for p in primals)))


def check_norm(residual, length, width, layouts, mode, dtypes, **options):
    primals, tangents = inputs(residual, 3, length, width, layouts, mode, dtypes, "linear")
    primals, tangents = with_weights(primals, tangents, width, 40, dtypes[2])
    autocast = BF16 if dtypes[:2] == (F32, BF16) else None
    op = residual_norm_linear if residual else norm_linear
    check(op, primals, tangents, autocast=autocast, products=products_of(primals), **options)


@pytest.mark.parametrize("add", (None, False, True), ids=("alone", "sum", "terms"))
@pytest.mark.parametrize(
    "dtypes", ((F32, F32, F32), (F32, BF16, F32), (BF16, BF16, BF16)), ids=("f32", "mixed", "bf16")
)
@pytest.mark.parametrize(("length", "width"), [(1, 64), (17, 96), (276, 64), (17, 1280)])
def test_norms(length, width, dtypes, add):
    case = length + width + dtypes.count(BF16)
    layouts = (LAYOUTS[case % 4], "channel", LAYOUTS[case % 3], LAYOUTS[(case + 1) % 4])
    options = {} if add is None else {"recompute_sum": add}
    kind, mode = ("rms", "layer")[case % 2], ("none", "partial", "full")[case % 3]
    check_norm(add is not None, length, width, layouts, mode, dtypes, kind=kind, **options)


@pytest.mark.parametrize("kind", ("rms", "layer"))
@pytest.mark.parametrize(
    "layouts", list(itertools.product(LAYOUTS, ("absent", "channel"), LAYOUTS, LAYOUTS)), ids="-".join
)
def test_layouts(layouts, kind):
    """Gate, weight, scale and shift in every layout: y is made again of all of them, and of x and branch."""
    check_norm(True, 5, 24, layouts, "partial", (F32, F32, F32), kind=kind, recompute_sum=True)


@pytest.mark.parametrize("add", (False, True), ids=("sum", "terms"))
@pytest.mark.parametrize("between", [(), (4, 3)], ids=("2d", "4d"))
def test_norms_of_other_dimensions(between, add):
    layouts = ("sample", "channel", "sample", "sample")
    check_norm(True, between, 24, layouts, "partial", (F32, BF16, F32), kind="layer", recompute_sum=add)


@pytest.mark.parametrize("op", (swiglu_linear, gelu_linear))
@pytest.mark.parametrize("dtype", (F32, BF16, F16), ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 40), (17, 171), (276, 64), (17, 2736)])
@pytest.mark.parametrize("bias", (False, True))
def test_functions_of_mlps(bias, length, width, dtype, op):
    gen, wide = generator(length, width), width * (2 if op is swiglu_linear else 1)
    x, x_dot = (randn(rows, length, wide, gen=gen, dtype=dtype) for rows in (3, 2))
    primals, tangents = with_weights((x,), (x_dot,), width, 24, dtype, bias)
    for approximate in ({}, {"approximate": "tanh"}) if op is gelu_linear else ({},):
        check(op, primals, tangents, products=products_of(primals), **approximate)
        check(op, (strided(x), *primals[1:]), tangents, products=products_of(primals), **approximate)


@pytest.mark.parametrize("op", (norm_linear, residual_norm_linear, swiglu_linear, gelu_linear))
def test_compilers_checkpointing_and_forward_mode(op):
    layouts = ("sample", "channel", "sample", "sample")
    if op in (norm_linear, residual_norm_linear):
        primals, tangents = inputs(op is residual_norm_linear, 3, 5, 24, layouts, "partial", (F32, BF16, F32), 0)
    else:
        gen = generator(0)
        primals, tangents = (randn(3, 5, 48, gen=gen, dtype=BF16),), (randn(2, 5, 48, gen=gen, dtype=BF16),)
    width = primals[0].shape[-1] // (2 if op is swiglu_linear else 1)
    primals, tangents = with_weights(primals, tangents, width, 16, primals[0].dtype)
    moving = tuple(i for i, t in enumerate(tangents) if t is not None)
    check_compiles(op, primals, tangents)
    check_forward_mode(op, primals, moving)


@pytest.mark.parametrize("add", (None, False, True), ids=("alone", "sum", "terms"))
def test_what_the_norm_keeps(add):
    """x, the statistics and, if the sum is made again, the branch; never y."""
    x, branch = (torch.randn(4, 32, 64, device=DEVICE, requires_grad=True) for _ in range(2))
    matrix = torch.randn(8, 64, device=DEVICE, requires_grad=True)
    size, stats = 4 * x.numel(), 4 * 4 * 32

    def run():
        if add is None:
            return norm_linear(x, None, None, None, matrix, None, impl="triton")
        return residual_norm_linear(
            x, branch, None, None, None, None, matrix, None, impl="triton", recompute_sum=add
        )  # fmt: skip

    assert saved_bytes(run, [matrix]) == {None: size, False: size, True: 2 * size}[add] + stats


@pytest.mark.parametrize("op", (swiglu_linear, gelu_linear))
def test_what_functions_of_mlps_keep(op):
    x = torch.randn(4, 32, 64, device=DEVICE, requires_grad=True)
    width = 32 if op is swiglu_linear else 64
    matrix = torch.randn(8, width, device=DEVICE, requires_grad=True)
    assert saved_bytes(lambda: op(x, matrix, None, impl="triton"), [matrix]) == 4 * x.numel()


def test_no_operation_is_added_and_none_without_need():
    """A frozen weight has no gradient, and its product's input is not made again."""
    x = torch.randn(4, 32, 64, device=DEVICE, requires_grad=True)
    matrix = torch.randn(8, 64, device=DEVICE)
    product = 2 * x[..., 0].numel() * matrix.numel()
    for trained, products in ((True, 3), (False, 2)):
        matrix.requires_grad_(trained)
        found = operations(lambda: norm_linear(x, None, None, None, matrix, None, impl="triton").sum().backward())
        assert found == products * product


def test_an_unused_output_has_no_gradient():
    x, branch = (torch.randn(2, 5, 24, device=DEVICE, requires_grad=True) for _ in range(2))
    matrix = torch.randn(8, 24, device=DEVICE, requires_grad=True)
    x_new, _ = residual_norm_linear(x, branch, None, None, None, None, matrix, None, impl="triton")
    dx, dbranch, dmatrix = torch.autograd.grad(x_new.sum(), [x, branch, matrix], allow_unused=True)
    close((dx, dbranch), (torch.ones_like(x), torch.ones_like(x)))
    assert dmatrix is None or not dmatrix.any()


def test_second_derivatives_are_refused():
    x = torch.randn(2, 5, 24, device=DEVICE, requires_grad=True)
    matrix = torch.randn(8, 24, device=DEVICE, requires_grad=True)
    y = norm_linear(x, None, None, None, matrix, None, impl="triton")
    (dx,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="norm_modulate: kernels have no second derivatives"):
        dx.sum().backward()


@pytest.mark.parametrize(
    ("linear", "message"),
    [
        ((torch.ones(8, 7), None), r"linear's weight must have shape \[any, 24\], got \[8, 7\]"),
        ((torch.ones(8, 24), torch.ones(7)), r"linear's bias must have shape \[8\], got \[7\]"),
        (torch.ones(8, 24), r"^\w+: linear must be a pair \(weight, bias\), got Tensor"),
        ((torch.ones(8, 24),) * 3, r"^\w+: linear must be a pair \(weight, bias\), got 3 values"),
        (
            (torch.ones(8, 24).half(), None),
            r"linear's weight must have the result's dtype torch.float32, got torch.float16",
        ),
        ((None, None), r"linear's weight must be a floating tensor, got None"),
        ((torch.ones(8, 24, dtype=torch.int64), None), r"linear's weight"),
    ],
)
@pytest.mark.parametrize("impl", ("triton", "reference"))
def test_bad_weights(linear, message, impl):
    x = torch.ones(2, 5, 24, device=DEVICE)
    if isinstance(linear, tuple):
        linear = tuple(part if part is None else part.to(DEVICE) for part in linear)
    for run in (ops.norm_modulate, ops.gelu, lambda x, **k: ops.swiglu(torch.cat([x, x], -1), **k)):
        with pytest.raises(InputError, match=message):
            run(x, linear=linear, impl=impl)


def test_pairs_and_tensors():
    """A tensor gives a tensor, a pair a Dual, of the same product."""
    x, matrix = torch.randn(2, 5, 24, device=DEVICE), torch.randn(8, 24, device=DEVICE)
    for impl in ("triton", "reference"):
        plain = ops.norm_modulate(x, linear=(matrix, None), impl=impl)
        dual = ops.norm_modulate((x, x), linear=(matrix, None), impl=impl)
        assert isinstance(dual, Dual) and dual.dot.shape == plain.shape == (2, 5, 8)
        torch.testing.assert_close(dual.value, plain, rtol=0, atol=0)
