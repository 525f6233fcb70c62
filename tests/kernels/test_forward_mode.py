"""Every op under every way to differentiate, on both implementations: the right numbers, or one line that names the op.

Each way runs backward. Truth is the reference in float64 under the same way, and `tests.kernels.checks` has the budget.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad, functional

import pmf
from pmf import ops
from pmf.private import tree_flatten
from tests.kernels.checks import DEVICE, generator, randn, tf32x3, within_budget
from tests.networks import model_inputs, random_model, relative_error

pytest.importorskip("triton")

WEIGHTS = ((6, 3, 4, 4), (6,), (8, 6, 1, 1), (8,))
SHAPES = {  # of every input; the numbers of those that have tangents; those that are not differentiated; options
    "norm_modulate": ([(2, 3, 8), (8,), (2, 8), (2, 8)], (0, 2, 3), (), {"kind": "layer"}),
    "norm_modulate, x alone": ([(2, 3, 8)], (0,), (), {}),
    "norm_modulate, only scale moves": ([(2, 3, 8), None, (2, 8)], (2,), (), {}),
    "residual_norm_modulate": ([(2, 3, 8), (2, 3, 8), (8,), (8,), (2, 8), (2, 8)], (0, 1, 4, 5), (), {}),
    "residual_norm_modulate, a moving gate": ([(2, 3, 8), (2, 3, 8), (2, 8)], (0, 2), (), {}),
    "qk_norm_rope": ([(2, 5, 3, 2, 8), (8,), (8,), (4, 4), (4, 4)], (0,), (3, 4), {"prefix_length": 1}),
    "attention": ([(2, 5, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)], (0, 1, 2), (), {}),
    "swiglu": ([(2, 3, 8)], (0,), (), {}),
    "patch_embed": ([(2, 3, 8, 8), *WEIGHTS, (5, 8), (2, 1, 8)], (0, 6), (), {}),
    "patch_embed, images alone": ([(2, 3, 8, 8), *WEIGHTS, (4, 8)], (0,), (1, 2, 3, 4, 5), {}),
    "scalar_features": ([(2,)], (0,), (), {}),
    "silu": ([(2, 3)], (0,), (), {}),
}
PLAIN = ("scalar_features", "silu")
"""Ops without kernels."""


class Case:
    """One op's inputs in a dtype, and its function of those that move."""

    def __init__(self, name: str, impl: str, dtype: torch.dtype):
        shapes, moving, fixed, options = SHAPES[name]
        op = name.partition(",")[0]
        options = options if op in PLAIN else {"impl": impl, **options}
        given = [s if s is None else randn(*s, gen=generator(name, i)).to(dtype) for i, s in enumerate(shapes)]
        inputs = [x if x is None else x.requires_grad_(i not in fixed) for i, x in enumerate(given)]
        self.trained = [x for x in inputs if x is not None and x.requires_grad]
        self.parts = tuple(inputs[i] for i in moving)
        self.dots = tuple(randn(*p.shape, gen=generator(name, "dot", i)).to(dtype) for i, p in enumerate(self.parts))
        self.numbers = tuple(range(len(moving)))

        def outputs(*parts) -> tuple[Tensor, ...]:
            arguments = list(inputs)
            for i, part in zip(moving, parts, strict=True):
                arguments[i] = part
            result = getattr(ops, op)(*arguments, **options)
            return result if type(result) is tuple else (result,)

        def dots_of(*dots) -> tuple[Tensor, ...]:
            """The tangents for explicit ones."""
            arguments = list(inputs)
            for i, dot in zip(moving, dots, strict=True):
                arguments[i] = pmf.Dual(inputs[i], dot)
            result = getattr(ops, op)(*arguments, **options)
            return (result.dot,) if isinstance(result, pmf.Dual) else tuple(r.dot for r in result)

        self.outputs, self.dots_of = outputs, dots_of

    def loss(self, *parts) -> Tensor:
        return total(self.outputs(*parts))

    def jvp(self, *parts):
        return func.jvp(self.outputs, parts, self.dots)

    def gradients(self, loss: Tensor) -> tuple:
        return torch.autograd.grad(loss, self.trained, allow_unused=True)

    def forward_ad(self) -> tuple[list[Tensor], list[Tensor]]:
        with forward_ad.dual_level():
            duals = (forward_ad.make_dual(p, t) for p, t in zip(self.parts, self.dots, strict=True))
            values, dots = zip(*map(forward_ad.unpack_dual, self.outputs(*duals)), strict=True)
            return values, dots


def total(tensors) -> Tensor:
    """A scalar whose gradient is different everywhere."""
    return sum(x.sin().sum() for x in tensors)


def mean_flow(values, dots) -> Tensor:
    """A loss of values and tangents that stops the tangents' gradients."""
    return sum((x.sin() * dot.detach()).sum() for x, dot in zip(values, dots, strict=True))


def pulled_back(values, pull) -> tuple:
    """What `func.vjp` gives for cotangents that depend on the values."""
    return pull(tuple(map(torch.cos, values)))


