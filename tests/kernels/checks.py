"""The error budget of the kernels, and checks for every op under compilers, checkpointing and forward mode.

Truth is the reference in float64 on the same (already rounded) inputs. A kernel's error may be twice
that of the reference in the kernel's own precision, plus one rounding step.
"""

from __future__ import annotations

import contextlib
import re
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from pmf import Dual, ops

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def generator(*seed) -> torch.Generator:
    """A generator that depends only on `seed`."""
    return torch.Generator().manual_seed(zlib.crc32(repr(seed).encode()))


def randn(*shape: int, gen: torch.Generator, dtype=torch.float32, mean=0.0) -> Tensor:
    """Normal values, rounded to `dtype`."""
    return (torch.randn(*shape, generator=gen) + mean).to(DEVICE, dtype)


def strided(x: Tensor) -> Tensor:
    """The same values as a view with gaps between samples, rows and (for wide tensors) columns."""
    wide = x.new_full((*x.shape[:-1], x.shape[-1] + 3), float("nan"))
    view = wide[..., : x.shape[-1]]
    view.copy_(x)
    return view


def tf32x3(products: int) -> int:
    """Float32 rounding steps to allow for a chain of `products` products in PyTorch's attention.

    On GPUs its memory-efficient kernels, the only ones for float32, compute a product as three TF32 products, which
    keep 22 of 24 bits: four steps each. Our kernels multiply float32 exactly.
    """
    return 4 * products if DEVICE == "cuda" else 1


def within_budget(
    name: str, kernel: Tensor, reference: Tensor, truth: Tensor, *, peak: bool = True, steps: int = 1
) -> None:
    """Assert the budget in the root mean square and, if `peak`, in the maximum norm, with `steps` rounding steps."""
    assert kernel.dtype == reference.dtype and kernel.shape == reference.shape, name
    if kernel.numel() == 0:
        return
    step = steps * torch.finfo(kernel.dtype).eps
    truth = truth.double()
    norms = [lambda e: e.square().mean().sqrt()] + ([lambda e: e.abs().max()] if peak else [])
    for norm in norms:
        error, allowed = norm(kernel.double() - truth), norm(reference.double() - truth)
        bound = 2 * allowed + step * norm(truth)
        # This comparison fails on NaN.
        assert error <= bound, f"{name}: error {error:.3g}, reference's {allowed:.3g}, bound {bound:.3g}"


def _function(op):
    """The op of this name; a function stands for itself."""
    return getattr(ops, op) if isinstance(op, str) else op


def _name(op) -> str:
    return op if isinstance(op, str) else op.__name__


def _flat(outputs) -> list[Tensor | None]:
    return list(outputs) if isinstance(outputs, tuple) else [outputs]


def dual_op(op: str | Callable, primals, tangents, **options) -> tuple[tuple, tuple]:
    """The op's values and their tangents. The first input is passed as a Dual, others only if they have a tangent."""
    given = (p if i and t is None else Dual(p, t) for i, (p, t) in enumerate(zip(primals, tangents, strict=True)))
    results = _function(op)(*given, **options)
    duals = (results,) if isinstance(results, Dual) else results
    return tuple(dual.value for dual in duals), tuple(dual.dot for dual in duals)


def _leaves(primals, fixed=(), dtype=None) -> tuple:
    """The primals as leaves that require gradients, except the fixed ones; strides are kept."""
    return tuple(
        None if p is None else p.detach().to(dtype or p.dtype).requires_grad_(i not in fixed)
        for i, p in enumerate(primals)
    )


def _trained(leaves) -> list[Tensor]:
    return [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]


def evaluate(op, primals, tangents, cotangents, *, impl, dtype=None, autocast=None, fixed=(), **options):
    """Values, tangents and gradients of an op; `dtype` converts every input first."""
    primals = _leaves(primals, fixed, dtype)
    tangents = tuple(t if t is None or dtype is None else t.to(dtype) for t in tangents)
    context = contextlib.nullcontext() if autocast is None else torch.autocast(DEVICE, autocast)
    with context:
        values, dots = dual_op(op, primals, tangents, impl=impl, **options)
    if cotangents is None:
        cotangents = [randn(*v.shape, gen=generator(_name(op), i), dtype=v.dtype) for i, v in enumerate(values)]
    converted = [c.to(v.dtype) for c, v in zip(cotangents, values, strict=True)]
    gradients = torch.autograd.grad(values, _trained(primals), converted, allow_unused=True)
    assert not any(dot is not None and dot.requires_grad for dot in dots)
    return values, dots, gradients, cotangents


