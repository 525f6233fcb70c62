"""Products in autocast's dtype whose sums stay in float32, and their effect on samples."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import pmf
from pmf import Dual
from pmf.layers import Linear, WideLinear
from pmf.wide import wide_linear
from tests.networks import TINY, random_model

BF16 = torch.bfloat16


def operands(rows=(3, 5), inner=16, outer=7, dtype=torch.float32):
    torch.manual_seed(0)
    x = torch.randn(*rows, inner, dtype=dtype, requires_grad=True)
    return x, torch.randn(outer, inner, dtype=dtype, requires_grad=True)


@pytest.mark.parametrize("rows", [(3, 5), (4,), (0,), (2, 0, 3), ()])
def test_operands_are_rounded_and_the_sum_is_not(rows):
    x, weight = operands(rows)
    with torch.autocast("cpu", BF16):
        y = wide_linear(x, weight)
    assert torch.equal(y, wide_linear(x.to(BF16), weight.to(BF16)))  # operands in low precision already
    exact = x.to(BF16).double() @ weight.to(BF16).double().T
    assert y.dtype == torch.float32 and y.shape == (*rows, 7)
    assert torch.allclose(y.double(), exact, rtol=0, atol=16 * 2**-24 * 16)  # 16 terms of at most about 16
    dy = torch.randn_like(y)
    y.backward(dy)
    low = dy.to(BF16).double().reshape(-1, 7)
    dx, dweight = low @ weight.to(BF16).double(), low.T @ x.to(BF16).double().reshape(-1, 16)
    for got, truth in ((x.grad, dx.view(x.shape)), (weight.grad, dweight)):
        assert got.dtype == torch.float32
        assert ((got - truth).abs() <= 2**-8 * truth.abs() + 1e-5).all()  # a rounding step of autocast's dtype


def test_float64_operands_are_multiplied_exactly_with_any_strides():
    x, weight = operands((6, 5), dtype=torch.float64)
    assert torch.autograd.gradcheck(wide_linear, (x, weight))
    cut, w = x.detach()[:, 2:], weight.detach()
    assert torch.allclose(wide_linear(cut, w), cut @ w.T, rtol=1e-14)


def test_operands_of_two_dtypes_are_refused_as_by_a_linear():
    x, weight = (v.detach() for v in operands())
    for pair in ((x.to(BF16), weight), (x, weight.to(BF16))):
        with pytest.raises(RuntimeError, match="same dtype"):
            wide_linear(*pair)


def test_without_a_bias_it_is_the_product():
    x, _ = operands()
    layer = WideLinear(16, 7)
    assert torch.equal(layer(x), wide_linear(x, layer.weight))


def test_forward_mode_gives_the_tangent_under_autocast():
    x, weight = (v.detach() for v in operands())
    x_dot = torch.randn_like(x)
    with torch.autocast("cpu", BF16):
        y, y_dot = torch.func.jvp(lambda v: wide_linear(v, weight), (x,), (x_dot,))
        assert torch.equal(y, wide_linear(x, weight))
        assert torch.allclose(y_dot, wide_linear(x_dot, weight), rtol=0, atol=1e-5)


def test_it_compiles_whole():
    x, weight = operands()
    run = torch.compile(lambda *v: wide_linear(*v).square().sum(), fullgraph=True, backend="aot_eager")
    with torch.autocast("cpu", BF16):
        compiled = torch.autograd.grad(run(x, weight), (x, weight))
        eager = torch.autograd.grad(wide_linear(x, weight).square().sum(), (x, weight))
    assert all(torch.equal(a, b) for a, b in zip(compiled, eager, strict=True))


def test_a_wide_linear_errs_less_than_a_linear_and_its_bias_is_not_rounded():
    torch.manual_seed(0)
    narrow, wide = Linear(64, 32, bias=True), WideLinear(64, 32, bias=True)
    torch.nn.init.normal_(narrow.bias)
    wide.load_state_dict(narrow.state_dict())
    x, x_dot = torch.randn(2, 100, 64).to(BF16)
    exact = x.double() @ narrow.weight.double().T + narrow.bias.double()
    exact_dot = x_dot.double() @ narrow.weight.double().T
    errors = []
    for layer in (narrow, wide):
        with torch.autocast("cpu", BF16), torch.no_grad():
            y = layer.forward_dual(Dual(x, x_dot))
        errors.append([(a.double() - b).norm() / b.norm() for a, b in ((y.value, exact), (y.dot, exact_dot))])
    assert all(w < 0.8 * n for n, w in zip(*errors, strict=True)), errors
    with torch.autocast("cpu", BF16), torch.no_grad():
        assert torch.equal(wide(torch.zeros(1, 64))[0], wide.bias)


def test_a_wide_linear_computes_and_keeps_what_a_linear_does():
    """Operations and bytes saved for backward are equal; only the result is wider."""
    costs = []
    for kind in (Linear, WideLinear):
        layer, x, saved = kind(64, 32, bias=True), torch.randn(2, 100, 64, requires_grad=True), {}

        def pack(tensor, saved=saved):
            saved[tensor.data_ptr()] = tensor.nbytes
            return tensor

        with FlopCounterMode(display=False) as operations, torch.autocast("cpu", BF16):
            with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
                y = layer(x)
            y.backward(torch.ones_like(y))
        costs.append((operations.get_total_flops(), sum(saved.values()), y.nbytes))
    (flops, bytes_saved, size), wide = costs
    assert wide == (flops, bytes_saved, 2 * size)


def test_samples_of_a_low_precision_are_not_rounded_to_it():
    model, labels = random_model(TINY, dtype=torch.float32), [0, 1, 2, 3]
    with torch.autocast("cpu", BF16):
        autocast = pmf.generate(model, labels, seeds=labels, omega=2.0, t_min=0.1, t_max=0.9)
    low = pmf.generate(model.to(BF16), labels, seeds=labels, omega=2.0, t_min=0.1, t_max=0.9)
    for images in (autocast, low):
        assert images.dtype == torch.float32
        assert not torch.equal(images, images.to(BF16).float())
