"""Every op under every way to differentiate, on both implementations: the right numbers, or one line that names the op.

Each way runs backward. Truth is the reference in float64 under the same way, and `tests.kernels.checks` has the budget.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import weakref
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, func
from torch.autograd import forward_ad, functional

import pmf
from pmf import ops
from pmf.kernels.gradients import differentiable_once
from pmf.private import storage_id, tree_flatten
from tests.kernels.checks import DEVICE, generator, randn, tf32x3, within_budget
from tests.networks import model_inputs, random_model, relative_error

pytest.importorskip("triton")

WEIGHTS = ((6, 3, 4, 4), (6,), (8, 6, 1, 1), (8,))
MASKED = {"causal": True, "enable_gqa": True, "key_lengths": torch.tensor([2, 5], device=DEVICE)}
SHAPES = {  # of every input; the numbers of those that have tangents; those that are not differentiated; options
    "norm_modulate": ([(2, 3, 8), (8,), (2, 8), (2, 8)], (0, 2, 3), (), {"kind": "layer"}),
    "norm_modulate, x alone": ([(2, 3, 8)], (0,), (), {}),
    "norm_modulate, only scale moves": ([(2, 3, 8), None, (2, 8)], (2,), (), {}),
    "residual_norm_modulate": ([(2, 3, 8), (2, 3, 8), (8,), (8,), (2, 8), (2, 8)], (0, 1, 4, 5), (), {}),
    "residual_norm_modulate, a moving gate": ([(2, 3, 8), (2, 3, 8), (2, 8)], (0, 2), (), {}),
    "qk_norm_rope": ([(2, 5, 3, 2, 8), (8,), (8,), (4, 4), (4, 4)], (0,), (3, 4), {"prefix_length": 1}),
    "qk_norm_rope, grouped heads": (
        [(2, 5, 5, 8), (8,), (8,), (5, 4), (5, 4)],
        (0,),
        (3, 4),
        {"num_kv_heads": 1, "norm": "layer", "pairs": "half"},
    ),
    "norm_rope": ([(2, 5, 2, 8), (16,), (2, 5, 4), (2, 5, 4)], (0,), (2, 3), {"across_heads": True}),
    "attention": ([(2, 5, 2, 8), (2, 4, 2, 8), (2, 4, 2, 8)], (0, 1, 2), (), {}),
    "norm_modulate, per token": ([(2, 3, 8), None, (2, 3, 8), (2, 1, 8), (8,)], (0, 2, 3), (), {}),
    "norm_modulate, [B, C]": ([(2, 8), (8,), (2, 8)], (0, 2), (), {}),
    "residual_norm_modulate, no gate": ([(2, 3, 4, 8), (2, 3, 4, 8), None, (8,)], (0, 1), (), {}),
    "attention, masked": ([(2, 5, 2, 8), (2, 5, 1, 8), (2, 5, 1, 8)], (0, 1, 2), (), MASKED),
    "swiglu": ([(2, 3, 8)], (0,), (), {}),
    "gelu": ([(2, 3, 8)], (0,), (), {}),
    "gelu, tanh": ([(2, 8)], (0,), (), {"approximate": "tanh"}),
    "patch_embed": ([(2, 3, 8, 8), *WEIGHTS, (5, 8), (2, 1, 8)], (0, 6), (), {}),
    "patch_embed, images alone": ([(2, 3, 8, 8), *WEIGHTS, (4, 8)], (0,), (1, 2, 3, 4, 5), {}),
    "scalar_features": ([(2,)], (0,), (), {}),
    "silu": ([(2, 3)], (0,), (), {}),
}
PLAIN = ("scalar_features", "silu")
"""Ops without kernels."""


def drawn(shape: tuple, gen: torch.Generator) -> Tensor:
    """Normal values. A product's weights are scaled so that results are of order one: sines of more only round more."""
    return randn(*shape, gen=gen) / (math.prod(shape[1:]) ** 0.5 if shape in WEIGHTS else 1)


class Case:
    """One op's inputs in a dtype, and its function of those that move."""

    def __init__(self, name: str, impl: str, dtype: torch.dtype):
        shapes, moving, fixed, options = SHAPES[name]
        op = name.partition(",")[0]
        options = options if op in PLAIN else {"impl": impl, **options}
        given = [s if s is None else drawn(s, generator(name, i)).to(dtype) for i, s in enumerate(shapes)]
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

    def few(self, *parts) -> tuple[Tensor, ...]:
        """Three values of each output: the interpreter takes its time for each row of a Jacobian."""
        return tuple(x.flatten()[:3] for x in self.outputs(*parts))

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


@torch.no_grad()
def unrecorded(c: Case) -> list[Tensor]:
    """`func.jvp` under no_grad, where PyTorch itself records autograd.Functions, and views of primals."""
    results = tree_flatten(c.jvp(*c.parts))[0]
    given = {storage_id(x) for x in c.parts}
    assert not any(x.requires_grad for x in results if storage_id(x) not in given)
    return results


