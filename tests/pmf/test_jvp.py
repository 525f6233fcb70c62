"""`pmf.jvp` of networks: bytes, gradients, structures, partial tangents, autocast, our own layers."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel

import pmf
from pmf import InputError, layers
from pmf.counting import saved_bytes
from tests.networks import TINY, model_inputs, random_model
from tests.pmf.jvp_checks import W, compare, drawn


class Block(nn.Module):
    """A transformer block with adaLN modulation from a time."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(width), nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 16), nn.GELU(), nn.Dropout(0.0), nn.Linear(16, width))
        self.modulation = nn.Linear(width, 2 * width)

    def forward(self, x, c):
        shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
        y = self.norm(x) * (1 + scale) + shift
        x = x + self.attention(y, y, y, need_weights=False)[0]
        return x + self.mlp(x)


class Net(nn.Module):
    """`wrap(block, x, c)` calls each block."""

    def __init__(self, wrap=lambda block, x, c: block(x, c), depth=3):
        super().__init__()
        torch.manual_seed(0)
        self.time, self.wrap = nn.Linear(2, 8), wrap
        self.blocks = nn.ModuleList(Block() for _ in range(depth))
        self.double()

    def forward(self, z, t, r):
        c = self.time(torch.stack([t, r], -1))
        for block in self.blocks:
            z = self.wrap(block, z, c)
        return z


def inputs():
    return drawn(4, 5, 8), drawn(4, seed=1).sigmoid(), drawn(4, seed=2).sigmoid()


def meanflow(net, jvp=pmf.jvp):
    z, t, r = inputs()
    v = drawn(4, 5, 8, seed=5)
    u, du = jvp(net, (z, t, r), (v, torch.ones_like(t), torch.zeros_like(r)))
    (u + (t - r)[:, None, None] * du.detach() - v).square().mean().backward()
    return u.detach(), du.detach(), [p.grad for p in net.parameters()]


def assert_same(got, expected, tolerance=1e-12):
    for a, b in zip((*got[:2], *got[2]), (*expected[:2], *expected[2]), strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_a_network_saves_the_bytes_of_its_forward_pass():
    net, (z, t, r) = Net(), inputs()
    plain = saved_bytes(lambda: net(z, t, r), net.parameters())
    assert saved_bytes(lambda: pmf.jvp(net, (z, t, r), (z, 1, 0)), net.parameters()) == plain
    assert torch.equal(pmf.jvp(net, (z, t, r), (z, 1, 0))[0], net(z, t, r))


def test_a_network_has_the_tangent_and_the_gradients_of_torch_func_jvp():
    with sdpa_kernel(SDPBackend.MATH):
        expected = meanflow(Net(), torch.func.jvp)
    assert_same(meanflow(Net()), expected, 1e-10)


def test_tangents_are_freed_with_the_call():
    kept = []
    pmf.jvp(lambda x: kept.append(x.sin()) or x * 2, (drawn(3),), (drawn(3),))
    assert kept[0].tangent is None
    compare(lambda x: x * kept[0], [drawn(3)], [drawn(3, seed=1)])


def test_structures_aux_numbers_and_still_inputs():
    def function(given, t, label):
        a, (b,) = given["a"], given["b"]
        assert label == "cat"
        return {"sum": a * t + b, "still": b * 2, "none": None}, (a * 3, "aux")

    a, b, t = drawn(3), drawn(3, seed=1), drawn(3, seed=2)
    out, dot, aux = pmf.jvp(function, ({"a": a, "b": [b]}, t, "cat"), ({"a": a, "b": None}, 1, None), has_aux=True)
    torch.testing.assert_close(dot["sum"], a * t + a)
    assert dot["still"].abs().max() == 0 and dot["none"] is None and out["none"] is None
    assert type(aux[0]) is torch.Tensor and aux[1] == "aux"


def test_partial_tangents_equal_those_of_all_rows():
    net, (z, t, r) = Net(), inputs()
    v = drawn(4, 5, 8, seed=5)
    u, du = pmf.jvp(net, (z, t, r), (v, 1, 0))
    some, partial = pmf.jvp(net, (z, t, r), (v[-3:], 1, 0), rows=3)
    torch.testing.assert_close(some, u, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(partial, du[-3:], rtol=1e-12, atol=1e-12)


def test_autocast_and_inference_mode():
    net, (z, t, r) = Net().float(), [x.float() for x in inputs()]
    with torch.autocast("cpu", torch.bfloat16):
        plain = net(z, t, r)
        u, du = pmf.jvp(net, (z, t, r), (z, 1, 0))
    assert torch.equal(u, plain) and du.dtype == u.dtype
    (u + du).float().square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in net.parameters())
    exact = pmf.jvp(Net(), inputs(), (inputs()[0], 1, 0))[1]
    assert (du - exact).norm() / exact.norm() < 0.05
    with torch.inference_mode():
        inferred = pmf.jvp(Net(), inputs(), (inputs()[0], 1, 0))[1]
        clamped = pmf.jvp(lambda x: x.clamp(max=0.1).cumprod(0), (drawn(3),), (drawn(3, seed=1),))[1]
    torch.testing.assert_close(inferred, exact)
    torch.testing.assert_close(
        clamped, pmf.jvp(lambda x: x.clamp(max=0.1).cumprod(0), (drawn(3),), (drawn(3, seed=1),))[1]
    )


def moved(model, values, jvp=pmf.jvp):
    """`jvp` of a PMFDiT along z, t and h."""
    others = [values[name] for name in ("omega", "t_min", "t_max", "y")]
    v, ones = drawn(*values["z"].shape, seed=5), torch.ones_like(values["t"])
    return jvp(lambda z, t, h: model(z, t, h, *others), (values["z"], values["t"], values["h"]), (v, ones, ones))


@pytest.mark.parametrize("conditioning", ["in_context", "adaln"])
def test_our_network_moves_on_both_heads(conditioning):
    config = dataclasses.replace(TINY, conditioning=conditioning)
    model, values = random_model(config), model_inputs(config, 3)
    (u, v), (du, dv) = moved(model, values)
    (_, _), (du_expected, dv_expected) = moved(model, values, torch.func.jvp)
    assert torch.equal(u, model(**values)[0]) and torch.equal(v, model(**values)[1])
    torch.testing.assert_close(du, du_expected.detach(), rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(dv, dv_expected.detach(), rtol=1e-10, atol=1e-10)


def test_fused_layers_mix_with_unported_code():
    norm = layers.NormModulate(6, elementwise_affine=True).double()

    def mixed(x):
        y = norm(x, x.mean(1), scale_of(x))
        return pmf.ops.swiglu(y @ W) * x[..., :3] + norm(F.silu(x))[..., :3]

    def scale_of(x):
        return (x.sum(1) @ W).sin()

    compare(mixed, [drawn(3, 4, 6)], [drawn(3, 4, 6, seed=1)], [norm.weight])
    with pytest.raises(InputError, match="weight takes no tangent"):
        pmf.jvp(lambda x: pmf.ops.norm_modulate(x, x[0, 0]), (drawn(3, 4, 6),), (drawn(3, 4, 6),))