def check(op: str | Callable, primals, tangents, *, autocast=None, products=(), steps=1, **options) -> None:
    """Assert that values, tangents and every gradient of the Triton op are within the budget; see `evaluate`.

    products: gradients computed by a matrix product of PyTorch, not by our kernels. Its order of summation differs
    between machines, so they are checked in the root mean square only.
    """
    low = evaluate(op, primals, tangents, None, impl="reference", autocast=autocast, **options)
    true = evaluate(op, primals, tangents, low[3], impl="reference", dtype=torch.float64, **options)
    mine = evaluate(op, primals, tangents, low[3], impl="triton", autocast=autocast, **options)
    for what, kernel, reference, truth in zip(("value", "tangent", "gradient"), mine, low, true, strict=False):
        for i, parts in enumerate(zip(kernel, reference, truth, strict=True)):
            missing = [part is None for part in parts]
            assert all(missing) or not any(missing), f"{what} {i} is None in some"
            if parts[0] is not None:
                peak = (what, i) not in {("gradient", p) for p in products}
                within_budget(f"{_name(op)}: {what} {i}", *parts, peak=peak, steps=steps)


def close(kernel, expected) -> None:
    """Assert that two paths of the same computation agree bit for bit, with None in the same places."""
    for a, b in zip(_flat(kernel), _flat(expected), strict=True):
        assert (a is None and b is None) or torch.equal(a, b)


def check_compiles(op: str | Callable, primals, tangents, *, fixed=(), **options) -> None:
    """Assert that fullgraph compilation and activation checkpointing change no value, tangent or gradient."""

    def run(*tensors):
        n = len(primals)
        values, dots = dual_op(op, tensors[:n], tensors[n:], impl="triton", **options)
        return (*values, *(d for d in dots if d is not None))

    def outcome(function):
        leaves = _leaves(primals, fixed)
        outputs = function(*leaves, *tangents)
        total = sum(o.float().square().sum() for o in outputs if o.requires_grad)
        return (
            *(o.detach() for o in outputs),
            *torch.autograd.grad(total, _trained(leaves), allow_unused=True),
        )

    expected = outcome(run)
    torch._dynamo.reset()
    close(outcome(torch.compile(run, backend="aot_eager", fullgraph=True)), expected)
    close(outcome(lambda *t: torch.utils.checkpoint.checkpoint(run, *t, use_reentrant=False)), expected)


def check_forward_mode(op: str | Callable, primals, moving: tuple[int, ...], *, own_backward=False, **options) -> None:
    """Assert that torch.func.jvp and forward_ad give the op's tangent on Duals, and that compilers raise.

    own_backward: PyTorch's own operators give the value's gradient, so that compilers keep it.
    """
    import pytest
    from torch.autograd import forward_ad

    value = _function(op)
    tangents = [None] * len(primals)
    for i in moving:
        tangents[i] = randn(*primals[i].shape, gen=generator(_name(op), i), dtype=primals[i].dtype)
    expected_values, expected = dual_op(op, primals, tuple(tangents), impl="triton", **options)

    def of_moving(*parts):
        arguments = list(primals)
        for i, part in zip(moving, parts, strict=True):
            arguments[i] = part
        return value(*arguments, impl="triton", **options)

    parts, dots = tuple(primals[i] for i in moving), tuple(tangents[i] for i in moving)
    values, found = torch.func.jvp(of_moving, parts, dots)
    close(values, expected_values)
    close(found, expected)

    with forward_ad.dual_level():
        outputs = _flat(of_moving(*(forward_ad.make_dual(p, t) for p, t in zip(parts, dots, strict=True))))
        close(tuple(forward_ad.unpack_dual(o).tangent for o in outputs), expected)

    def tangent_of(*parts):
        return torch.func.jvp(of_moving, parts, dots)[1]

    torch._dynamo.reset()
    with pytest.raises(Exception, match=r"explicit tangents|Observed exception"):
        torch.compile(tangent_of, backend="aot_eager", fullgraph=True)(*parts)
    # Without fullgraph the compiler may fall back to eager mode, with the right tangent.
    close(torch.compile(tangent_of, backend="aot_eager")(*parts), expected)
    with pytest.raises(Exception, match=r"jvp|forward AD"):
        torch.func.jvp(tangent_of, parts, dots)
    gradient = torch.func.grad(lambda *p: sum(v.float().sum() for v in _flat(of_moving(*p))))
    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True)
    # Dynamo drops some backward rules here: it or we must raise, never return a wrong gradient.
    try:
        found = compiled(*parts)
    except Exception as error:
        if own_backward or not re.search("gradient was lost|AutogradFunctionContextVariable|setup_context", str(error)):
            raise
    else:
        close(found, gradient(*parts))
