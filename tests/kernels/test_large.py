"""Tensors of more than 2^31 values, as the largest batches have: their offsets need 64 bits.

In the interpreter only the last programs run, and memory that they do not touch is never taken.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from pmf import Dual, ops
from pmf.errors import InputError
from pmf.kernels import flash, norm_backward, rotary_backward
from pmf.kernels.attention import attention_tangent
from tests.kernels.checks import DEVICE, generator, randn
from tests.kernels.interpreter import last_programs
from tests.networks import relative_error

LIMIT = 2**31
FEW = 8  # samples that move
PROGRAMS = 80  # at least those that write the last sample
ROOM = 64 * 2**30  # for the largest case
BF16 = torch.bfloat16


class Case(NamedTuple):
    """A function of tensors by name that gives tensors, the shapes of a sample of each, and the names of those that
    vary. Tensors whose names end with _dot move.
    """

    function: Callable[..., list[Tensor]]
    shapes: dict[str, tuple[int, ...]]
    varied: tuple[str, ...]


def parts(*duals: Dual) -> list[Tensor]:
    return [part for dual in duals for part in dual]


def norm(x, x_dot, scale, shift, impl):
    return parts(ops.norm_modulate(Dual(x, x_dot), scale=scale, shift=shift, impl=impl))


def residual_norm(x, x_dot, branch, branch_dot, gate, impl):
    return parts(*ops.residual_norm_modulate(Dual(x, x_dot), Dual(branch, branch_dot), gate=gate, impl=impl))


def swiglu(x, x_dot, impl):
    return parts(ops.swiglu(Dual(x, x_dot), impl=impl))


def gelu(x, x_dot, impl):
    return parts(ops.gelu(Dual(x, x_dot), impl=impl))


def heads(qkv, qkv_dot, impl):
    tables = (randn(256, 32, gen=generator("table", i)) for i in range(2))
    return parts(*ops.qk_norm_rope(Dual(qkv, qkv_dot), None, None, *tables, prefix_length=20, impl=impl))


def embedding(images, impl, images_dot=None):
    gen = generator("embedding")
    kernels = randn(128, 3, 16, 16, gen=gen, dtype=BF16), randn(768, 128, 1, 1, gen=gen, dtype=BF16)
    biases, positions = (randn(n, gen=gen, dtype=BF16) for n in (128, 768)), randn(256, 768, gen=gen, dtype=BF16)
    weights = [x for pair in zip(kernels, biases, strict=True) for x in pair]
    if images_dot is None:
        return [ops.patch_embed(images, *weights, positions, impl=impl)]
    return [ops.patch_embed(Dual(images, images_dot), *weights, positions, impl=impl).dot]


def objective(u, v, u_dot, c_dot, z, x, impl):
    null = torch.full((len(u),), -1, device=DEVICE)
    t, h, guidance = (torch.full((len(u),), value, device=DEVICE) for value in (0.5, 0.3, 0.0))
    scalars = t, h, guidance, null
    return list(ops.pmf_objective(u, v, u_dot, c_dot, None, z, x, *scalars, patch_size=16, impl=impl))


TOKENS, VECTOR, IMAGE = (256, 768), (768,), (3, 256, 256)
CASES = {
    "norm_modulate": Case(norm, {"x": TOKENS, "x_dot": TOKENS, "scale": VECTOR, "shift": VECTOR}, ("x",)),
    "residual_norm_modulate": Case(
        residual_norm,
        {"x": TOKENS, "x_dot": TOKENS, "branch": TOKENS, "branch_dot": TOKENS, "gate": VECTOR},
        ("x", "branch"),
    ),
    "swiglu": Case(swiglu, {"x": (256, 4096), "x_dot": (256, 4096)}, ("x",)),
    "gelu": Case(gelu, {"x": (256, 3072), "x_dot": (256, 3072)}, ("x",)),
    "qk_norm_rope": Case(heads, {"qkv": (276, 3, 12, 64), "qkv_dot": (276, 3, 12, 64)}, ("qkv",)),
    "patch_embed": Case(embedding, {"images": IMAGE}, ("images",)),
    "patch_embed's tangent": Case(embedding, {"images": IMAGE, "images_dot": IMAGE}, ()),
    "pmf_objective": Case(
        objective, {"u": TOKENS, "v": TOKENS, "u_dot": TOKENS, "c_dot": TOKENS, "z": IMAGE, "x": IMAGE}, ("u", "v")
    ),
}


def last_one_set(*shape: int, seed) -> Tensor:
    """A tensor of which only the last few samples are set: zero, and the last one random."""
    x = torch.empty(*shape, dtype=BF16, device=DEVICE)
    x[-FEW:] = 0.0
    x[-1:] = randn(1, *shape[1:], gen=generator(seed), dtype=BF16)
    return x


def last_samples(function, inputs: dict[str, Tensor], varied, impl: str) -> list[Tensor]:
    """The last sample of what the function gives and of the gradients of what varies, in that order."""
    leaves = {name: x.detach().requires_grad_(name in varied) for name, x in inputs.items()}
    outputs = function(**leaves, impl=impl)
    values = [y for y in outputs if y.requires_grad]
    found = [y.detach()[-1:].clone() for y in outputs]
    if varied:
        given = [last_one_set(*y.shape, seed=i).to(y.dtype) for i, y in enumerate(values)]
        found += [d[-1:] for d in torch.autograd.grad(values, [leaves[name] for name in varied], given)]
    return found


@pytest.fixture
def room(monkeypatch):
    """On a GPU, memory; in the interpreter, no fill of new tensors, the last programs alone, and as many as tiles."""
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
        if torch.cuda.mem_get_info()[0] < ROOM:
            pytest.skip(f"{ROOM >> 30} GiB of GPU memory are not free")
        yield
        torch.cuda.empty_cache()
        return
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    tile, grid = norm_backward.backward_tile, rotary_backward.backward_grid
    monkeypatch.setattr(norm_backward, "backward_tile", lambda *given: (tile(*given)[0], 2**16, 1))
    monkeypatch.setattr(rotary_backward, "backward_grid", lambda tiles, *given: (tiles, grid(tiles, *given)[1]))
    with last_programs(PROGRAMS):
        yield


def moves(name: str) -> bool:
    return name.endswith("_dot")


@pytest.mark.parametrize(
    ("case", "few"),
    [(name, few) for name in CASES for few in (False, True) if not few or any(map(moves, CASES[name][1]))],
)
def test_the_last_sample_of_more_than_2_to_the_31_values(case, few, room):
    function, shapes, varied = CASES[case]
    samples = LIMIT // max(torch.Size(shape).numel() for shape in shapes.values()) + 2 * FEW
    rows = {name: FEW if few and moves(name) else samples for name in shapes}
    inputs = {name: last_one_set(rows[name], *shape, seed=name) for name, shape in shapes.items()}
    found = last_samples(function, inputs, varied, "triton")
    expected = last_samples(function, {name: x[-1:].clone() for name, x in inputs.items()}, varied, "reference")
    for mine, reference in zip(found, expected, strict=True):
        assert relative_error(mine, reference) < 2**-7  # a rounding step of bfloat16


def tangent_of_heads(q, q_dot, k, k_dot, v, v_dot):
    o, lse = flash.attention(*(x.contiguous() for x in (q, k, v)), 0.2, False, None)
    return [attention_tangent(q, k, v, q_dot, k_dot, v_dot, o, lse, 0.2)]


def gradient_of_heads(*given):
    qkv = randn(3, 3, 3, 3, 32, gen=generator("qkv"), dtype=BF16).requires_grad_()
    return torch.autograd.grad(ops.qk_norm_rope(qkv, impl="triton"), qkv, given)


def swiglu_of_rows(x, x_dot):
    x = x.detach().requires_grad_()
    y = ops.swiglu(Dual(x, x_dot), impl="triton")
    return [*parts(y), *torch.autograd.grad(y.value, x, torch.ones_like(y.value))]


def modulated(scale, shift):
    x = randn(len(scale), 32, 64, gen=generator("x"), dtype=BF16).requires_grad_()
    scale = scale.detach().requires_grad_()
    y = ops.norm_modulate(x, scale=scale, shift=Dual(shift, shift), impl="triton")
    return [*parts(y), *torch.autograd.grad(y.value, (x, scale), torch.ones_like(y.value))]


FAR = {
    "attention's tangent": (tangent_of_heads, 6, (3, 3, 3, 32), (0, 1, 2)),
    "gradient of qk_norm_rope": (gradient_of_heads, 3, (3, 3, 3, 32), (0, 1, 2)),
    "swiglu": (swiglu_of_rows, 2, (3, 64), (0,)),
    "modulations of samples": (modulated, 2, (3, 64), (0,)),
    "modulations of tokens": (modulated, 2, (1, 32, 64), (1,)),
}


def far_apart(count: int, shape: tuple[int, ...], dim: int) -> list[Tensor]:
    """Random tensors in one memory, whose first and last values in a dimension lie 2^31 values apart."""
    size, apart = torch.Size(shape).numel(), -(-LIMIT // (shape[dim] - 1)) // 8 * 8 + 8
    memory = torch.empty((shape[dim] - 1) * apart + count * size, dtype=BF16, device=DEVICE)
    strides = list(torch.empty(shape, device="meta").stride())
    strides[dim] = apart
    drawn = (randn(*shape, gen=generator(dim, i), dtype=BF16) for i in range(count))
    return [memory.as_strided(shape, strides, i * size).copy_(x) for i, x in enumerate(drawn)]


@pytest.mark.parametrize(("name", "dim"), [(name, dim) for name, (*_, dims) in FAR.items() for dim in dims])
def test_values_that_lie_far_apart(name, dim, monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    function, count, shape, _ = FAR[name]
    inputs = far_apart(count, shape, dim)
    expected = function(*(x.clone(memory_format=torch.contiguous_format) for x in inputs))
    for mine, near in zip(function(*inputs), expected, strict=True):
        assert torch.equal(mine, near)


def test_a_sample_of_as_many_values_has_no_tangent(monkeypatch):
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", False)
    q, lse = torch.ones(1, 1, 32, 64, dtype=BF16, device=DEVICE), torch.zeros(1, 32, 1, device=DEVICE)
    k = torch.empty(1, 1, 32, 64, dtype=BF16, device=DEVICE).expand(1, 2**20, 32, 64)
    with pytest.raises(
        InputError, match=r"attention: a tangent takes samples of less than 2\^31 values, got \[1, 1048576"
    ):
        attention_tangent(q, k, k, q, k, k, q, lse, 0.2)
