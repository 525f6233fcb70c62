"""`pmf.jvp` of every operator in PyTorch's own list for tests, on PyTorch's own examples."""

from itertools import islice

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.testing._internal.common_methods_invocations import op_db
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten

import pmf
from tests.pmf.jvp_checks import F64, drawn

EXAMPLES = 8
UNFILLED = {"empty", "empty_like", "empty_permuted", "empty_strided", "new_empty", "new_empty_strided"}
WRONG = {"chunked", "chunked_none"}  # of linear_cross_entropy, whose tangent torch.func.jvp loses
TESTED = [
    op
    for op in op_db
    if F64 in op.supported_dtypes("cpu") and op.name not in UNFILLED and op.variant_test_name not in WRONG
]
REFUSED = {"scatter_reduce.prod": "torch.func.jvp is wrong there"}
ZEROS = "PyTorch does not differentiate it, and would give zeros"
ROUNDED = {"linalg.lstsq", "linalg.lstsq.grad_oriented"}  # LAPACK's result depends on where its memory begins


def name_of(op):
    return f"{op.name}.{op.variant_test_name}" if op.variant_test_name else op.name


def of_its_tensors(op, example):
    """The operator as a function of the example's float64 tensors, and these."""
    leaves, spec = tree_flatten(((example.input, *example.args), example.kwargs))
    places = [i for i, x in enumerate(leaves) if isinstance(x, torch.Tensor) and x.dtype == F64]

    def function(*moving):
        given = list(leaves)
        for i, x in zip(places, moving, strict=True):
            given[i] = x
        args, kwargs = tree_unflatten(given, spec)
        torch.manual_seed(0)
        out = tree_leaves(op.op(*args, **kwargs))
        return tuple(x for x in out if isinstance(x, torch.Tensor) and (x.is_floating_point() or x.is_complex()))

    return function, [leaves[i].detach().clone() for i in places]


def expected(function, primals, tangents):
    """Values, tangents and gradients by PyTorch; None where it has none of them, or the result no floats."""
    plain = [x.clone().requires_grad_() for x in primals]
    try:
        with sdpa_kernel(SDPBackend.MATH):
            _, dots = torch.func.jvp(function, tuple(primals), tuple(tangents))
        out = function(*plain)
        return (out, dots, gradients(out, plain)) if dots else None
    except Exception:
        return None


def gradients(out, inputs):
    recorded = [x for x in out if x.requires_grad]
    weights = [drawn(*x.shape, seed=1).to(x.dtype) for x in recorded]
    return torch.autograd.grad(recorded, inputs, weights, allow_unused=True) if recorded else []


def check(function, primals, tangents, right, close):
    inputs = [x.clone().requires_grad_() for x in primals]
    got, got_dots = pmf.jvp(function, tuple(inputs), tuple(tangents))
    out, dots, grads = right
    for a, b in zip(got, out, strict=True):
        assert a.requires_grad == b.requires_grad
        torch.testing.assert_close(a, b, **close)
    for a, b in zip(got_dots, dots, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-8, equal_nan=True)
    for a, b in zip(gradients(got, inputs), grads, strict=True):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b, **close)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("op", TESTED, ids=name_of)
def test_value_tangent_and_gradients(op):
    name, refusals = name_of(op), 0
    close = dict(rtol=1e-12, atol=1e-12) if name in ROUNDED else dict(rtol=0, atol=0)
    torch.manual_seed(0)
    for example in islice(op.sample_inputs("cpu", F64, requires_grad=False), EXAMPLES):
        function, primals = of_its_tensors(op, example)
        tangents = [drawn(*x.shape, seed=i + 2) for i, x in enumerate(primals)]
        right = expected(function, primals, tangents) if primals else None
        if right is None:
            continue
        try:
            check(function, primals, tangents, right, close | {"equal_nan": True})
        except pmf.InputError as error:
            assert REFUSED.get(name, ZEROS) in str(error) and (name in REFUSED or name.startswith("special."))
            assert all(dot.count_nonzero() == 0 for dot in right[1]) or name in REFUSED
            refusals += 1
    assert refusals or name not in REFUSED