AGREE: dict[str, Callable[[Case], object]] = {
    "value of jvp": lambda c: (c.jvp(*c.parts)[1], c.gradients(total(c.jvp(*c.parts)[0]))),
    "MeanFlow loss of jvp": lambda c: c.gradients(mean_flow(*c.jvp(*c.parts))),
    "value of forward_ad": lambda c: (c.forward_ad()[1], c.gradients(total(c.forward_ad()[0]))),
    "MeanFlow loss of forward_ad": lambda c: c.gradients(mean_flow(*c.forward_ad())),
    "grad": lambda c: func.grad(c.loss, c.numbers)(*c.parts),
    "grad of the MeanFlow loss": lambda c: func.grad(lambda *p: mean_flow(*c.jvp(*p)), c.numbers)(*c.parts),
    "vjp": lambda c: pulled_back(*func.vjp(c.outputs, *c.parts)),
    "backward of vjp's value": lambda c: c.gradients(total(func.vjp(c.outputs, *c.parts)[0])),
    "jacrev": lambda c: func.jacrev(c.outputs, c.numbers)(*c.parts),
    "linearize": lambda c: func.linearize(c.outputs, *(p.detach() for p in c.parts))[1](*c.dots),
    "functional.vjp": lambda c: functional.vjp(c.loss, c.parts),
    "functional.jacobian": lambda c: functional.jacobian(c.outputs, c.parts),
    "functional.jacobian, vectorized": lambda c: functional.jacobian(c.outputs, c.parts, vectorize=True),
}
"""Ways in which every op agrees."""

TANGENT, TWICE, MAPPED, AROUND = "record no gradient for a tangent", "no second derivatives", "no torch.vmap", "take no jvp"
RAISE: dict[str, tuple[str, Callable[[Case], object]]] = {
    "tangent of jvp": (TANGENT, lambda c: c.gradients(total(c.jvp(*c.parts)[1]))),
    "value and tangent of jvp": (TANGENT, lambda c: c.gradients(total((*c.jvp(*c.parts)[0], *c.jvp(*c.parts)[1])))),
    "tangent of forward_ad": (TANGENT, lambda c: c.gradients(total(c.forward_ad()[1]))),
    "grad of the tangent": (TANGENT, lambda c: func.grad(lambda *p: total(c.jvp(*p)[1]), c.numbers)(*c.parts)),
    "grad for the direction": (
        TANGENT,
        lambda c: func.grad(lambda *d: total(func.jvp(c.outputs, c.parts, d)[1]), c.numbers)(*c.dots),
    ),
    "double backward": (
        TWICE,
        lambda c: c.gradients(total(torch.autograd.grad(c.loss(*c.parts), c.parts, create_graph=True))),
    ),
    "backward of grad": (TWICE, lambda c: c.gradients(total(func.grad(c.loss, c.numbers)(*c.parts)))),
    "functional.jvp": (TWICE, lambda c: functional.jvp(c.outputs, c.parts, c.dots)),
    "functional.hessian": (TWICE, lambda c: functional.hessian(c.loss, c.parts)),
    "vmap": (MAPPED, lambda c: c.gradients(total(func.vmap(c.outputs)(*(torch.stack([p, -p]) for p in c.parts))))),
    "vmap of explicit tangents": (MAPPED, lambda c: func.vmap(c.dots_of)(*(torch.stack([d, -d]) for d in c.dots))),
    "jacfwd": (MAPPED, lambda c: func.jacfwd(c.outputs, c.numbers)(*c.parts)),
    "hessian": (AROUND, lambda c: func.hessian(c.loss, c.numbers)(*c.parts)),
    "jvp of jvp": (AROUND, lambda c: func.jvp(c.jvp, c.parts, c.dots)),
    "jvp of grad": (AROUND, lambda c: func.jvp(func.grad(c.loss, c.numbers), c.parts, c.dots)),
}
"""Ways that kernels refuse, and the words of their refusal."""


def outcome(name: str, impl: str, dtype: torch.dtype, way: Callable) -> list[Tensor | None]:
    return tree_flatten(way(Case(name, impl, dtype)))[0]


def assert_agrees(name: str, way: Callable) -> None:
    """Assert that both implementations give the same tensors, within the budget of one op, and the same None."""
    truth, low = (outcome(name, "reference", dtype, way) for dtype in (torch.float64, torch.float32))
    kernel = outcome(name, "triton", torch.float32, way)
    steps = tf32x3(3) if name == "attention" else 4  # sin, cos and their products round too
    assert len(kernel) == len(low) == len(truth) > 0
    for parts in zip(kernel, low, truth, strict=True):
        assert len({part is None for part in parts}) == 1
        if parts[0] is not None:
            within_budget(name, *parts, peak=False, steps=steps)
            assert relative_error(parts[1].double(), parts[2]) < 1e-4 or parts[2].norm() < 1e-9


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", AGREE)
@pytest.mark.parametrize("name", SHAPES)
def test_agrees(name, way):
    assert_agrees(name, AGREE[way])


@pytest.mark.filterwarnings("ignore:There is a performance drop")
@pytest.mark.parametrize("way", RAISE)
@pytest.mark.parametrize("name", SHAPES)
def test_kernels_refuse(name, way):
    words, run = RAISE[way]
    if name in PLAIN or (name, way) == ("attention", "vmap"):
        assert_agrees(name, run)
        return
    if (name, way) == ("attention", "tangent of forward_ad"):
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # by PyTorch's rule for softmax
            outcome(name, "reference", torch.float64, run)
    else:
        assert all(x is None or x.isfinite().all() for x in outcome(name, "reference", torch.float64, run))
    op = name.partition(",")[0]
    message = rf"^([a-z_]+ or )?{op}( or [a-z_]+)?: kernels .*{words}"
    if name == "attention" and words == TWICE:  # its value and gradients are PyTorch's
        message = r"^derivative for aten::_scaled_dot_product\w*attention\w* is not implemented$"
    message = message.replace("kernels .*take", "kernels take").replace("kernels .*record", "kernels record")
    with pytest.raises(RuntimeError, match=message) as error:
        outcome(name, "triton", torch.float32, run)
    assert "\n" not in str(error.value)
