"""What the tests of `pmf.jvp` share: inputs, and the comparison with `torch.func.jvp`."""

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf

F64 = torch.float64
PARTITIONED = dict(fullgraph=True, backend="aot_eager_decomp_partition")
"""Options of torch.compile: this backend chooses what to save as inductor does, but generates no code."""


def drawn(*shape, seed=0):
    return torch.randn(shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


W = drawn(6, 6, seed=3) / 2


def compare(function, primals, tangents, parameters=()):
    """Value equal bit by bit, tangent and gradients as those of torch.func.jvp, which only then is detached."""
    inputs = [x.clone().requires_grad_() for x in primals]
    expected = [x.clone().requires_grad_() for x in primals]
    torch.manual_seed(1)
    out, dot = pmf.jvp(function, tuple(inputs), tuple(tangents))
    torch.manual_seed(1)
    plain = function(*expected)
    torch.manual_seed(1)
    with sdpa_kernel(SDPBackend.MATH):
        _, wanted = torch.func.jvp(function, tuple(primals), tuple(tangents))
    assert type(out) is torch.Tensor and type(dot) is torch.Tensor and not dot.requires_grad
    torch.testing.assert_close(out, plain, rtol=0, atol=0)
    torch.testing.assert_close(dot, wanted.detach(), rtol=1e-10, atol=1e-10)
    if plain.requires_grad:
        weights = drawn(*plain.shape, seed=9) if plain.is_floating_point() else torch.ones_like(plain)
        got, right = (
            torch.autograd.grad((weights * y).sum().real, [*xs, *parameters], allow_unused=True)
            for y, xs in ((out, inputs), (plain, expected))
        )
        for a, b in zip(got, right, strict=True):
            assert (a is None) == (b is None)
            if a is not None:
                torch.testing.assert_close(a, b, rtol=0, atol=0)
