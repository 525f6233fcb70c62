"""Joined weights: values and gradients equal those of padding, concatenating and casting one by one."""

import dataclasses

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import pmf
from pmf import layers
from pmf.packing import Join, PackedModule, held_weights
from pmf.pair import Dual
from tests.networks import TINY, random_model
from tests.pmf.test_loss import LOSS, step_inputs

DTYPES = [None, torch.bfloat16]


class Parts(PackedModule):
    """Every kind of join."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        shapes = dict(a=(5, 4), b=(5, 4), row=(5, 3), column=(4, 5), alone=(6, 3), bias=(7,), other=(7,))
        for name, shape in shapes.items():
            self.register_parameter(name, torch.nn.Parameter(torch.randn(shape)))

    def joins(self):
        padded = (Join((self.row, self.row), (8, 3)), Join((self.column,), (4, 8)))
        return Join.of(self.a, self.b), *padded, Join.of(self.alone), Join.of(self.bias, self.other)


def gradients(parts, weights, **options):
    """Gradients of a fixed weighted sum over all joined weights except the last."""
    torch.manual_seed(1)
    loss = sum((w.float() * torch.randn(w.shape)).square().sum() for w in weights[:-1])
    return torch.autograd.grad(loss, list(parts.parameters()), allow_unused=True, **options)


@pytest.mark.parametrize("dtype", DTYPES)
def test_joined_weights_are_those_made_one_by_one(dtype):
    parts = Parts()
    plain = [w if dtype is None else w.to(dtype) for w in parts.packed()]
    with torch.autocast("cpu", dtype or torch.bfloat16, dtype is not None), held_weights(parts, "cpu"):
        held = parts.packed()
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(held, plain, strict=True))
    assert (held[3] is parts.alone) == (dtype is None)


@pytest.mark.parametrize("dtype", DTYPES)
def test_gradients_are_those_of_operations_one_by_one(dtype):
    parts = Parts()
    wanted = gradients(parts, [w if dtype is None else w.to(dtype) for w in parts.packed()])
    with torch.autocast("cpu", dtype or torch.bfloat16, dtype is not None), held_weights(parts, "cpu"):
        found = gradients(parts, parts.packed())
    for (name, parameter), a, b in zip(parts.named_parameters(), wanted, found, strict=True):
        assert (a is None) == (b is None) == (name in ("bias", "other")), name
        if a is not None:
            assert torch.equal(a, b) and b.dtype == parameter.dtype and b.shape == parameter.shape, name


@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives(dtype):
    parts = Parts()

    def second(weights):
        first = gradients(parts, weights, create_graph=True)
        total = sum(g.square().sum() for g in first if g is not None)
        return torch.autograd.grad(total, [parts.a, parts.row, parts.column])

    wanted = second([w if dtype is None else w.to(dtype) for w in parts.packed()])
    with torch.autocast("cpu", dtype or torch.bfloat16, dtype is not None), held_weights(parts, "cpu"):
        found = second(parts.packed())
    assert all(torch.equal(a, b) for a, b in zip(wanted, found, strict=True))


def test_a_frozen_part_gets_no_gradient():
    parts = Parts()
    parts.a.requires_grad_(False)
    with held_weights(parts, "cpu"):
        sum(w.sum() for w in parts.packed()).backward()
    assert parts.a.grad is None and torch.equal(parts.b.grad, torch.ones(5, 4))


class Operations(TorchDispatchMode):
    """Records the names of operations, each of which would be a launch."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func.overloadpacket.__name__)
        return func(*args, **kwargs or {})


def test_a_step_copies_no_weight_by_itself():
    """Under autocast one pass joins and casts all Linear weights; backward has one pass per layer that joins."""
    model, (x, y, draws) = random_model(TINY, dtype=torch.float32), step_inputs(8)
    x, draws = x.float(), dataclasses.replace(draws, noise=draws.noise.float())
    with torch.autocast("cpu", torch.bfloat16), Operations() as operations, model.held_weights():
        pass
    assert operations.seen.count("_foreach_copy_") == 1
    assert not {"cat", "constant_pad_nd", "_to_copy", "clone"} & set(operations.seen)
    with torch.autocast("cpu", torch.bfloat16):
        loss = pmf.pmf_loss(model, x, y, draws, LOSS).loss
    with Operations() as operations:
        loss.backward()
    blocks, heads, embedders = TINY.depth + TINY.aux_head_depth, 2, 1
    assert operations.seen.count("_foreach_copy_") == 2 * blocks + heads + embedders


@pytest.mark.parametrize("rows", [None, 1, 3])
def test_scalars_embedded_at_once_are_embedded_as_each_alone(rows):
    torch.manual_seed(0)
    names = ("a", "b", "c")
    embedders = layers.ScalarEmbedders(names, 16).double()
    for p in embedders.parameters():
        torch.nn.init.normal_(p)
    scalars = [Dual(torch.rand(3, dtype=torch.float64)) for _ in names]
    if rows:
        scalars[0] = Dual(scalars[0].value, torch.randn(rows, dtype=torch.float64))
    together = embedders.forward_dual(*scalars)
    alone = [embedders[name].forward_dual(s) for name, s in zip(names, scalars, strict=True)]
    for a, b in zip(together, alone, strict=True):
        torch.testing.assert_close(a.value, b.value, rtol=1e-13, atol=1e-13)
        assert (a.dot is None) == (b.dot is None)
    if rows:
        torch.testing.assert_close(together[0].dot, alone[0].dot, rtol=1e-13, atol=1e-13)
    assert not any(e.dot is not None and e.dot.requires_grad for e in together)