AGREE: dict[str, Callable[[Case], object]] = {
    "value of jvp": lambda c: (c.jvp(*c.parts)[1], c.gradients(total(c.jvp(*c.parts)[0]))),
    "MeanFlow loss of jvp": lambda c: c.gradients(mean_flow(*c.jvp(*c.parts))),
    "value of forward_ad": lambda c: (c.forward_ad()[1], c.gradients(total(c.forward_ad()[0]))),
    "MeanFlow loss of forward_ad": lambda c: c.gradients(mean_flow(*c.forward_ad())),
    "grad": lambda c: func.grad(c.loss, c.numbers)(*c.parts),
    "grad of the MeanFlow loss": lambda c: func.grad(lambda *p: mean_flow(*c.jvp(*p)), c.numbers)(*c.parts),
    "vjp": lambda c: pulled_back(*func.vjp(c.outputs, *c.parts)),
    "backward of vjp's value": lambda c: c.gradients(total(func.vjp(c.outputs, *c.parts)[0])),
    "jacrev": lambda c: func.jacrev(c.few, c.numbers)(*c.parts),
    "jvp without gradients": unrecorded,
    "linearize": lambda c: func.linearize(c.outputs, *(p.detach() for p in c.parts))[1](*c.dots),
    "functional.vjp": lambda c: functional.vjp(c.loss, c.parts)[1],
    "functional.jacobian": lambda c: functional.jacobian(c.few, c.parts),
    "functional.jacobian, vectorized": lambda c: functional.jacobian(c.few, c.parts, vectorize=True),
}
"""Ways in which every op agrees."""

TANGENT, TWICE, MAPPED, AROUND, BATCH = (
    f"kernels {words}"
    for words in (
        "record no gradient for a tangent",
        "have no second derivatives",
        "have no torch.vmap",
        "take no jvp",
        "take no batch of tangents",
    )
)
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
    "functional.jacobian, forward": (
        BATCH,
        lambda c: functional.jacobian(c.few, c.parts, vectorize=True, strategy="forward-mode"),
    ),
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
    steps = tf32x3(3) if name.startswith("attention") else 4  # sin, cos and their products round too
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
    if name in PLAIN or (name.partition(",")[0], way) == ("attention", "vmap"):
        assert_agrees(name, run)
        return
    assert all(x is None or x.isfinite().all() for x in outcome(name, "reference", torch.float64, run))
    op = name.partition(",")[0]
    message = rf"^([a-z_]+ or )?{op}( or [a-z_]+)?: {words}"  # one kernel computes the gradients of both norms
    with pytest.raises(RuntimeError, match=message) as error:
        outcome(name, "triton", torch.float32, run)
    assert "\n" not in str(error.value)


def test_unused_tangents_keep_nothing_alive():
    """What PyTorch records for tangents between two kernels is not kept for backward."""
    x, weight = randn(2, 3, 8, gen=generator()), randn(8, 4, gen=generator()).requires_grad_()
    held = []

    def network(x):
        hidden = ops.swiglu(x, impl="triton")
        held.append(weakref.ref(forward_ad.unpack_dual(hidden).tangent))
        return ops.swiglu(hidden @ weight.T, impl="triton")

    with forward_ad.dual_level():
        value, dot = forward_ad.unpack_dual(network(forward_ad.make_dual(x, x)))
    # Until the level ends, PyTorch keeps the tangents of everything that it saves.
    assert held[0]() is None and value.requires_grad and dot.requires_grad
    with torch.no_grad(), forward_ad.dual_level():
        assert not forward_ad.unpack_dual(network(forward_ad.make_dual(x, x))).tangent.requires_grad


class OfALibrary(torch.autograd.Function):
    """A product as flash-attn would compute it: its backward records nothing."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return q * k * v

    @staticmethod
    @torch.no_grad()
    def backward(ctx, gradient):
        q, k, v = ctx.saved_tensors
        return gradient * k * v, gradient * q * v, gradient * q * k


def test_second_derivatives_through_a_library_that_records_none():
    """Even of a loss whose gradient is constant, so that nothing else requires a gradient."""
    parts = [randn(3, gen=generator()).requires_grad_() for _ in range(3)]
    (product,) = differentiable_once("attention", lambda *parts: (OfALibrary.apply(*parts),), tuple(parts))
    gradients = torch.autograd.grad(product.sum(), parts, create_graph=True)
    torch.testing.assert_close(gradients[0], parts[1] * parts[2])
    with pytest.raises(RuntimeError, match=f"^attention: {TWICE}"):
        torch.autograd.grad(gradients[0].sum(), parts[1])


def test_tangents_of_inputs_that_take_none():
    x, weight = randn(2, 3, 8, gen=generator()), randn(8, gen=generator())
    with pytest.raises(RuntimeError, match=r"^norm_modulate: weight takes no tangent, got a dual tensor$"):
        func.jvp(lambda w: ops.norm_modulate(x, w, impl="triton"), (weight,), (weight,))


def test_gradients_with_tangents_are_refused():
    """The tangent of a gradient, from a loss of dual tensors that backward differentiates, would be lost."""
    x = randn(2, 3, 8, gen=generator()).requires_grad_()
    with forward_ad.dual_level(), pytest.raises(RuntimeError, match=r"^swiglu: kernels give gradients no tangents"):
        loss = forward_ad.make_dual(ops.swiglu(x, impl="triton"), randn(2, 3, 4, gen=generator())).square().sum()
        torch.autograd.grad(loss, x)


def objective(impl: str, dtype: torch.dtype) -> tuple[Callable, tuple[Tensor, Tensor]]:
    """A scalar of `pmf_objective` as a function of both heads' outputs, and these."""
    gen = generator("objective")
    nets = [randn(2, 4, 48, gen=gen).to(dtype) for _ in range(4)]
    images, scalars = (randn(2, 3, 8, 8, gen=gen).to(dtype) for _ in range(2)), torch.rand(3, 2, generator=gen)
    given = (*nets[2:], None, *images, *scalars.to(DEVICE, dtype), torch.full((2,), -1, device=DEVICE))

    def loss(net_u, net_v):
        loss_u, loss_v = ops.pmf_objective(net_u, net_v, *given, patch_size=4, impl=impl)
        return (loss_u + 2 * loss_v).sum()

    return loss, tuple(net.requires_grad_() for net in nets[:2])


