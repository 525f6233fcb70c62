"""`pmf.jvp` raises where a tangent or a gradient would be lost; `pmf.jvp.rule` registers what it does not know."""

import copy
import functools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

import pmf
from pmf import InputError
from pmf.private import operators_of
from pmf.tangents.rules import HANDLERS
from tests.pmf.jvp_checks import F64, W, compare, drawn


class Scaled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x * 3

    @staticmethod
    def backward(ctx, gradient):
        return gradient * 3


class Passed(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Squared(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, y):
        ctx.save_for_backward(x, y)
        return x * x * y

    @staticmethod
    def backward(ctx, gradient):
        x, y = ctx.saved_tensors
        return 2 * x * y * gradient, x * x * gradient


class Weights(torch.autograd.Function):
    """softmax(q k^T), as attention in some U-Nets, with a forward mode of its own."""

    @staticmethod
    def forward(q, k):
        return torch.softmax(q @ k.mT, -1)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(*inputs, output)
        ctx.save_for_forward(*inputs, output)

    @staticmethod
    def backward(ctx, gradient):
        q, k, weights = ctx.saved_tensors
        scores = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
        return scores @ k, scores.mT @ q

    @staticmethod
    def jvp(ctx, q_dot, k_dot):
        q, k, weights = ctx.saved_tensors
        scores = (0 if q_dot is None else q_dot @ k.mT) + (0 if k_dot is None else q @ k_dot.mT)
        return weights * (scores - (weights * scores).sum(-1, keepdim=True))


class OldWeights(Weights):
    """The same in a form that torch.func does not take."""

    setup_context = torch.autograd.Function.setup_context

    @staticmethod
    def forward(ctx, q, k):
        return torch.softmax(q @ k.mT, -1)


@pmf.jvp.rule(Squared)
def squared(out, x, y):
    return 2 * x.value * x.dot * y


@torch.library.custom_op("pmf_tests::triple", mutates_args=())
def triple(x: torch.Tensor) -> torch.Tensor:
    return x * 3


applied_early = super(torch.autograd.Function, Scaled).apply
passed_early = super(torch.autograd.Function, Passed).apply


LOSSES = {
    "autograd.Function": (lambda x: Scaled.apply(x), "Scaled got a moving value; an autograd.Function hides"),
    "identity Function": (lambda x: Passed.apply(x), "Passed got a moving value"),
    "autograd.Function with a context": (
        lambda x: OldWeights.apply(x[None], x[None]),
        "OldWeights has no rule, and torch.func.jvp fails",
    ),
    "apply looked up early": (applied_early, "autograd.Function"),
    "reentrant checkpoint": (
        lambda x: checkpoint(torch.sin, x, use_reentrant=True),
        "reentrant checkpointing hides tangents; expected use_reentrant=False",
    ),
    "custom operator": (triple, "pmf_tests.*no rule; expected one registered by pmf.jvp.rule"),
    "vmap": (torch.vmap(torch.sin), "vmap"),
    "vmap of a closure": (lambda x: torch.vmap(lambda i: x * i)(torch.arange(3.0, dtype=F64)), "vmap"),
    "TorchScript without its Python": (
        torch.jit.CompilationUnit("def scripted(x):\n    return x * 2\n").scripted,
        "scripted function got a moving value; torch.jit.script loses its tangent",
    ),
    "TorchScript of a trace": (
        torch.jit.trace(lambda x: x * 2, torch.ones(3, dtype=F64)),  # its Python may do something else by now
        "scripted function got a moving value",
    ),
    "TorchScript of a module": (
        torch.jit.script(torch.nn.Linear(3, 3).double()),  # torch.func.jvp gives zeros
        "forward got a moving value; torch.jit.script loses its tangent; expected the code before it",
    ),
    "numpy": (lambda x: torch.from_numpy(x.numpy()), "numpy got a moving value"),
    "numpy array": (lambda x: torch.as_tensor(np.asarray(x)), "__array__ got a moving value"),
    "data pointer": (lambda x: x.data_ptr(), "data_ptr got a moving value"),
    "pickle": (lambda x: copy.deepcopy(x), "deepcopy|reduce_ex"),
    "output tensor": (lambda x: torch.sin(x, out=torch.empty_like(x)), "out="),
    "target with a view": (lambda x: (lambda h: h[None] + h.add_(x))(x.detach()), "add_ writes a moving value into a"),
    "parameter": (lambda x: torch.nn.Parameter(W[0]).__setitem__(0, x[0]), "__setitem__ writes a moving value"),
    "data set": (lambda x: setattr(x * 1, "data", x), "data"),
    "data of a still tensor set": (
        lambda x: setattr(torch.zeros(3, dtype=F64), "data", x * 1),
        r"data.__set__ got a moving value; its tangent would be lost; expected x.data = y.detach\(\)",
    ),
    "DLPack": (lambda x: torch.utils.dlpack.to_dlpack(x * 1), "without torch functions got a moving value.*DLPack"),
    "alpha dropout in place": (lambda x: F.alpha_dropout(x * 1, 0.5, True, inplace=True), "inplace=False"),
    "gradient inside": (lambda x: torch.autograd.grad((x * 2).sum(), x), "backward|grad"),
    "written by a list": (lambda x: torch._foreach_mul_([x * 1], 2), "writes to its arguments"),
    "nested call": (lambda x: pmf.jvp(torch.sin, (x,), (x,))[1], "nested|another call"),
    "scatter of DataParallel": (
        lambda x: torch.nn.parallel._functions.Scatter.apply([0], None, 0, x),
        "Scatter got a moving value",
    ),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_an_error_that_names_the_function(name):
    function, message = LOSSES[name]
    x = drawn(3).requires_grad_()
    with pytest.raises(Exception, match=message) as raised:
        pmf.jvp(function, (x,), (drawn(3),))
    assert isinstance(raised.value, InputError)
    compare(torch.sin, [drawn(3)], [drawn(3, seed=1)])  # and the next call works


def test_data_may_be_set_to_what_stands_still():
    weight, data = torch.nn.Parameter(drawn(3)), torch.Tensor.data

    def function(x):
        weight.data = (x * 2).detach()
        other = torch.zeros(2, dtype=F64)
        other.data = weight.data[:2] + 1
        return x * weight * other.sum()

    x, dot = drawn(3, seed=1), drawn(3, seed=2)
    out, out_dot = pmf.jvp(function, (x,), (dot,))
    factor = 2 * x * (2 * x[:2] + 1).sum()
    assert torch.equal(weight, 2 * x) and torch.allclose(out, x * factor) and torch.allclose(out_dot, dot * factor)
    assert torch.Tensor.data is data and data.__objclass__ is not torch.Tensor  # PyTorch's own
    kept: list = []
    pmf.jvp(lambda x: kept.append(x * 1) or x, (x,), (dot,))
    weight.data = kept[0]  # the values of what has outlived the call
    assert torch.equal(weight, x) and weight.data_ptr() != 0


def test_an_identity_function_looked_up_early_loses_no_gradient():
    x = drawn(3).requires_grad_()
    try:
        out, dot = pmf.jvp(passed_early, (x,), (drawn(3),))
    except InputError:
        return
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient[0] == -1, "the Function's backward was bypassed"
    assert dot.abs().max() > 0


@pytest.mark.parametrize("moving", ["q", "k", "both"])
def test_functions_with_a_forward_mode_of_their_own_move(moving):
    k = drawn(2, 5, 3, seed=1)
    of_q = {"q": lambda x: Weights.apply(x, k), "k": lambda x: Weights.apply(k, x)}
    compare(of_q.get(moving, lambda x: Weights.apply(x.sin(), x * x)), [drawn(2, 5, 3)], [drawn(2, 5, 3, seed=2)])


def test_a_script_may_put_it_in_place_of_torch_func_jvp(monkeypatch):
    x, v = drawn(4), drawn(4, seed=1)
    expected = torch.func.jvp(torch.special.erfcx, (x,), (v,))
    monkeypatch.setattr(torch.func, "jvp", pmf.jvp)
    for a, b in zip(torch.func.jvp(torch.special.erfcx, (x,), (v,)), expected, strict=True):
        torch.testing.assert_close(a, b)


def test_registered_functions_move():
    x, v = drawn(6).requires_grad_(), drawn(6, seed=1)
    out, dot = pmf.jvp(lambda x: Squared.apply(x, W[0]), (x,), (v,))
    torch.testing.assert_close(dot, 2 * x.detach() * v * W[0])
    torch.testing.assert_close(torch.autograd.grad(out.sum(), x)[0], 2 * x.detach() * W[0])

    @pmf.jvp.rule(triple)
    def tripled(out, x):
        return 3 * x.dot

    try:
        torch.testing.assert_close(pmf.jvp(triple, (drawn(3),), (drawn(3, seed=1),))[1], 3 * drawn(3, seed=1))
    finally:
        for one in operators_of(triple):
            HANDLERS.pop(one)


@pytest.mark.parametrize(
    ("primals", "tangents", "options", "message"),
    [
        ([1], (1,), {}, "primals must be a tuple"),
        ((drawn(3),), (drawn(3), 1), {}, "structure"),
        ((drawn(3),), (drawn(4),), {}, r"shape of its primal, \[3\], got torch.float64 \[4\]"),
        ((torch.arange(3),), (1,), {}, "floating tensor, got torch.int64"),
        ((drawn(3),), ("x",), {}, "shape of its primal"),
        ((drawn(3),), (drawn(4),), {"rows": 4}, r"rows must lie in \[0, 3\], got 4"),
        ((drawn(3),), (drawn(3),), {"has_aux": True}, "must return \\(output, aux\\)"),
    ],
)
def test_bad_arguments_are_named(primals, tangents, options, message):
    with pytest.raises(InputError, match=message):
        pmf.jvp(torch.sin, primals, tangents, **options)


class Getter(torch.Tensor):
    @property
    def twice(self):
        return 2 * self


class Callable:
    def __call__(self, x):
        return x


@pytest.mark.parametrize("function", [Getter.twice.__get__, functools.partial(torch.add, 1), Callable()])
def test_what_dispatches_without_a_name_is_refused(function):
    """Libraries dispatch what they like: some of it has no name, or no module."""

    def network(x):
        return torch.overrides.handle_torch_function(function, (x,), x)

    with pytest.raises(InputError, match="got a moving value; it"):
        pmf.jvp(network, (drawn(3),), (1,))


NUMBERS = {  # of x [4, 8] and t [4]
    "full_like": lambda x, t: x * torch.full_like(x, t[0]),
    "new_full": lambda x, t: x * x.new_full((4, 1), fill_value=t[0]),
    "new_tensor": lambda x, t: x * x.new_tensor(t)[:, None],
    "pad": lambda x, t: F.pad(x, (1, 1), value=t[0]),
    "addcmul": lambda x, t: torch.addcmul(x, x, x, value=t[0]),
    "elu": lambda x, t: F.elu(x, t[0]),
    "vector_norm": lambda x, t: torch.linalg.vector_norm(x, t[0] + 1),
    "huber_loss": lambda x, t: F.huber_loss(x, 2 * x, delta=t[0]),
    "index_add": lambda x, t: x.index_add(0, torch.tensor([0]), x[:1], alpha=t[0]),
    "add": lambda x, t: x.clone().add_(x, alpha=t[0]),
    "baddbmm": lambda x, t: torch.baddbmm(x[None], (x @ x.T)[None], x[None], beta=t[0]),
    "scaled_dot_product_attention": lambda x, t: F.scaled_dot_product_attention(x[None], x[None], x[None], scale=t[0]),
    "layer_norm": lambda x, t: F.layer_norm(x, (8,), eps=t[0]),
    "rms_norm": lambda x, t: F.rms_norm(x, (8,), torch.ones(8, dtype=F64), t[0]),
}


@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("name", NUMBERS)
def test_moving_values_are_no_numbers(name, compiled):
    """`torch.func.jvp` reads them and loses their tangents."""
    torch._dynamo.reset()
    call = torch.compile(fullgraph=True, backend="aot_eager")(pmf.jvp) if compiled else pmf.jvp
    with pytest.raises(Exception, match=rf"pmf\.jvp: \S*{name} got a moving value as a number; its tangent"):
        call(NUMBERS[name], (drawn(4, 8), drawn(4).exp()), (drawn(4, 8, seed=1), 1))


@pytest.mark.parametrize("compiled", [False, True])
def test_single_numbers_move_where_functions_take_tensors(compiled):
    def function(x, t):
        s, y = t[0], x * 2
        y[0] = s
        clamped = x.clamp(min=s - 1).masked_fill(x > 1, s) + torch.where(x > 0, x, s) + x.where(x > 0, s)
        powers = x.abs() ** s + torch.float_power(x.abs(), s) + 1 / (x.abs() + s) + torch.addcdiv(x, x, s)
        filled = torch.zeros_like(x).fill_(s) + s.expand(4, 8) + x.index_fill(0, torch.tensor([1]), s)
        return torch.lerp(x, y, s) + clamped + powers + filled + torch.atan2(x, s) + torch.rsub(x, s) + torch.fmod(x, s)

    torch._dynamo.reset()
    primals, tangents = (drawn(4, 8), drawn(4).exp()), (drawn(4, 8, seed=1), drawn(4, seed=2))
    call = torch.compile(fullgraph=True, backend="aot_eager")(pmf.jvp) if compiled else pmf.jvp
    expected = torch.func.jvp(function, primals, tangents)
    torch.testing.assert_close(call(function, primals, tangents), expected, rtol=1e-12, atol=1e-12)