def test_the_objective():
    """It has gradients for both heads and no tangents; kernels refuse the rest."""
    results = []
    for impl, dtype in (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64)):
        loss, nets = objective(impl, dtype)
        results.append((*func.grad(loss, (0, 1))(*nets), *functional.vjp(loss, nets)[1]))
        results[-1] += torch.autograd.grad(func.vjp(loss, *nets)[0], nets)
    for parts in zip(*results, strict=True):
        within_budget("pmf_objective", *parts, peak=False, steps=4)

    loss, nets = objective("triton", torch.float32)
    jacobians = {
        lambda: func.jvp(loss, nets, nets): "pmf_objective: net_u takes no tangent, got a dual tensor",
        lambda: func.vmap(loss)(*(net[None] for net in nets)): f"pmf_objective: {MAPPED}",
        lambda: functional.jvp(loss, nets, nets): f"pmf_objective: {TWICE}",
        lambda: functional.hessian(loss, nets): f"pmf_objective: {TWICE}",
    }
    for run, message in jacobians.items():
        with pytest.raises(RuntimeError, match=f"^{message}"):
            run()


@pytest.fixture(params=("in_context", "adaln"))
def networks(request):
    """(triton, reference, reference in float64) of one random network: u as a function of (z, t, h) and weights."""
    config = dataclasses.replace(pmf.MODELS["pMF-digits"], conditioning=request.param)

    def network(impl, dtype):
        model = random_model(config, dtype=torch.float32, impl=impl).to(DEVICE, dtype)
        inputs = model_inputs(config, 2, dtype=torch.float32)
        inputs = {k: v.to(DEVICE, dtype if v.is_floating_point() else None) for k, v in inputs.items()}
        z, t, h = (inputs.pop(name) for name in "zth")

        def u(z, t, h, weights={}):  # noqa: B006
            return func.functional_call(model, weights, (z, t, h), inputs)[0]

        return model, u, (z, t, h), (torch.ones_like(z), torch.ones_like(t), torch.zeros_like(h))

    kinds = (("triton", torch.float32), ("reference", torch.float32), ("reference", torch.float64))
    return [network(*kind) for kind in kinds]


def joined(tensors) -> Tensor:
    return torch.cat([x.flatten() for x in tensors])


def test_network(networks):
    """MeanFlow's loss through `torch.func.jvp` of a network, by backward and by `torch.func.grad`."""
    found = []
    for model, u, primals, tangents in networks:
        weights = {name: p.detach() for name, p in model.named_parameters()}

        def loss(weights, u=u, primals=primals, tangents=tangents):
            value, dot = func.jvp(functools.partial(u, weights=weights), primals, tangents)
            return (value + dot.detach()).square().mean()

        backward = torch.autograd.grad(loss({}), list(model.parameters()), allow_unused=True)
        ready = [x for x in backward if x is not None]
        found.append((joined(ready), joined(func.grad(loss)(weights).values())))
    for parts in zip(*found, strict=True):
        within_budget("network", *parts, peak=False, steps=tf32x3(2))


def test_a_network_on_kernels_refuses(networks):
    model, u, primals, tangents = networks[0]
    weights = list(model.parameters())
    with pytest.raises(RuntimeError, match=f"^residual_norm_modulate: {TANGENT}"):
        torch.autograd.grad(func.jvp(u, primals, tangents)[1].sum(), weights, allow_unused=True)
    with pytest.raises(RuntimeError, match=f"^patch_embed: {MAPPED}"):
        func.vmap(u)(*(p[None] for p in primals))
    with pytest.raises(RuntimeError, match=f"^patch_embed: {TWICE}"):
        functional.jvp(u, primals, tangents)
    _, u_reference, primals, _ = networks[2]
    mapped = func.vmap(u_reference)(*(torch.stack([p, p]) for p in primals))
    assert torch.allclose(mapped[0], u_reference(*primals))
